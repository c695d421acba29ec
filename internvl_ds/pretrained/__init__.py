"""Pretrained weights: read from a file, adapted to the model, written into it."""

from internvl_ds.pretrained.api import convert_22k_head_to_1k, load_pretrained
from internvl_ds.pretrained.head import imagenet_22k_rows, slice_22k_logits

__all__ = ['convert_22k_head_to_1k', 'imagenet_22k_rows', 'load_pretrained', 'slice_22k_logits']
