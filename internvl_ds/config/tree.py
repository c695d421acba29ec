"""The yacs tree of a run: its defaults, YAML files with their BASE files, --opts, and flags on top.

The original's YAML files merge without an edit. Options are read and written here by dotted keys.
"""

from __future__ import annotations

import copy
import difflib
import functools
import os
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from yacs.config import CfgNode as CN

from internvl_ds.config.defaults import DEFAULTS
from internvl_ds.errors import ConfigError, brief
from internvl_ds.files.reading import YAML_BYTES, read_text
from internvl_ds.files.yaml_text import parse_yaml

# Files that one configuration may consist of: each may name the others more than once.
_MOST_FILES = 100

# Flag of the training program (attribute of args) -> key that it sets.
_FLAGS = {
    'batch_size': 'DATA.BATCH_SIZE', 'dataset': 'DATA.DATASET', 'data_path': 'DATA.DATA_PATH',
    'zip': 'DATA.ZIP_MODE', 'cache_mode': 'DATA.CACHE_MODE', 'pretrained': 'MODEL.PRETRAINED',
    'resume': 'MODEL.RESUME', 'accumulation_steps': 'TRAIN.ACCUMULATION_STEPS',
    'use_checkpoint': 'TRAIN.USE_CHECKPOINT', 'amp_opt_level': 'AMP_OPT_LEVEL',
    'output': 'OUTPUT', 'tag': 'TAG', 'eval': 'EVAL_MODE', 'throughput': 'THROUGHPUT_MODE',
    'save_ckpt_num': 'SAVE_CKPT_NUM', 'use_zero': 'TRAIN.OPTIMIZER.USE_ZERO',
    'local_rank': 'LOCAL_RANK',
}  # fmt: skip


def default_config() -> CN:
    """Returns a fresh, unfrozen copy of the default tree."""
    return DEFAULTS.clone()


def get_config(args: Namespace) -> CN:
    """Builds the configuration: defaults, the YAML file (and its BASE files), --opts, then flags.

    Args:
        args: ``args.cfg`` is a YAML path, or the name of one that ships in
            ``internvl_ds/config``; ``args.opts`` an optional flat list of KEY VALUE pairs; the
            other attributes are the training program's flags, applied where they are set.

    Returns:
        A frozen CfgNode. OUTPUT is ``<output>/<YAML stem>``, as in the original, with ``/<tag>``
        behind it when a tag other than 'default' is given; so is CHECKPOINT.MIRROR, if set.

    Raises:
        ConfigError: for a missing file, an unknown key (with the nearest known one), or a type
            that does not fit.
    """
    config = default_config()
    path = find_config_file(args.cfg)
    _merge_file(config, path, parents=(), files=[])
    merge_opts(config, getattr(args, 'opts', None) or [])
    for flag, key in _FLAGS.items():
        value = getattr(args, flag, None)
        if value is not None and value is not False and value != '':
            _merge_tree(config, nest(key.split('.'), value), source=f'--{flag.replace("_", "-")}')
    folders = [path.stem]
    if config.TAG != 'default':
        folders.append(config.TAG)
    config.OUTPUT = os.path.join(config.OUTPUT or 'output', *folders)
    if config.CHECKPOINT.MIRROR:  # runs that differ in these must not take each other's tags
        config.CHECKPOINT.MIRROR = '/'.join([config.CHECKPOINT.MIRROR.rstrip('/'), *folders])
    config.freeze()
    return config


def find_config_file(name: str) -> Path:
    """Finds a YAML file by path, or by name among the files that ship with the package."""
    folder = Path(__file__).parent
    for candidate in (Path(name), folder / name, folder / f'{name}.yaml'):
        if os.path.exists(candidate) and not os.path.isdir(candidate):
            return candidate
    have = ', '.join(sorted(p.stem for p in folder.glob('*.yaml')))
    raise ConfigError(f'--cfg {name}: no such file; configurations that ship by name: {have}')


