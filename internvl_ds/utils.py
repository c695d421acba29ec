"""The original script's import path: ``from utils import X`` becomes ``from internvl_ds.utils``."""

from internvl_ds import (
    MyAverageMeter,
    NativeScalerWithGradNormCount,
    auto_resume_helper,
    convert_22k_head_to_1k,
    get_grad_norm,
    initialize,
    load_checkpoint,
    load_ema_checkpoint,
    load_pretrained,
    reduce_tensor,
    register,
    save_checkpoint,
)

__all__ = [
    'MyAverageMeter',
    'NativeScalerWithGradNormCount',
    'auto_resume_helper',
    'convert_22k_head_to_1k',
    'get_grad_norm',
    'initialize',
    'load_checkpoint',
    'load_ema_checkpoint',
    'load_pretrained',
    'reduce_tensor',
    'register',
    'save_checkpoint',
]
