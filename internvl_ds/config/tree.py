"""The yacs tree: the original script's keys and defaults, YAML inheritance, and the flags on top.

Key names and defaults are those of InternVL's ``classification/config.py``; keys that only this
package has are marked ``(new)``. The original's YAML files merge without an edit.
"""

from __future__ import annotations

import difflib
import os
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from yacs.config import CfgNode as CN

from internvl_ds.errors import ConfigError, brief
from internvl_ds.files.reading import YAML_BYTES, parse_yaml, read_text

_C = CN()
_C.BASE = ['']

_C.DATA = CN()
_C.DATA.BATCH_SIZE = 128  # images per rank and micro-batch
_C.DATA.DATA_PATH = ''
_C.DATA.DATASET = 'imagenet'
_C.DATA.IMG_SIZE = 224  # pixels
_C.DATA.INTERPOLATION = 'bicubic'
_C.DATA.ZIP_MODE = False
_C.DATA.CACHE_MODE = 'part'
_C.DATA.PIN_MEMORY = True
_C.DATA.NUM_WORKERS = 8
_C.DATA.IMG_ON_MEMORY = False
# (new) Refuse weights that keep names of other classes, by label, than the folders of now have.
_C.DATA.CHECK_CLASS_NAMES = True
_C.DATA.TRANSFORM = 'build_transform'  # or 'build_transform_for_linear_probe'

_C.MODEL = CN()
_C.MODEL.TYPE = 'intern_vit_6b'  # 'timm' builds MODEL.NAME through timm
_C.MODEL.NAME = 'intern_vit_6b'
_C.MODEL.FACTORY = ''  # (new) 'package.module:function', called with the config; wins over TYPE
_C.MODEL.KWARGS = CN(new_allowed=True)  # (new) further keyword arguments for timm.create_model
_C.MODEL.PRETRAINED = ''
_C.MODEL.PRETRAINED_EMA = False  # (new) take the averaged weights of a tag or a checkpoint
_C.MODEL.PRETRAINED_RENAME = []  # (new) pairs of a regular expression and its replacement
# (new) Share of the model's parameters that must be in the checkpoint.
_C.MODEL.PRETRAINED_MIN_MATCH = 0.5
_C.MODEL.PRETRAINED_READERS = 'all'  # (new) or 'one': rank 0 reads, the others receive
_C.MODEL.RESUME = ''
# (new) Seconds within which a download of PRETRAINED or RESUME must bring 64 KiB more (10 MiB from
# the Hugging Face Hub), or its rest.
_C.MODEL.DOWNLOAD_TIMEOUT = 120
_C.MODEL.NUM_CLASSES = 1000
_C.MODEL.DROP_RATE = 0.0
_C.MODEL.DROP_PATH_RATE = 0.1
_C.MODEL.DROP_PATH_TYPE = 'linear'
_C.MODEL.LABEL_SMOOTHING = 0.1
# Sections of the original's own models: any key is accepted, so that its YAML files merge.
_C.MODEL.INTERN_VIT_6B = CN(new_allowed=True)
_C.MODEL.CLIP_VIT = CN(new_allowed=True)

_C.TRAIN = CN()
_C.TRAIN.START_EPOCH = 0
_C.TRAIN.EPOCHS = 300
_C.TRAIN.WARMUP_EPOCHS = 20
_C.TRAIN.WEIGHT_DECAY = 0.05
_C.TRAIN.BASE_LR = 5e-4  # for a batch of 512; the training program scales it linearly
_C.TRAIN.WARMUP_LR = 5e-7
_C.TRAIN.MIN_LR = 5e-6
_C.TRAIN.CLIP_GRAD = 5.0  # global L2 norm; 0 or None: no clipping
_C.TRAIN.AUTO_RESUME = True
_C.TRAIN.ACCUMULATION_STEPS = 0  # micro-batches per update; 0 and 1 mean none
# (new) Updates in a row that may be skipped for non-finite gradients before the run stops with an
# error; 0: no limit. More than 16, the halvings from the first loss scale to its minimum.
_C.TRAIN.MAX_CONSECUTIVE_OVERFLOWS = 25
# (new) The training program saves ckpt_epoch_overflow before that error.
_C.TRAIN.SAVE_ON_OVERFLOW = False
_C.TRAIN.USE_CHECKPOINT = False  # activation checkpointing
# (new) Save inside an epoch, as ckpt_epoch_E_step_S: every so many updates, and at the first update
# that ends so many minutes after the last save; 0: not.
_C.TRAIN.SAVE_STEPS = 0
_C.TRAIN.SAVE_MINUTES = 0.0
# (new) Exit status of a run that SIGTERM, SIGUSR1, SIGHUP or Ctrl-C (SIGINT) had save and stop; a
# second Ctrl-C, or one where nothing is trained yet, ends it at once with 130.
_C.TRAIN.PREEMPT_EXIT_CODE = 0
# (new) Print the traceback also of errors that this package raises on purpose (one line otherwise).
_C.TRAIN.TRACEBACK = False

