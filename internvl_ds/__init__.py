"""The utility API of an InternVL-style classification script, over a DeepSpeed engine."""

import importlib
from pathlib import Path
from typing import Any

__version__ = '0.1.0'

# utils/ holds the import paths of scripts: `internvl_ds.ema` and `internvl_ds.preemption` too.
__path__ = [*__path__, str(Path(__file__).parent / 'utils')]

# Module -> the public names in it. `__init__.pyi` lists them for type checkers and editors.
_HOMES = {
    'checkpoint.choice': ('auto_resume_helper',),
    'checkpoint.load': ('load_checkpoint',),
    'checkpoint.load_ema': ('load_ema_checkpoint',),
    'config': ('get_config',),
    'dist.preemption': ('Preemption',),
    'dist.process_group': ('init_distributed', 'shutdown'),
    'dist.reduce': ('reduce_tensor',),
    'engine.ema': ('EmaWarmup', 'ShardedEma'),
    'engine.epochs': ('start_epoch',),
    'engine.grad_scaler': ('NativeScalerWithGradNormCount', 'get_grad_norm'),
    'engine.initialize': ('initialize',),
    'engine.registry': ('register',),
    'errors': (
        'CheckpointError',
        'CheckpointMismatch',
        'CheckpointNotFound',
        'ConfigError',
        'DataError',
        'EngineNotFound',
        'GradientOverflow',
        'InternvlDsError',
        'Preempted',
        'PretrainedError',
        'RankError',
    ),
    'metrics': ('MyAverageMeter',),
    'pretrained': ('convert_22k_head_to_1k', 'load_pretrained'),
    'utils.original_order': ('save_checkpoint',),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: torch and DeepSpeed take seconds."""
    if name not in _HOME_OF:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(f'{__name__}.{_HOME_OF[name]}'), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
