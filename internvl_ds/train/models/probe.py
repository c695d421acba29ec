"""A backbone under the head of a probe: features of all tokens, pooled, normalized, classified."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from internvl_ds.train.models.batch_norm import SyncBatchNorm
from internvl_ds.train.models.pooling import AttentionPooling

CLS_PATCH_CONCAT, ATTENTION_POOLING, CLIP_PROJECTOR = (
    'cls_patch_concat', 'attention_pooling', 'clip_projector',
)  # fmt: skip


class Probe(nn.Module):
    """The base of the original's models; a subclass makes its backbone, then calls `add_head`.

    ``train()`` puts all of it in training mode, as in the original: the head's batch norm learns
    its running statistics, and MODEL.DROP_PATH_RATE drops paths of a frozen backbone too.

    Attributes:
        cls_target: how tokens become one vector.
        num_features: width of the backbone.
        backbone_keys: of the state dict; the others are the head's.
        given_by_backbone: those that the file of the backbone's PRETRAINED gave. A checkpoint of
            the head alone may lack them.
        frozen: whether the backbone is.
    """

    def __init__(self, width: int, cls_target: str) -> None:
        super().__init__()
        self.num_features, self.cls_target = width, cls_target
        self.backbone_keys: tuple[str, ...] = ()
        self.given_by_backbone: frozenset[str] = frozenset()
        self.frozen = False
        self._recomputes = False

    def add_head(self, freeze: bool, features: int, heads: int, classes: int) -> None:
        """Ends the construction: what there is becomes the backbone, and the head comes after it.

        Args:
            freeze: whether the backbone is not to be trained.
            features: width of the pooled vector.
            heads: of attention pooling.
            classes: 0 leaves the classifier out.
        """
        self.backbone_keys, self.frozen = tuple(self.state_dict(keep_vars=True)), freeze
        if freeze:
            self.requires_grad_(False)
        if self.cls_target == ATTENTION_POOLING:
            self.attn_pooling = AttentionPooling(self.num_features, heads, features)
        self.norm = SyncBatchNorm(features)
        self.head = _Head(features, classes) if classes else nn.Identity()

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """(images, 3, side, side) -> (images, tokens, width), the class token first."""
        raise NotImplementedError

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(images, 3, side, side), any floating dtype -> logits (images, classes)."""
        tokens = self.forward_features(images)
        if self.cls_target == CLS_PATCH_CONCAT:
            pooled = torch.cat((tokens[:, 0], tokens[:, 1:].mean(1)), -1)
        elif self.cls_target == ATTENTION_POOLING:
            pooled = self.attn_pooling(tokens)
        else:
            pooled = self.get_submodule(CLIP_PROJECTOR)(tokens)
        logits: torch.Tensor = self.head(self.norm(pooled))
        return logits

    def get_classifier(self) -> nn.ModuleList:
        """Everything above the backbone, the batch norm included, as timm's method of that name."""
        pooling = [self.attn_pooling] if self.cls_target == ATTENTION_POOLING else []
        return nn.ModuleList([*pooling, self.norm, self.head])

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the blocks in the backward pass instead of keeping their activations."""
        self._recomputes = enable

    def through(self, blocks: Iterable[nn.Module], tokens: torch.Tensor) -> torch.Tensor:
        """Runs the blocks one after the other."""
        recomputes = self._recomputes and torch.is_grad_enabled()
        for block in blocks:
            # Reentrant checkpoints give no gradients where no input requires one, as here.
            tokens = checkpoint(block, tokens, use_reentrant=False) if recomputes else block(tokens)
        return tokens


class _Head(nn.Linear):
    """A classifier whose weights are drawn with a standard deviation of 0.01, and its bias 0.

    In ``reset_parameters``, because under zero.Init no rank has all of them later.
    """

    def reset_parameters(self) -> None:
        super().reset_parameters()  # draws as many random numbers as the original does
        nn.init.normal_(self.weight, std=0.01)
        nn.init.zeros_(self.bias)


def lr_ratios(block: str, depth: int, stem: Iterable[str], ratio: float) -> dict[str, float]:
    """Part of a parameter's name -> what its learning rate is multiplied by.

    Args:
        block: name of a block, with {} for its number.
        depth: how many there are; the last has the ratio, the one before it its square, ...
        stem: what is below the first block.
        ratio: TRAIN.LR_LAYER_DECAY_RATIO.
    """
    ratios = {block.format(index): ratio ** (depth - index) for index in range(depth)}
    return ratios | dict.fromkeys(stem, ratio ** (depth + 1))
