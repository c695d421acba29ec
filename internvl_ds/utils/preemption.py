"""The import path ``internvl_ds.preemption`` of scripts."""

from internvl_ds.dist.preemption import Preemption

__all__ = ['Preemption']