_C.TRAIN.LR_SCHEDULER = CN()
_C.TRAIN.LR_SCHEDULER.NAME = 'cosine'  # cosine, linear, step
_C.TRAIN.LR_SCHEDULER.DECAY_EPOCHS = 30
_C.TRAIN.LR_SCHEDULER.DECAY_RATE = 0.1

_C.TRAIN.OPTIMIZER = CN()
_C.TRAIN.OPTIMIZER.NAME = 'adamw'
_C.TRAIN.OPTIMIZER.EPS = 1e-8
_C.TRAIN.OPTIMIZER.BETAS = (0.9, 0.999)
_C.TRAIN.OPTIMIZER.MOMENTUM = 0.9
_C.TRAIN.OPTIMIZER.USE_ZERO = False  # accepted and unused: the ds_config's ZeRO stage decides
_C.TRAIN.OPTIMIZER.FREEZE_BACKBONE = None  # True trains the head only; a list freezes levels.{i}
_C.TRAIN.OPTIMIZER.DCN_LR_MUL = None

_C.TRAIN.EMA = CN()
_C.TRAIN.EMA.ENABLE = False
_C.TRAIN.EMA.DECAY = 0.9998
_C.TRAIN.EMA.WARMUP = False  # (new) let the decay rise from 0, as timm's ModelEmaV3 does

_C.TRAIN.LR_LAYER_DECAY = False
_C.TRAIN.LR_LAYER_DECAY_RATIO = 0.875
_C.TRAIN.RAND_INIT_FT_HEAD = False

_C.AUG = CN()
_C.AUG.COLOR_JITTER = 0.4
_C.AUG.AUTO_AUGMENT = 'rand-m9-mstd0.5-inc1'
_C.AUG.REPROB = 0.25
_C.AUG.REMODE = 'pixel'
_C.AUG.RECOUNT = 1
_C.AUG.MIXUP = 0.8
_C.AUG.CUTMIX = 1.0
_C.AUG.CUTMIX_MINMAX = None
_C.AUG.MIXUP_PROB = 1.0
_C.AUG.MIXUP_SWITCH_PROB = 0.5
_C.AUG.MIXUP_MODE = 'batch'
_C.AUG.RANDOM_RESIZED_CROP = False
_C.AUG.HFLIP = 0.5  # (new) probability of a horizontal flip; 0 for characters and digits
_C.AUG.SCALE = (0.08, 1.0)  # (new) range of the random crop, as a share of the image's area
_C.AUG.MEAN = (0.485, 0.456, 0.406)
_C.AUG.STD = (0.229, 0.224, 0.225)

_C.TEST = CN()
_C.TEST.CROP = True
_C.TEST.SEQUENTIAL = False  # accepted and unused: every evaluation counts each image once

_C.CHECKPOINT = CN()  # (new)
# Seconds within which every rank must come to a save or a load before the missing are named.
_C.CHECKPOINT.RENDEZVOUS_TIMEOUT = 300
# Seconds that one rank may need longer than another to write, flush or read its files.
_C.CHECKPOINT.IO_TIMEOUT = 1800
# Save in the background: training waits only while the state is copied in memory.
_C.CHECKPOINT.ASYNC = False
# How many epoch tags stay for their accuracy, beside the newest SAVE_CKPT_NUM (0: none).
_C.CHECKPOINT.KEEP_BEST = 0
# Every epoch that this divides stays for good (0: none).
_C.CHECKPOINT.KEEP_EVERY = 0
# How many tags saved inside an epoch stay; the one saved last always does.
_C.CHECKPOINT.KEEP_STEPS = 1

# Let several jobs write into one OUTPUT, where tags, metrics and retention of all are then one.
_C.CHECKPOINT.SHARED_OUTPUT = False
# Seconds that a job waits for another one that still writes into its OUTPUT, before it is an error.
_C.CHECKPOINT.LOCK_WAIT = 0.0
# Seconds without a sign of life after which a job of another host, whose file locks cannot be seen,
# no longer holds OUTPUT.
_C.CHECKPOINT.LOCK_AGE = 60.0
# Seconds without a write after which a save of such a job was left by a dead one, and is removed.
_C.CHECKPOINT.LEFTOVER_AGE = 86400.0

_C.BENCH = CN()  # (new)
# Train so many updates, write how fast they were to OUTPUT/bench.json, and end without evaluating
# or saving anything; 0: train as usual. EVAL_MODE and THROUGHPUT_MODE come first.
_C.BENCH.UPDATES = 0
_C.BENCH.WARMUP = 3  # updates before them, which are not timed

