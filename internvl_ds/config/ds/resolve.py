"""ds_config JSON: load it, and resolve it against the yacs config. Pure; no process group.

A value that both files state must agree. Where the yacs value is left at its default an explicit
value in the JSON wins; 'auto' or an absent field takes the yacs value.
"""

from __future__ import annotations

import copy
import difflib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from internvl_ds.config.ds.auto_values import (
    BUCKETS,
    DEFAULT,
    Filling,
    fill_buckets,
    fill_optimizer,
    fill_scheduler,
)
from internvl_ds.config.tree import default_config, default_of, get_option, set_options
from internvl_ds.errors import ConfigError, few
from internvl_ds.files.reading import parse_json, read_text

FP32, FP16, BF16 = 'fp32', 'fp16', 'bf16'
AUTOCAST_FP16, AUTOCAST_BF16 = 'torch_autocast float16', 'torch_autocast bfloat16'

# The loss scale of torch's GradScaler, in DeepSpeed's words, where the JSON leaves it open.
_GRAD_SCALER = {
    'loss_scale': 0,
    'initial_scale_power': 16,
    'loss_scale_window': 2000,
    'hysteresis': 1,
    'min_loss_scale': 1,
}

# Switches of a block that need ZeRO stage 1, 2 or 3.
OF_PARTITIONED_UPDATES = (
    ('fp16', 'fp16_master_weights_and_grads'),
    ('bf16', 'bf16_master_weights_and_grads'),
    ('bf16', 'bf16_optimizer_states'),
)

_JSON_BYTES = 1 << 20
_BLOCKS = ('fp16', 'bf16', 'torch_autocast')


def shipped_dir() -> Path:
    """The directory of the ds_configs that ship: inside the wheel, or beside the source."""
    package = Path(__file__).parents[2]
    installed = package / 'ds_configs'
    return installed if installed.is_dir() else package.parent / 'ds_configs'


def load_ds_config(source: str | Path | Mapping[str, Any] | None) -> dict[str, Any]:
    """Reads a ds_config.

    Args:
        source: a JSON path, the name of a shipped one (``zero2`` or ``zero2.json``), a mapping
            (copied, never changed), or None for an empty one.

    Raises:
        ConfigError: when the file is missing, is no JSON object, or states a key twice.
    """
    if source is None:
        return {}
    if isinstance(source, Mapping):
        return copy.deepcopy(dict(source))
    path = _find(source)

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = sorted(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
        if twice:
            raise ConfigError(f'{path}: key stated twice: {few(twice)}')
        return dict(pairs)

    try:
        tree = parse_json(read_text(path, _JSON_BYTES), no_duplicates)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f'{path}: cannot be read as JSON: {error}') from error
    if not isinstance(tree, dict):
        raise ConfigError(f'{path}: holds a {type(tree).__name__}, not a JSON object')
    return tree


def resolve(
    ds_config: Mapping[str, Any], config: CfgNode, world_size: int, trained: int | None = None
) -> dict[str, Any]:
    """Fills what the JSON leaves open from the yacs config, and checks what both state.

    Args:
        ds_config: as `load_ds_config` returned it; not changed.
        config: the yacs tree, or one with fewer keys.
        world_size: the number of data-parallel ranks.
        trained: how many elements the trained parameters have. None, where there is no model yet,
            leaves bucket sizes open.

    Returns:
        A ds_config with batch sizes, clipping and precision stated, and without any 'auto' but
        those that DeepSpeed itself reads, and bucket sizes where ``trained`` is None.

    Raises:
        ConfigError: names the JSON key and the yacs key that disagree, and both values.
    """
    return resolve_with_origins(ds_config, config, world_size, trained)[0]


