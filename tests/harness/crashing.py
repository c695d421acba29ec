"""What ranks do in test_crashes.py: save under a recorder of what is on disk."""

from __future__ import annotations

from pathlib import Path

from tests.harness.crashes import Recorder
from tests.harness.saving import Run


def unflushed(root: str, stages: list[int]) -> list[list[str]]:
    """For each stage: what of a tag was in memory only when it got its name."""
    found = []
    for stage in stages:
        run = Run(stage, 'bf16', f'{root}/{stage}')
        run.steps(0, 1)
        run.save(0)
        run.steps(1, 2)
        with Recorder(Path(run.config.OUTPUT)) as recorder:
            run.save(1)
        found.append(recorder.unflushed('ckpt_epoch_1'))
        run.engine.destroy()
    return found