_C.COMM = CN()  # (new)
# Seconds within which a collective must end, in every process group, and a batch be read.
_C.COMM.TIMEOUT = 1800
_C.COMM.INIT_TIMEOUT = 300  # seconds within which all ranks must have joined
_C.COMM.EXIT_TIMEOUT = 60  # seconds that an ending rank waits for what others still need of it
# Seconds after which a host that does not answer is taken for dead; a rank that ends is at once.
_C.COMM.DEAD_AFTER = 10
# Seconds without an answer after which a rank is called silent, which ends no wait.
_C.COMM.SILENT_AFTER = 4
_C.COMM.CONNECT_TIMEOUT = 3  # seconds for one try to reach an address
_C.COMM.ABORT_TIMEOUT = 5  # seconds that aborting an MPI job may take
_C.COMM.INTERFACE = ''  # the network interface of rank 0's address; '' finds one that works

# '' is the original flag's default, O1, and lets a ds_config that sets a precision decide.
_C.AMP_OPT_LEVEL = ''
_C.AMP_TYPE = 'float16'  # or 'bfloat16'
_C.OUTPUT = ''
_C.TAG = 'default'
_C.SAVE_FREQ = 1  # epochs; 0: after the last one only
_C.SAVE_CKPT_NUM = 1  # epoch tags kept; below 1: all
_C.PRINT_FREQ = 10  # micro-batches; 0: after the last one of an epoch only
_C.EVAL_FREQ = 1  # epochs; 0: after the last one only
_C.SEED = 0
_C.EVAL_MODE = False
_C.THROUGHPUT_MODE = False
_C.LOCAL_RANK = 0
_C.EVAL_22K_TO_1K = False

# Files that one configuration may consist of: each may name the others more than once.
_MOST_FILES = 100

# Flag of the training program (attribute of args) -> key that it sets.
_FLAGS = {
    'batch_size': 'DATA.BATCH_SIZE',
    'dataset': 'DATA.DATASET',
    'data_path': 'DATA.DATA_PATH',
    'zip': 'DATA.ZIP_MODE',
    'cache_mode': 'DATA.CACHE_MODE',
    'pretrained': 'MODEL.PRETRAINED',
    'resume': 'MODEL.RESUME',
    'accumulation_steps': 'TRAIN.ACCUMULATION_STEPS',
    'use_checkpoint': 'TRAIN.USE_CHECKPOINT',
    'amp_opt_level': 'AMP_OPT_LEVEL',
    'output': 'OUTPUT',
    'tag': 'TAG',
    'eval': 'EVAL_MODE',
    'throughput': 'THROUGHPUT_MODE',
    'save_ckpt_num': 'SAVE_CKPT_NUM',
    'use_zero': 'TRAIN.OPTIMIZER.USE_ZERO',
    'local_rank': 'LOCAL_RANK',
}


def default_config() -> CN:
    """Returns a fresh, unfrozen copy of the default tree."""
    return _C.clone()


def get_config(args: Namespace) -> CN:
    """Builds the configuration: defaults, the YAML file (and its BASE files), --opts, then flags.

    Args:
        args: ``args.cfg`` is a YAML path, or the name of one that ships in
            ``internvl_ds/config``; ``args.opts`` an optional flat list of KEY VALUE pairs; the
            other attributes are the training program's flags, applied where they are set.

    Returns:
        A frozen CfgNode. OUTPUT is ``<output>/<YAML stem>``, as in the original, with ``/<tag>``
        behind it when a tag other than 'default' is given.

    Raises:
        ConfigError: for a missing file, an unknown key (with the nearest known one), or a type
            that does not fit.
    """
    config = default_config()
    path = find_config_file(args.cfg)
    _merge_file(config, path, seen=(), files=[])
    opts = getattr(args, 'opts', None)
    if opts:
        merge_opts(config, opts)
    for flag, key in _FLAGS.items():
        value = getattr(args, flag, None)
        if value is not None and value is not False and value != '':
            _merge_tree(config, _nest(key, value), source=f'--{flag.replace("_", "-")}')
    config.OUTPUT = os.path.join(config.OUTPUT or 'output', path.stem)
    if config.TAG != 'default':
        config.OUTPUT = os.path.join(config.OUTPUT, config.TAG)
    config.freeze()
    return config


def find_config_file(name: str) -> Path:
    """Finds a YAML file by path, or by name among those that ship with the package."""
    shipped = Path(__file__).parent
    for candidate in (Path(name), shipped / name, shipped / f'{name}.yaml'):
        if os.path.exists(candidate) and not os.path.isdir(candidate):
            return candidate
    have = ', '.join(sorted(p.stem for p in shipped.glob('*.yaml')))
    raise ConfigError(f'--cfg {name}: no such file; configurations that ship by name: {have}')


