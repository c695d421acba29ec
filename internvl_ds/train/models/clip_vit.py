"""The image tower of CLIP (MODEL.TYPE ``clip_vit``), in plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from internvl_ds.train.models.pooling import attend, require_heads, split_heads
from internvl_ds.train.models.probe import CLS_PATCH_CONCAT, Probe, lr_ratios


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """OpenAI's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


@dataclass(frozen=True)
class ClipOptions:
    """The sizes of the tower; ``side`` and ``patch`` in pixels, ``hidden`` is the MLP's width."""

    side: int
    patch: int
    width: int
    heads: int
    hidden: int
    depth: int


class ClipViT(Probe):
    """CLIP's image tower, its last block's tokens; names, shapes and order are transformers'."""

    def __init__(
        self, options: ClipOptions, *, freeze: bool, cls_target: str, classes: int
    ) -> None:
        """Makes random weights, on torch's default device; see `Probe`."""
        super().__init__(options.width, cls_target)
        self.depth, self.heads = options.depth, options.heads
        self.model = _VisionTower(options)
        width = options.width
        features = 2 * width if cls_target == CLS_PATCH_CONCAT else width
        self.add_head(freeze, features, options.heads, classes)
        # The probe takes the tokens before it: a gradient never comes.
        self.model.post_layernorm.requires_grad_(False)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """See `Probe`."""
        tokens = self.model.pre_layrnorm(self.model.embeddings(images))
        return self.through(self.model.encoder.layers, tokens)

    def lr_decay_keywords(self, decay_ratio: float = 0.95) -> dict[str, float]:
        """See `lr_ratios`; the head and the class token have no entry, as in the original."""
        stem = ('patch_embedding', 'position_embedding', 'pre_layrnorm')
        return lr_ratios('layers.{}.', self.depth, stem, decay_ratio)


class _VisionTower(nn.Module):
    """transformers' names, its misspelt ``pre_layrnorm`` with them."""

    def __init__(self, options: ClipOptions) -> None:
        super().__init__()
        self.embeddings = _Embeddings(options)
        self.pre_layrnorm = nn.LayerNorm(options.width)
        self.encoder = _Encoder(options)
        self.post_layernorm = nn.LayerNorm(options.width)


class _Embeddings(nn.Module):
    def __init__(self, options: ClipOptions) -> None:
        super().__init__()
        width, patch = options.width, options.patch
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.patch_embedding = nn.Conv2d(3, width, patch, patch, bias=False)
        self.position_embedding = _Table((options.side // patch) ** 2 + 1, width)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embedding(images.to(self.class_embedding.dtype))
        patches = patches.flatten(2).transpose(1, 2)
        token = self.class_embedding.expand(patches.shape[0], 1, -1)
        out: torch.Tensor = self.position_embedding(torch.cat((token, patches), 1))
        return out


class _Table(nn.Module):
    """A vector to add to each token."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(tokens, width) * width**-0.5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens + self.weight


class _Encoder(nn.Module):
    def __init__(self, options: ClipOptions) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(options) for _ in range(options.depth))


class _Layer(nn.Module):
    def __init__(self, options: ClipOptions) -> None:
        super().__init__()
        self.self_attn = _Attention(options.width, options.heads)
        self.layer_norm1 = nn.LayerNorm(options.width)
        self.mlp = _Mlp(options.width, options.hidden)
        self.layer_norm2 = nn.LayerNorm(options.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        require_heads(width, heads, 'attention')
        self.heads = heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        out: torch.Tensor = self.out_proj(attend(*(split_heads(t, self.heads) for t in (q, k, v))))
        return out


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc2(_quick_gelu(self.fc1(x)))
        return out
