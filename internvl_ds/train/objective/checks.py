"""Settings of training that contradict each other, found before anything is built."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from timm.models import is_model
from yacs.config import CfgNode

from internvl_ds.config.choices import require_one_of
from internvl_ds.config.ds.diagnostics import Diagnostic, diagnostic
from internvl_ds.config.tree import get_option
from internvl_ds.errors import ConfigError, brief
from internvl_ds.train.datasets.checks import reads_parts
from internvl_ds.train.objective.class_weights import BALANCED

_CHOICES = {
    'TRAIN.LOSS': ('', 'bce'),
    'TRAIN.DIST_BN': ('', 'reduce', 'broadcast'),
    'TRAIN.DISTILL.TYPE': ('soft', 'hard'),
}


def contradictions(config: CfgNode) -> Iterator[Diagnostic]:
    """The faults of TRAIN's loss, teacher and saves, and of DATA's weights and repeats, by key."""
    faults = _of_loss, _of_weights, _of_teacher, _of_repeats, _of_saves
    for key, text in itertools.chain.from_iterable(each(config) for each in faults):
        yield diagnostic('', text, yacs=key)


def _of_loss(config: CfgNode) -> Iterator[tuple[str, str]]:
    train = config.TRAIN
    for key, words in _CHOICES.items():
        try:
            require_one_of(key, get_option(config, key), words)
        except ConfigError as error:
            yield key, str(error)
    if config.DATA.MULTI_LABEL:
        several = 'DATA.MULTI_LABEL True gives images several labels'
        if train.LOSS != 'bce':
            yield 'TRAIN.LOSS', f"TRAIN.LOSS is {train.LOSS!r}, and {several}: set 'bce'"
        if train.DISTILL.TEACHER:
            key = 'TRAIN.DISTILL.TEACHER'
            yield key, f'{key} is {train.DISTILL.TEACHER!r}, a teacher of one, and {several}'
    key, threshold = 'TRAIN.BCE_TARGET_THRESH', train.BCE_TARGET_THRESH
    if threshold is not None and not (isinstance(threshold, int | float) and 0 <= threshold < 1):
        yield key, f'{key} is {threshold!r}; it takes a number from 0 to 1, or None'
    for key, default in (('TRAIN.BCE_TARGET_THRESH', None), ('TRAIN.BCE_SUM', False)):
        if train.LOSS != 'bce' and (value := get_option(config, key)) != default:
            text = f"{key} {value} is of TRAIN.LOSS 'bce', and that is {train.LOSS!r}"
            yield key, f'{text}: set one of them otherwise'


def _of_weights(config: CfgNode) -> Iterator[tuple[str, str]]:
    key, weights, count = 'DATA.CLASS_WEIGHTS', config.DATA.CLASS_WEIGHTS, config.MODEL.NUM_CLASSES
    if weights in (None, BALANCED):
        return
    numbers = isinstance(weights, list | tuple) and all(
        isinstance(each, int | float) and 0 <= each < math.inf for each in weights
    )
    if not numbers or not any(weights):
        due = f'{BALANCED!r}, or numbers from 0 on by label, of which one is above 0, or None'
        yield key, f'{key} is {brief(weights)}; it takes {due}'
    elif count and len(weights) != count:
        yield key, f'{key} has {len(weights)} numbers, and MODEL.NUM_CLASSES is {count}'


def _of_teacher(config: CfgNode) -> Iterator[tuple[str, str]]:
    settings = config.TRAIN.DISTILL
    key, teacher, weights = 'TRAIN.DISTILL.TEACHER', settings.TEACHER, settings.PRETRAINED
    if teacher and ':' not in teacher and not is_model(teacher):
        yield key, f'{key} {teacher!r}: timm has no such model'
    if bool(teacher) != bool(weights):
        yield (
            key,
            f'{key} is {teacher!r} and TRAIN.DISTILL.PRETRAINED {weights!r}: set both, or none',
        )
    key, kind, temperature = 'TRAIN.DISTILL.TEMPERATURE', settings.TYPE, settings.TEMPERATURE
    if not temperature > 0:
        yield key, f'{key} is {temperature}; it takes a number above 0'
    elif kind == 'hard' and temperature != 1:
        yield key, f"{key} {temperature} is of TRAIN.DISTILL.TYPE 'soft', and that is 'hard'"
    if not 0 <= settings.ALPHA <= 1:
        key = 'TRAIN.DISTILL.ALPHA'
        yield key, f'{key} is {settings.ALPHA}, and a share is from 0 to 1'


def _of_repeats(config: CfgNode) -> Iterator[tuple[str, str]]:
    data, key = config.DATA, 'DATA.REPEATED_AUG'
    if data.REPEATED_AUG > 1 and reads_parts(config):
        which = 'DATA.IMG_ON_MEMORY True'
        if not data.IMG_ON_MEMORY:
            which = "DATA.CACHE_MODE 'part' with DATA.ZIP_MODE True"
        yield (
            key,
            f'{key} {data.REPEATED_AUG} has several ranks read an image, and {which} keeps it on '
            'one: set one of them otherwise',
        )


def _of_saves(config: CfgNode) -> Iterator[tuple[str, str]]:
    train, key = config.TRAIN, 'TRAIN.SAVE_OVERHEAD'
    share = train.SAVE_OVERHEAD
    if not 0 <= share < 1:
        yield key, f'{key} is {share}, and a share of the time is from 0 to below 1'
    for other in ('TRAIN.SAVE_STEPS', 'TRAIN.SAVE_MINUTES'):
        if share and (value := get_option(config, other)):
            yield key, f'{key} {share} and {other} {value} both say how often to save: set one to 0'
