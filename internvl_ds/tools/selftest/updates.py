"""Each precision and ZeRO stage beside plain PyTorch: norms, clipping, a skipped update, EMA."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from deepspeed.accelerator import get_accelerator

from internvl_ds.errors import few
from internvl_ds.tools.selftest.row import ABSENT, Row, judged
from internvl_ds.tools.selftest.subject import (
    OVERFLOW,
    UPDATES,
    Course,
    distance,
    engine_course,
    is_supported,
    plain_course,
    rounding_of,
)


def updates_row(precision: str, stages: Sequence[int]) -> Row:
    """Trains at each stage and compares. Collective: every rank calls it."""
    name = f'updates in {precision}'
    if not is_supported(precision):
        device = get_accelerator().device_name()
        return Row(
            name, ABSENT, f'this {device} has no {"float16" if "fp" in precision else "bfloat16"}'
        )
    plain = plain_course(precision, torch.device(get_accelerator().current_device_name()))
    limit, faults, worst = rounding_of(precision), [], 0.0
    for stage in stages:
        course = engine_course(precision, stage)
        if lost := sorted(plain.weights.keys() - course.weights.keys()):
            faults.append(f'stage {stage}: {few(lost)} not trained')
            continue
        off = _differences(course, plain)
        worst = max(worst, *off.values())
        faults += [
            f'stage {stage}: {what} off by {value:.1e} of it (allowed {limit:.1e})'
            for what, value in off.items()
            if not value <= limit
        ]
    listed = ' '.join(map(str, stages))
    found = (
        f'stages {listed}: off by {worst:.1e} at most (allowed {limit:.1e}); 1 of {UPDATES} skipped'
    )
    return judged(name, faults, found, off=worst, allowed=limit)


def _differences(course: Course, plain: Course) -> dict[str, float]:
    """What is compared -> the difference, as a share of the norm or of the way gone."""
    way = distance(plain.weights, plain.start)
    norms = [
        0.0 if math.isinf(b) and not math.isfinite(a) else abs(a - b) / b
        for a, b in zip(course.norms, plain.norms, strict=True)
    ]
    off = {f'the norm of update {i}': n for i, n in enumerate(norms) if i != OVERFLOW}
    off[f'update {OVERFLOW}, which must be skipped'] = norms[OVERFLOW]
    off['the weights'] = distance(course.weights, plain.weights) / way
    off['their average'] = distance(course.average, plain.average) / way
    return off
