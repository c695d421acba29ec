"""The utility API of an InternVL-style classification script, over a DeepSpeed engine."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from internvl_ds.utils import (
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

__version__ = '0.1.0'

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


def __getattr__(name: str) -> Any:
    """Imports the API when a name of it is first used: torch and DeepSpeed take seconds."""
    if name in __all__:
        from internvl_ds import utils

        return getattr(utils, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
