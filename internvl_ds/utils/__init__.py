"""The original script's import path: ``from utils import X`` becomes ``from internvl_ds.utils``."""

from internvl_ds.checkpoint.choice import auto_resume_helper
from internvl_ds.checkpoint.load import load_checkpoint
from internvl_ds.checkpoint.load_ema import load_ema_checkpoint
from internvl_ds.dist.process_group import shutdown
from internvl_ds.dist.reduce import reduce_tensor
from internvl_ds.engine.ema import ShardedEma
from internvl_ds.engine.epochs import start_epoch
from internvl_ds.engine.grad_scaler import NativeScalerWithGradNormCount, get_grad_norm
from internvl_ds.engine.initialize import initialize
from internvl_ds.engine.registry import register
from internvl_ds.metrics import MyAverageMeter
from internvl_ds.pretrained import convert_22k_head_to_1k, load_pretrained
from internvl_ds.utils.original_order import save_checkpoint

__all__ = [
    'MyAverageMeter',
    'NativeScalerWithGradNormCount',
    'ShardedEma',
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
    'shutdown',
    'start_epoch',
]