def resolve_with_origins(
    ds_config: Mapping[str, Any], config: CfgNode, world_size: int, trained: int | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """As `resolve`, and where each value comes from: its JSON pointer -> a few words."""
    filling = Filling(ds_config)
    micro = int(_number(filling, 'train_micro_batch_size_per_gpu', config, 'DATA.BATCH_SIZE'))
    steps = int(_number(filling, 'gradient_accumulation_steps', config, 'TRAIN.ACCUMULATION_STEPS'))
    steps = max(1, steps)
    filling.put('/train_micro_batch_size_per_gpu', micro, 'DATA.BATCH_SIZE')
    filling.put('/gradient_accumulation_steps', steps, 'TRAIN.ACCUMULATION_STEPS')
    total = filling.stated('/train_batch_size')
    if total is not None and total != micro * steps * world_size:
        raise ConfigError(
            f'/train_batch_size is {total}, but {micro} images a micro-batch x {steps} '
            f'accumulation steps x {world_size} ranks = {micro * steps * world_size}; '
            "set it to 'auto' to have it computed"
        )
    product = f'{micro} images x {steps} accumulation steps x {world_size} ranks'
    filling.put('/train_batch_size', micro * steps * world_size, product)
    clip = _number(filling, 'gradient_clipping', config, 'TRAIN.CLIP_GRAD')
    filling.put('/gradient_clipping', float(clip), 'TRAIN.CLIP_GRAD')
    filling.fill('/zero_optimization/stage', 0, DEFAULT)
    _set_precision(filling, precision(filling.tree, config))
    fill_optimizer(filling, config, micro * steps * world_size)
    fill_scheduler(filling, config, micro * steps * world_size)
    fill_buckets(filling, trained)
    filling.fill(
        '/zero_allow_untested_optimizer',
        True,
        "internvl_ds: timm's optimizers and SGD are meant under ZeRO",
    )
    open_still = BUCKETS if trained is None else ()
    left = [p for p in filling.autos() if p not in open_still and not _is_default_auto(p)]
    if left:
        raise ConfigError(
            f"{', '.join(left)}: 'auto' has no counterpart in the yacs config; give a value, or "
            "leave the key out for DeepSpeed's default"
        )
    return filling.tree, filling.origins


def adopt(config: CfgNode, resolved: Mapping[str, Any]) -> None:
    """Writes into the yacs config what the JSON decided, so that loop and engine agree."""
    set_options(
        config,
        {
            'DATA.BATCH_SIZE': resolved['train_micro_batch_size_per_gpu'],
            'TRAIN.ACCUMULATION_STEPS': resolved['gradient_accumulation_steps'],
            'TRAIN.CLIP_GRAD': resolved['gradient_clipping'],
        },
    )


def for_inference(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """The ds_config of an engine without an optimizer, of one that `resolve` returned.

    At stages 1 and 2 there is nothing to partition then, and DeepSpeed refuses to try; what belongs
    to updates goes too.
    """
    tree = copy.deepcopy(dict(resolved))
    for key in ('optimizer', 'scheduler', 'prescale_gradients', 'gradient_predivide_factor'):
        tree.pop(key, None)
    if tree['zero_optimization']['stage'] in (1, 2):
        tree['zero_optimization'] = {'stage': 0}
        tree.get('data_types', {}).pop('grad_accum_dtype', None)
        for block, key in OF_PARTITIONED_UPDATES:
            tree.get(block, {}).pop(key, None)
    return tree


def precision(ds_config: Mapping[str, Any], config: CfgNode) -> str:
    """The precision that JSON and yacs config agree on: one of this module's five constants.

    AMP_OPT_LEVEL O0 is fp32, O1 torch_autocast with AMP_TYPE, O2 the fp16 or bf16 engine; left at
    '' it is O1, the original's default, unless the JSON says otherwise.

    Raises:
        ConfigError: when JSON and yacs config contradict each other, or the JSON itself.
    """
    level = get_option(config, 'AMP_OPT_LEVEL', '')
    amp_type = get_option(config, 'AMP_TYPE', 'float16')
    if level not in ('', 'O0', 'O1', 'O2'):
        raise ConfigError(f'AMP_OPT_LEVEL is {level!r}; it can be O0, O1 or O2')
    if amp_type not in ('float16', 'bfloat16'):
        raise ConfigError(f"AMP_TYPE is {amp_type!r}; it can be 'float16' or 'bfloat16'")
    asked = _from_yacs(level, amp_type)
    stated = _from_json(ds_config)
    if stated is None:
        switched_off = _BLOCK_OF.get(asked)
        if switched_off and _enabled(ds_config, switched_off) is False:
            raise ConfigError(
                f'AMP_OPT_LEVEL {level!r} with AMP_TYPE {amp_type} asks for {asked}, but '
                f'/{switched_off}/enabled is false in the ds_config'
            )
        return asked
    # A yacs value left at its default gives way: the level '', and the type float16.
    allowed = {asked}
    if level == '':
        allowed.add(stated)
    elif amp_type == 'float16':
        allowed.add(_from_yacs(level, 'bfloat16'))
    if stated not in allowed:
        raise ConfigError(
            f'the ds_config states {stated}, but AMP_OPT_LEVEL {level!r} with AMP_TYPE {amp_type} '
            f'asks for {asked}; change one of the two'
        )
    return stated


def precision_of(resolved: Any) -> str:
    """The precision that a resolved ds_config trains in, where what it leaves out is off."""
    tree = resolved if isinstance(resolved, Mapping) else {}
    return precision(
        {**{b: {'enabled': False} for b in ('fp16', 'bf16', 'torch_autocast')}, **tree},
        _DEFAULTS,
    )


_DEFAULTS = default_config()
_BLOCK_OF = {
    FP16: 'fp16',
    BF16: 'bf16',
    AUTOCAST_FP16: 'torch_autocast',
    AUTOCAST_BF16: 'torch_autocast',
}


def _from_yacs(level: str, amp_type: str) -> str:
    if level == 'O0':
        return FP32
    if level == 'O2':
        return BF16 if amp_type == 'bfloat16' else FP16
    return AUTOCAST_BF16 if amp_type == 'bfloat16' else AUTOCAST_FP16


def _from_json(ds_config: Mapping[str, Any]) -> str | None:
    """What the JSON states of precision; None where it leaves that to the yacs config."""
    flags = {block: _enabled(ds_config, block) for block in _BLOCKS}
    on = [block for block, flag in flags.items() if flag is True]
    if len(on) > 1:
        raise ConfigError('enabled together in the ds_config: ' + ' and '.join(f'/{b}' for b in on))
    if not on:
        return FP32 if all(flag is False for flag in flags.values()) else None
    if on[0] == 'torch_autocast':
        dtype = ds_config['torch_autocast'].get('dtype', 'bfloat16')
        return AUTOCAST_FP16 if dtype in ('float16', 'fp16', 'half') else AUTOCAST_BF16
    return FP16 if on[0] == 'fp16' else BF16


def _enabled(ds_config: Mapping[str, Any], block: str) -> bool | None:
    """True or False where the JSON says so; None for 'auto' or no such block."""
    if block not in ds_config:
        return None
    flag = ds_config[block].get('enabled', False)
    return None if flag == 'auto' else bool(flag)


def _set_precision(filling: Filling, mode: str) -> None:
    asked = 'AMP_OPT_LEVEL and AMP_TYPE'
    for block in _BLOCKS:
        if block in filling.tree or _BLOCK_OF.get(mode) == block:
            filling.put(f'/{block}/enabled', _BLOCK_OF.get(mode) == block, asked)
    if mode in (FP16, AUTOCAST_FP16):
        # DeepSpeed reads these for torch autocast too, where the section is not enabled.
        filling.fill('/fp16/enabled', False, asked)
        for key, value in _GRAD_SCALER.items():
            filling.fill(f'/fp16/{key}', value, "torch's GradScaler")
    if mode in (AUTOCAST_FP16, AUTOCAST_BF16):
        dtype = 'float16' if mode == AUTOCAST_FP16 else 'bfloat16'
        filling.put('/torch_autocast/dtype', dtype, asked)


def _number(filling: Filling, json_key: str, config: CfgNode, key: str) -> float:
    """One number that both files may state."""
    default = default_of(key)
    wanted = get_option(config, key, default) or 0
    stated = filling.stated(f'/{json_key}')
    if stated is None:
        return wanted
    if isinstance(stated, bool) or not isinstance(stated, int | float):
        raise ConfigError(f'/{json_key} is {stated!r}; it must be a number or "auto"')
    neutral = {0, 1} if key == 'TRAIN.ACCUMULATION_STEPS' else {0}
    same = stated == wanted or {stated, wanted} <= neutral
    if not same and wanted != default:
        raise ConfigError(
            f'/{json_key} is {stated} in the ds_config, but {key} is {wanted}; make them agree, '
            "or set the JSON's to 'auto'"
        )
    return stated


def _is_default_auto(pointer: str) -> bool:
    """Whether DeepSpeed itself reads 'auto' there, by default."""
    from internvl_ds.config.ds.schema import find, installed

    key = find(installed(), pointer.split('/')[1:])
    return key is not None and key.default == 'auto'


def _find(source: str | Path) -> Path:
    shipped = shipped_dir()
    for candidate in (Path(source), shipped / source, shipped / f'{source}.json'):
        try:
            if candidate.exists() and not candidate.is_dir():
                return candidate
        except OSError as error:  # a name that is too long
            raise ConfigError(f'ds_config {str(source)[:60]}...: {error.strerror}') from error
    names = sorted(p.stem for p in shipped.glob('*.json'))
    near = difflib.get_close_matches(Path(source).stem, names, n=4, cutoff=0.5) or names
    raise ConfigError(
        f'ds_config {source}: no such file, and none ships by that name; near it: {", ".join(near)}'
    )
