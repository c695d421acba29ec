"""The settings of a run: the yacs tree (`tree`, `defaults`), and the ds_config (`ds`)."""

from internvl_ds.config.tree import default_config, get_config, merge_opts

__all__ = ['default_config', 'get_config', 'merge_opts']