def merge_opts(config: CN, opts: Sequence[str]) -> None:
    """Merges ``['A.B', 'value', ...]`` into an unfrozen config; values are parsed as YAML."""
    if len(opts) % 2:
        raise ConfigError(f'--opts takes KEY VALUE pairs, and {opts[-1]!r} has no value')
    for key, text in zip(opts[0::2], opts[1::2], strict=True):
        _merge_tree(config, nest(key.split('.'), _parse_opt(config, key, text)), source='--opts')


def checkpoint_option(config: CN, key: str) -> Any:
    """CHECKPOINT.``key``; the default if the tree lacks it, as the original's trees do."""
    return get_option(config, f'CHECKPOINT.{key}')


def copy_of_tree(config: CN) -> CN:
    """A copy whose sections and lists are its own; a tenth of the time of ``config.clone()``."""

    def copied(value: Any) -> Any:
        if isinstance(value, dict):
            result = copy.copy(value)
            for key, item in value.items():
                result[key] = copied(item)
            return result
        return [copied(item) for item in value] if type(value) is list else value

    return copied(config)


def default_of(key: str) -> Any:
    """The default of a dotted key, or None; does not copy the tree."""
    return get_option(DEFAULTS, key, None)


def get_option(config: CN, key: str, default: Any = ...) -> Any:
    """Reads a dotted key from any CfgNode.

    Where the key or its section is missing: ``default``, or else the default of the key itself.
    """
    value = value_at(config, *key.split('.'), default=...)
    if value is not ...:
        return value
    return default_of(key) if default is ... else default


def value_at(tree: Mapping[str, Any], *path: str, default: Any = None) -> Any:
    """The value at a path of a nested mapping; ``default`` where there is none."""
    node: Any = tree
    for key in path:
        if not isinstance(node, Mapping) or key not in node:
            return default
        node = node[key]
    return node


def set_options(config: CN, options: Mapping[str, Any]) -> CN:
    """Writes values under dotted keys into a config, frozen or not, and returns the config."""
    for key, value in options.items():
        *sections, name = key.split('.')
        node = functools.reduce(CN.__getitem__, sections, config)
        node[name] = value  # freezing a CfgNode only guards its attributes
    return config


def scale_lr(lr: float, images: int) -> float:
    """Scales a learning rate of TRAIN, given for a batch of 512, to a batch of ``images``."""
    return lr * images / 512


def _parse_opt(config: CN, key: str, text: Any) -> Any:
    if not isinstance(text, str):
        return text
    takes_text = isinstance(get_option(config, key, None), str)
    try:
        value = parse_yaml(text)
    except ValueError as error:
        if takes_text:
            return text
        raise ConfigError(f'--opts: {key} {text!r} cannot be read as YAML: {error}') from error
    # '7', 'no' and '' are a number, a bool and None to YAML; where text is due, they are text.
    return text if takes_text and not isinstance(value, str) else value


def _merge_file(config: CN, path: Path, parents: tuple[Path, ...], files: list[Path]) -> None:
    chain = (*parents, path.resolve())
    files.append(path)
    if len(files) > _MOST_FILES:
        raise ConfigError(f'{files[0]}: its BASE files lead to more than {_MOST_FILES} files')
    if chain[-1] in parents:
        circle = ' -> '.join(map(str, chain))
        raise ConfigError(f'BASE files include each other in a circle: {circle}')
    try:
        tree = parse_yaml(read_text(path, YAML_BYTES)) or {}
    except (OSError, ValueError) as error:
        raise ConfigError(f'{path}: cannot be read as YAML: {error}') from error
    if not isinstance(tree, dict):
        raise ConfigError(f'{path}: holds a {type(tree).__name__}, not a mapping of keys')
    if isinstance(tree.get('BASE'), str):
        tree['BASE'] = [tree['BASE']]
    if not isinstance(tree.get('BASE') or [], list):
        raise ConfigError(f'{path}: BASE is {brief(tree["BASE"])}, and not a list of files')
    for name in tree.get('BASE') or []:
        if name:
            base = path.parent / str(name)
            if not os.path.exists(base):
                raise ConfigError(f'{path}: BASE names {name}, and there is no file {base}')
            _merge_file(config, base, chain, files)
    _merge_tree(config, tree, source=str(path))


