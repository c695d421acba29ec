"""The settings in which DeepSpeed 0.19.8 does wrong what this package cannot mend. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from internvl_ds.config.ds.diagnostics import Diagnostic, diagnostic
from internvl_ds.config.tree import value_at

NAMES_OF_DTYPE = {
    'fp16': ('fp16', 'float16', 'half', 'torch.float16'),
    'bf16': ('bf16', 'bfloat16', 'torch.bfloat16'),
}
# Switches that must stay on, as they are by default, and what happens otherwise.
_SWITCHES = {
    '/managed_gradient_accumulation': 'NativeScalerWithGradNormCount marks the boundary by its '
    'update_grad',
    '/bf16/check_grad_overflow': 'DeepSpeed then applies updates that are not finite',
    '/zero_optimization/compute_grad_norm': 'there is no gradient norm then to report, to clip '
    'by, or to skip a non-finite update by',
}


# The first version of DeepSpeed that does them right.
_MENDED = '0.19.8'
# As setup.cfg says; pip only warns of a conflict with another package.
SUPPORTED = SpecifierSet(
    '>=0.17.6,!=0.18.0,!=0.18.1,!=0.18.2,!=0.18.3,!=0.18.4,!=0.18.5,!=0.18.6,!=0.18.7,!=0.18.8'
)


def unsupported_settings(
    tree: Mapping[str, Any], low: str | None, optimizer: bool = True, version: str = _MENDED
) -> Iterator[Diagnostic]:
    """What DeepSpeed steps, clips or reports wrongly, and this package cannot mend.

    Args:
        tree: a ds_config in which what is left out has DeepSpeed's default.
        low: 'fp16' or 'bf16' where that engine trains, else None.
        optimizer: whether an /optimizer section would be used.
        version: of DeepSpeed.
    """
    if not SUPPORTED.contains(version, prereleases=True):
        yield diagnostic(
            '',
            f'DeepSpeed {version} trains some settings wrongly, in silence, and this package mends '
            'only what 0.17.6, 0.18.9 and later ones do: install deepspeed>=0.18.9',
        )
    old = Version(version) < Version(_MENDED)
    if old:
        yield from _unsupported_before(tree, version)
    for pointer, otherwise in _SWITCHES.items():
        block, *rest = pointer.split('/')[1:]
        if not value_at(tree, block, *rest, default=True) and (block != 'bf16' or low == block):
            yield diagnostic(pointer, f'{pointer} is false: {otherwise}; remove the key')
    for name in ('offload_optimizer', 'offload_param'):
        if value_at(tree, 'zero_optimization', name, 'device') == 'nvme':
            yield diagnostic(
                f'/zero_optimization/{name}/device',
                f'/zero_optimization/{name}/device is "nvme": DeepSpeed goes on from a checkpoint '
                'of that with other state than it has saved; set "cpu"',
            )
    stage = value_at(tree, 'zero_optimization', 'stage', default=0)
    dtype = value_at(tree, 'data_types', 'grad_accum_dtype')
    other = dtype not in (None, 'auto', *NAMES_OF_DTYPE.get(str(low), ()))
    cells = {(0, 'fp16'), (0, 'bf16'), (1, 'bf16'), *([(1, 'fp16')] if old else [])}
    if other and (stage, low) in cells:
        yield diagnostic(
            '/data_types/grad_accum_dtype',
            f'/data_types/grad_accum_dtype {dtype} with {low} at ZeRO stage {stage} is not '
            'supported by this version; use stage 2, or remove the key',
        )
    if low and stage == 0 and optimizer and 'optimizer' in tree:
        yield diagnostic(
            '/optimizer',
            f'the /optimizer section with {low} at ZeRO stage 0 is not supported by this version; '
            'pass a torch optimizer to initialize, or use stage 1',
        )


def _unsupported_before(tree: Mapping[str, Any], version: str) -> Iterator[Diagnostic]:
    """What only earlier versions do wrong (seen in 0.17.6 and 0.18.9)."""
    remedy = f'with DeepSpeed {version}: install deepspeed>={_MENDED}, or leave it out'
    block, name = 'zero_optimization', 'offload_optimizer'
    if value_at(tree, block, name, 'device', default='none') not in (None, 'none'):
        yield diagnostic(
            f'/{block}/{name}',
            f'/{block}/{name} loses gradients of accumulated micro-batches {remedy}',
        )
    if value_at(tree, block, 'contiguous_gradients', default=True) is False:
        yield diagnostic(
            f'/{block}/contiguous_gradients',
            f'/{block}/contiguous_gradients false leaves gradients unreduced on CPUs {remedy}',
        )
    for name in ('stage3_use_all_reduce_for_fetch_params', 'use_all_reduce_for_fetch_params'):
        if value_at(tree, block, name):
            yield diagnostic(f'/{block}/{name}', f'/{block}/{name} gathers other weights {remedy}')