def merge_opts(config: CN, opts: Sequence[str]) -> None:
    """Merges ``['A.B', 'value', ...]`` into an unfrozen config; values are parsed as YAML."""
    if len(opts) % 2:
        raise ConfigError(f'--opts takes KEY VALUE pairs, and {opts[-1]!r} has no value')
    for key, text in zip(opts[0::2], opts[1::2], strict=True):
        _merge_tree(config, _nest(key, _parse_opt(config, key, text)), source='--opts')


def checkpoint_option(config: CN, key: str) -> Any:
    """CHECKPOINT.``key`` of a tree that may lack it, as the original's trees do."""
    return get_option(config, f'CHECKPOINT.{key}', default_of(f'CHECKPOINT.{key}'))


def default_of(key: str) -> Any:
    """The default of a dotted key, None where there is none; the tree is not copied for it."""
    return get_option(_C, key, None)


def get_option(config: CN, key: str, default: Any) -> Any:
    """Reads a dotted key from any CfgNode; ``default`` where the key or its section is missing."""
    node: Any = config
    for part in key.split('.'):
        if not isinstance(node, Mapping) or part not in node:
            return default
        node = node[part]
    return node


def scale_lr(lr: float, images: int) -> float:
    """A learning rate of TRAIN, given for a batch of 512, for a whole batch of ``images``."""
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


def _merge_file(config: CN, path: Path, seen: tuple[Path, ...], files: list[Path]) -> None:
    resolved = path.resolve()
    files.append(path)
    if len(files) > _MOST_FILES:
        raise ConfigError(f'{files[0]}: its BASE files lead to more than {_MOST_FILES} files')
    if resolved in seen:
        chain = ' -> '.join(str(p) for p in (*seen, resolved))
        raise ConfigError(f'BASE files include each other in a circle: {chain}')
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
            _merge_file(config, base, (*seen, resolved), files)
    _merge_tree(config, tree, source=str(path))


def _merge_tree(config: CN, tree: Mapping[str, Any], source: str) -> None:
    known = set(_dotted_keys(config))
    fitted = _fit(config, tree, '', known, source)
    try:
        config.merge_from_other_cfg(CN(fitted))
    except (AssertionError, KeyError, ValueError, RecursionError, MemoryError) as error:
        reason = error.args[0] if error.args else type(error).__name__
        raise ConfigError(f'{source}: {reason}') from error


def _fit(node: CN, tree: Mapping[str, Any], prefix: str, known: set[str], source: str) -> dict:
    """Refuses unknown keys, and turns what YAML parsed into the type of the default it replaces."""
    fitted: dict[str, Any] = {}
    for key, value in tree.items():
        name = f'{prefix}{key}'
        if not isinstance(key, str):
            kind = type(key).__name__
            raise ConfigError(f'{source}: key {name[:200]} is a {kind} to YAML; quote it')
        if key not in node:
            if node.is_new_allowed():
                fitted[key] = value
                continue
            near = _nearest(name, known)
            hint = f'; the nearest known key is {near}' if near else ''
            raise ConfigError(f'{source}: unknown key {name[:200]}{hint}')
        default = node[key]
        if isinstance(default, CN):
            if not isinstance(value, Mapping):
                raise ConfigError(f'{source}: {name} is a section, not a value ({brief(value)})')
            fitted[key] = _fit(default, value, f'{name}.', known, source)
        elif isinstance(value, Mapping):
            raise ConfigError(f'{source}: {name} is a value ({default!r}), not a section')
        else:
            fitted[key] = _as_type_of(default, value, f'{source}: {name}')
    return fitted


def _as_type_of(default: Any, value: Any, where: str) -> Any:
    """Turns what YAML parsed into the default's type: 5e-4 and (1, 2) are text to it, 0 an int."""
    if isinstance(value, str):
        try:
            literal = CN._decode_cfg_value(value)
        except (RecursionError, MemoryError) as error:  # of Python's parser, of a strange text
            raise ConfigError(f'{where}: cannot be read as a value: {brief(value)}') from error
        if not isinstance(default, str):
            value = literal
        elif literal is not None:
            return repr(value)  # yacs takes text for a literal: so '7' stays what it is
        else:
            return None
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


def _nearest(name: str, known: set[str]) -> str | None:
    """The known key most like ``name``: by its whole path, else by its last part alone."""
    if len(name) > 100:
        return None
    whole = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    if whole:
        return whole[0]
    by_last = {key.rpartition('.')[2]: key for key in sorted(known, reverse=True)}
    last = difflib.get_close_matches(name.rpartition('.')[2], by_last, n=1, cutoff=0.6)
    return by_last[last[0]] if last else None


def _nest(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split('.')):
        value = {part: value}
    return value
