"""The import path ``internvl_ds.ema`` of scripts."""

from internvl_ds.engine.ema import EmaWarmup, ShardedEma

__all__ = ['EmaWarmup', 'ShardedEma']
