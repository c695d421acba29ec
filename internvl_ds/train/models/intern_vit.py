"""InternViT-6B (MODEL.TYPE ``intern_vit_6b``), of any depth and width."""

from __future__ import annotations

import torch
from torch import nn

from internvl_ds.train.models.blocks import Block, BlockOptions
from internvl_ds.train.models.pooling import AttentionPooling
from internvl_ds.train.models.probe import CLIP_PROJECTOR, CLS_PATCH_CONCAT, Probe, lr_ratios

_CLIP_WIDTH, _CLIP_HEADS = 768, 16  # of the published clip_projector


class PatchEmbed(nn.Module):
    """(images, 3, side, side) -> (images, patches, width).

    Attributes:
        grid_size: rows and columns of patches.
    """

    def __init__(self, side: int, patch: int, width: int) -> None:
        super().__init__()
        self.grid_size = (side // patch, side // patch)
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        grid: torch.Tensor = self.proj(images)
        return grid.flatten(2).transpose(1, 2)


class InternViT(Probe):
    """Patches and a class token through RMS- or layer-normalized blocks; no norm after the last.

    Parameter names and shapes are the published ones, and so is their order.
    """

    num_prefix_tokens = 1  # before the grid of pos_embed, for load_pretrained

    def __init__(
        self,
        options: BlockOptions,
        *,
        side: int,
        patch: int,
        depth: int,
        drop_path: float,
        freeze: bool,
        cls_target: str,
        classes: int,
    ) -> None:
        """Makes random weights, on torch's default device.

        Args:
            side: of the images, pixels.
            patch: side of a patch, pixels.
            drop_path: of the last block; it rises evenly from 0 at the first.
            freeze, cls_target, classes: as for `Probe`.
        """
        super().__init__(options.width, cls_target)
        width, self.depth = options.width, depth
        patch_embed = PatchEmbed(side, patch, width)
        rows, columns = patch_embed.grid_size
        self.pos_embed = nn.Parameter(torch.zeros(1, rows * columns + 1, width))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embed = patch_embed
        rates = torch.linspace(0, drop_path, depth, device='cpu').tolist()
        self.blocks = nn.ModuleList(Block(options, rate) for rate in rates)
        if cls_target == CLIP_PROJECTOR:
            self.clip_projector = AttentionPooling(width, _CLIP_HEADS, _CLIP_WIDTH)
        features = {CLS_PATCH_CONCAT: 2 * width, CLIP_PROJECTOR: _CLIP_WIDTH}.get(cls_target, width)
        self.add_head(freeze, features, options.heads, classes)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """See `Probe`."""
        patches = self.patch_embed(images.to(self.pos_embed.dtype))
        token = self.cls_token.expand(patches.shape[0], -1, -1)
        return self.through(self.blocks, torch.cat((token, patches), 1) + self.pos_embed)

    def lr_decay_keywords(self, decay_ratio: float = 0.95) -> dict[str, float]:
        """See `lr_ratios`; the head has no entry."""
        stem = ('patch_embed', 'pos_embed', 'cls_token')
        return lr_ratios('blocks.{}.', self.depth, stem, decay_ratio)