def _merge_tree(config: CN, tree: Mapping[str, Any], source: str) -> None:
    values = _fit(config, tree, '', set(_dotted_keys(config)), source)
    try:
        config.merge_from_other_cfg(CN(values))
    except (AssertionError, KeyError, ValueError, RecursionError, MemoryError) as error:
        reason = error.args[0] if error.args else type(error).__name__
        raise ConfigError(f'{source}: {reason}') from error


def _fit(node: CN, tree: Mapping[str, Any], prefix: str, all_keys: set[str], source: str) -> dict:
    """Refuses unknown keys, and converts YAML values to the types of the defaults."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        name = f'{prefix}{key}'
        if not isinstance(key, str):
            kind = type(key).__name__
            raise ConfigError(f'{source}: key {name[:200]} is a {kind} to YAML; quote it')
        if key not in node:
            if node.is_new_allowed():
                values[key] = value
                continue
            near = _nearest(name, all_keys)
            hint = f'; the nearest known key is {near}' if near else ''
            raise ConfigError(f'{source}: unknown key {name[:200]}{hint}')
        default = node[key]
        if isinstance(default, CN):
            if not isinstance(value, Mapping):
                raise ConfigError(f'{source}: {name} is a section, not a value ({brief(value)})')
            values[key] = _fit(default, value, f'{name}.', all_keys, source)
        elif isinstance(value, Mapping):
            raise ConfigError(f'{source}: {name} is a value ({default!r}), not a section')
        else:
            values[key] = _as_type_of(default, value, f'{source}: {name}')
    return values


def _as_type_of(default: Any, value: Any, where: str) -> Any:
    """Converts a YAML value to the default's type: YAML reads 5e-4 and (1, 2) as text."""
    if isinstance(value, str):
        if '\0' in value:
            raise ConfigError(f'{where}: has a NUL character in it: {brief(value)}')
        try:
            literal = CN._decode_cfg_value(value)
        except (RecursionError, MemoryError) as error:  # of Python's parser, of a strange text
            raise ConfigError(f'{where}: cannot be read as a value: {brief(value)}') from error
        if isinstance(default, str):  # yacs takes text for a literal: so '7' stays what it is
            return None if literal is None else repr(value)
        value = literal
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    both_sequences = isinstance(default, list | tuple) and isinstance(value, list | tuple)
    if default is None or value is None or both_sequences or type(value) is type(default):
        return value
    raise ConfigError(
        f'{where} takes a value of type {type(default).__name__}, such as {default!r}, '
        f'and {brief(value)} is of type {type(value).__name__}'
    )


def _dotted_keys(node: CN, prefix: str = '') -> Iterator[str]:
    for key, value in node.items():
        yield f'{prefix}{key}'
        if isinstance(value, CN):
            yield from _dotted_keys(value, f'{prefix}{key}.')


def _nearest(name: str, all_keys: set[str]) -> str | None:
    """The known key most like ``name``: by its whole path, else by its last part alone."""
    if len(name) > 100:
        return None
    if by_path := difflib.get_close_matches(name, all_keys, n=1, cutoff=0.75):
        return by_path[0]
    by_last = {key.rpartition('.')[2]: key for key in sorted(all_keys, reverse=True)}
    last = difflib.get_close_matches(name.rpartition('.')[2], by_last, n=1, cutoff=0.6)
    return by_last[last[0]] if last else None


def nest(path: Sequence[str], value: Any) -> Any:
    """Nests a value into one mapping for each key of a path."""
    for key in reversed(path):
        value = {key: value}
    return value
