"""Makes operations on tensors without data keep and cast what they would on a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from internvl_ds.zero.wrapper import replaced

# Operations that torch.autocast computes in float32 on CUDA, and models of images use (torch's
# documentation, "CUDA Ops that autocast to float32"). On the CPU it leaves them as they are.
_IN_FLOAT32 = (
    'cosine_similarity', 'cross_entropy', 'cumsum', 'exp', 'group_norm', 'layer_norm', 'log',
    'log_softmax', 'norm', 'normalize', 'pow', 'prod', 'rms_norm', 'rsqrt', 'softmax', 'softplus',
    'sum',
)  # fmt: skip
_FUNCTIONS: tuple[Any, ...] = (torch, torch.nn.functional, torch.Tensor)


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Attention is one kernel, also with dropout or a bias, and autocast's list is CUDA's.

    No TorchFunctionMode: in a backward pass, which may compute a forward again, it would be off.
    """
    with ExitStack() as stack:
        for owner in _FUNCTIONS:
            for name in _IN_FLOAT32:
                if hasattr(owner, name):
                    function = _in_float32(getattr(owner, name))
                    stack.enter_context(replaced(owner, name, function))
        attend = 'scaled_dot_product_attention'
        stack.enter_context(replaced(torch.nn.functional, attend, _attention))
        yield


def _in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def computes(*args: Any, **kwargs: Any) -> Any:
        if torch.is_autocast_enabled('cpu'):
            args, kwargs = tree_map_only(torch.Tensor, _widened, (args, kwargs))
        return function(*args, **kwargs)

    return computes


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    low = tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.float() if low else tensor


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *_: Any,
    **__: Any,
) -> torch.Tensor:
    tensors = [query, key, value]
    if torch.is_autocast_enabled('cpu'):
        tensors = [tensor.to(torch.get_autocast_dtype('cpu')) for tensor in tensors]
    return _FusedAttention.apply(*tensors, attn_mask)


class _FusedAttention(torch.autograd.Function):
    """What torch's flash and memory-efficient attention keep: no matrix of all pairs of tokens."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, mask: Any) -> torch.Tensor:
        *batch, heads, tokens, _ = (1, *query.shape) if query.dim() < 4 else query.shape
        # Laid out by token, so that the heads of one are put together without a copy.
        out = query.new_empty((*batch, tokens, heads, value.shape[-1])).transpose(-3, -2)
        out = out.view(*query.shape[:-1], value.shape[-1])
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)  # log of each row's sum
        ctx.save_for_backward(query, key, value, out, sums, mask)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        *inputs, _, sums, mask = ctx.saved_tensors
        rows = torch.empty_like(sums)  # of the gradient times the output
        gradients = [torch.empty_like(tensor) for tensor in inputs]
        del rows
        needs_mask = mask is not None and ctx.needs_input_grad[3]
        return *gradients, torch.empty_like(mask) if needs_mask else None
