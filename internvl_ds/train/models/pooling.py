"""Attention pooling: the mean of all tokens asks them, and one vector comes out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from internvl_ds.errors import ConfigError


class AttentionPooling(nn.Module):
    """(images, tokens, width) -> (images, out). Names and shapes are the published ones."""

    def __init__(self, width: int, heads: int, out: int) -> None:
        super().__init__()
        self.norm1_q = nn.LayerNorm(width)
        self.norm1_k = nn.LayerNorm(width)
        self.norm1_v = nn.LayerNorm(width)
        self.cross_attn = _CrossAttention(width, heads, out)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        mean = tokens.mean(1, keepdim=True)
        query, keys, values = self.norm1_q(mean), self.norm1_k(tokens), self.norm1_v(tokens)
        pooled: torch.Tensor = self.cross_attn(query, keys, values)
        return pooled.squeeze(1)


class _CrossAttention(nn.Module):
    def __init__(self, width: int, heads: int, out: int) -> None:
        super().__init__()
        require_heads(width, heads, 'attention pooling')
        self.heads = heads
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.k_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.q = _Projection(width, width, bias=False)
        self.k = _Projection(width, width, bias=False)
        self.v = _Projection(width, width, bias=False)
        self.proj = nn.Linear(width, out)

    def forward(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        q = split_heads(self.q(query, self.q_bias), self.heads)
        k = split_heads(self.k(keys, self.k_bias), self.heads)
        v = split_heads(self.v(values, self.v_bias), self.heads)
        out: torch.Tensor = self.proj(attend(q, k, v))
        return out


class _Projection(nn.Linear):
    """A linear layer whose bias is a parameter of another module."""

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return F.linear(x, self.weight, bias)


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(images, tokens, width) -> (images, heads, tokens, width / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention of (images, heads, tokens, width of a head) -> (images, tokens, width).

    Under autocast a norm may have left queries and keys in float32: they get the values' dtype.
    """
    out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
    return out.transpose(1, 2).flatten(2)


def require_heads(width: int, heads: int, what: str) -> None:
    """Refuses a width that cannot be divided among the heads.

    Raises:
        ConfigError: names both.
    """
    if width % heads:
        raise ConfigError(f'{what}: a width of {width} cannot be divided among {heads} heads')
