"""The public names; `__init__.py` imports each when it is first used."""

from internvl_ds.checkpoint.choice import auto_resume_helper as auto_resume_helper
from internvl_ds.checkpoint.load import load_checkpoint as load_checkpoint
from internvl_ds.checkpoint.load_ema import load_ema_checkpoint as load_ema_checkpoint
from internvl_ds.config import get_config as get_config
from internvl_ds.dist.preemption import Preemption as Preemption
from internvl_ds.dist.process_group import init_distributed as init_distributed
from internvl_ds.dist.process_group import shutdown as shutdown
from internvl_ds.dist.reduce import reduce_tensor as reduce_tensor
from internvl_ds.engine.ema import EmaWarmup as EmaWarmup
from internvl_ds.engine.ema import ShardedEma as ShardedEma
from internvl_ds.engine.epochs import start_epoch as start_epoch
from internvl_ds.engine.grad_scaler import (
    NativeScalerWithGradNormCount as NativeScalerWithGradNormCount,
)
from internvl_ds.engine.grad_scaler import get_grad_norm as get_grad_norm
from internvl_ds.engine.initialize import initialize as initialize
from internvl_ds.engine.registry import register as register
from internvl_ds.errors import CheckpointError as CheckpointError
from internvl_ds.errors import CheckpointMismatch as CheckpointMismatch
from internvl_ds.errors import CheckpointNotFound as CheckpointNotFound
from internvl_ds.errors import ConfigError as ConfigError
from internvl_ds.errors import DataError as DataError
from internvl_ds.errors import EngineNotFound as EngineNotFound
from internvl_ds.errors import GradientOverflow as GradientOverflow
from internvl_ds.errors import InternvlDsError as InternvlDsError
from internvl_ds.errors import Preempted as Preempted
from internvl_ds.errors import PretrainedError as PretrainedError
from internvl_ds.errors import RankError as RankError
from internvl_ds.metrics import MyAverageMeter as MyAverageMeter
from internvl_ds.pretrained import convert_22k_head_to_1k as convert_22k_head_to_1k
from internvl_ds.pretrained import load_pretrained as load_pretrained
from internvl_ds.utils.original_order import save_checkpoint as save_checkpoint

__version__: str
