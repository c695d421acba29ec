"""What a run is told: the yacs tree (`tree`), and the ds_config that it becomes (`ds`)."""

from internvl_ds.config.tree import default_config, get_config, merge_opts

__all__ = ['default_config', 'get_config', 'merge_opts']
