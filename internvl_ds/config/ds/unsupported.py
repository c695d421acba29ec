"""The settings in which DeepSpeed 0.19.8 does wrong what this package cannot mend. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from internvl_ds.config.ds.diagnostics import Diagnostic, diagnostic, value_at

NAMES_OF_DTYPE = {
    'fp16': ('fp16', 'float16', 'half', 'torch.float16'),
    'bf16': ('bf16', 'bfloat16', 'torch.bfloat16'),
}


def unsupported_settings(
    tree: Mapping[str, Any], low: str | None, optimizer: bool = True
) -> Iterator[Diagnostic]:
    """What DeepSpeed 0.19.8 steps, clips or reports wrongly, and this package cannot mend.

    Args:
        tree: a ds_config in which what is left out has DeepSpeed's default.
        low: 'fp16' or 'bf16' where that engine trains, else None.
        optimizer: whether an /optimizer section would be used.
    """
    zero = tree.get('zero_optimization', {})
    stage = zero.get('stage', 0)
    if not tree.get('managed_gradient_accumulation', True):
        yield diagnostic(
            '/managed_gradient_accumulation',
            '/managed_gradient_accumulation is false: NativeScalerWithGradNormCount marks the '
            'boundary by its update_grad; remove the key',
        )
    if low == 'bf16' and not value_at(tree, 'bf16', 'check_grad_overflow', default=True):
        yield diagnostic(
            '/bf16/check_grad_overflow',
            '/bf16/check_grad_overflow is false: DeepSpeed then applies updates that are not '
            'finite; remove the key',
        )
    if not zero.get('compute_grad_norm', True):
        yield diagnostic(
            '/zero_optimization/compute_grad_norm',
            '/zero_optimization/compute_grad_norm is false: there is no gradient norm then to '
            'report, to clip by, or to skip a non-finite update by; remove the key',
        )
    dtype = value_at(tree, 'data_types', 'grad_accum_dtype')
    other = dtype not in (None, 'auto', *NAMES_OF_DTYPE.get(str(low), ()))
    if other and (stage, low) in ((0, 'fp16'), (0, 'bf16'), (1, 'bf16')):
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
