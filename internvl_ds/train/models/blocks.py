"""The layers of InternViT's transformer. Names and shapes are the published ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.layers import DropPath
from torch import nn

from internvl_ds.train.models.pooling import attend, require_heads, split_heads


class RMSNorm(nn.Module):
    """Divides by the root mean square over the last dimension, which is computed in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * (wide * scale).to(x.dtype)


def norm_of(kind: str, width: int) -> nn.Module:
    """The norm that NORM_TYPE names: 'rms' or 'ln'."""
    return RMSNorm(width) if kind == 'rms' else nn.LayerNorm(width, eps=1e-6)


@dataclass(frozen=True)
class BlockOptions:
    """The options that all blocks of a model share.

    Attributes:
        norm: 'rms' or 'ln'.
        hidden: width of the MLP between its two layers.
        layer_scale: its first value; 0 for none.
        qk_norm: whether queries and keys are normalized, over the width of all heads together.
    """

    width: int
    heads: int
    hidden: int
    norm: str
    qkv_bias: bool
    qk_norm: bool
    layer_scale: float


class Block(nn.Module):
    """Attention and an MLP, each behind a norm and in front of a layer scale and a drop path."""

    def __init__(self, options: BlockOptions, drop_path: float) -> None:
        super().__init__()
        width = options.width
        self.norm1 = norm_of(options.norm, width)
        self.attn = _Attention(options)
        self.ls1 = _scale(options)
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = norm_of(options.norm, width)
        self.mlp = _Mlp(width, options.hidden)
        self.ls2 = _scale(options)
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class _Attention(nn.Module):
    def __init__(self, options: BlockOptions) -> None:
        super().__init__()
        width = options.width
        require_heads(width, options.heads, 'attention')
        self.heads = options.heads
        self.qkv = nn.Linear(width, 3 * width, bias=options.qkv_bias)
        self.proj = nn.Linear(width, width)
        self.q_norm = norm_of(options.norm, width) if options.qk_norm else nn.Identity()
        self.k_norm = norm_of(options.norm, width) if options.qk_norm else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k = self.q_norm(q), self.k_norm(k)
        out: torch.Tensor = self.proj(attend(*(split_heads(t, self.heads) for t in (q, k, v))))
        return out


class _LayerScale(nn.Module):
    """Under autocast ``gamma`` is float32, and so is the product: the blocks' sum with it."""

    def __init__(self, width: int, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), float(value)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


def _scale(options: BlockOptions) -> nn.Module:
    return _LayerScale(options.width, options.layer_scale) if options.layer_scale else nn.Identity()


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc2(self.act(self.fc1(x)))
        return out
