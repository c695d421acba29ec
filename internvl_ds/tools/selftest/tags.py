"""Saves while training goes on, resumes, and loads into another layout, bit for bit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from internvl_ds.checkpoint.choice import auto_resume_helper
from internvl_ds.checkpoint.load import load_checkpoint
from internvl_ds.checkpoint.save import save_checkpoint
from internvl_ds.engine.grad_scaler import NativeScalerWithGradNormCount
from internvl_ds.tools.selftest.row import Row, judged
from internvl_ds.tools.selftest.subject import (
    FP32,
    Tensors,
    make_engine,
    settings,
    train,
    whole_masters,
)

_log = logging.getLogger(__name__)


def tags_row(stage: int, other: int, output: Path) -> Row:
    """Saves at a stage, loads there and at another. Collective: every rank calls it.

    Args:
        output: a directory that all ranks see.
    """
    folder = str(output / f'stage{stage}')
    engine, optimizer = make_engine(settings(), stage)
    scaler = NativeScalerWithGradNormCount()
    for update in (0, 1):
        train(engine, optimizer, scaler, update)
    tags = [
        save_checkpoint(
            settings(OUTPUT=folder, SAVE_CKPT_NUM=2, CHECKPOINT__ASYNC=in_background),
            epoch, engine, 0.0, optimizer, None, scaler, _log,
        )
        for epoch, in_background in enumerate((False, True))
    ]  # fmt: skip
    saved = whole_masters(engine)
    norms = [train(engine, optimizer, scaler, update) for update in (2, 3)]  # during the second
    went_on = whole_masters(engine)
    engine.destroy()
    faults = []
    newest, latest = auto_resume_helper(folder), Path(folder, 'latest').read_text().strip()
    if newest != tags[1] or latest != Path(tags[1]).name:
        faults.append(f'the newest tag is {tags[1]}; a resume takes {newest}, latest is {latest}')
    for tag, way in zip(tags, ('sync', 'async'), strict=True):
        engine, optimizer, scaler = _loaded(tag, stage)
        if not _equal(whole_masters(engine), saved):
            faults.append(f'the {way} save of stage {stage} holds other weights')
        if [train(engine, optimizer, scaler, u) for u in (2, 3)] != norms:
            faults.append(f'after the {way} save of stage {stage} the norms are others')
        if not _equal(whole_masters(engine), went_on):
            faults.append(f'a resume from the {way} save of stage {stage} trains otherwise')
        engine.destroy()
    engine, _, _ = _loaded(tags[1], other)
    if not _equal(whole_masters(engine), saved):
        faults.append(f'the tag of stage {stage} has other weights at stage {other}')
    engine.destroy()
    found = f'sync and async resume bit for bit; stage {other} gets the same weights'
    return judged(f'tags of stage {stage}', faults, found)


def _loaded(tag: str, stage: int) -> tuple[Any, Any, Any]:
    config = settings(FP32, MODEL__RESUME=tag, TRAIN__AUTO_RESUME=False)
    engine, optimizer = make_engine(config, stage)
    scaler = NativeScalerWithGradNormCount()
    config.defrost()  # a load sets TRAIN.START_EPOCH
    load_checkpoint(config, engine, optimizer, None, scaler, _log)
    return engine, optimizer, scaler


def _equal(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)
