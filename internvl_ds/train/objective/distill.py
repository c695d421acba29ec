"""Knowledge distillation: a frozen model whose answers training follows beside the labels."""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from deepspeed.runtime.engine import DeepSpeedEngine
from timm.task.distillation import DistillationTeacher
from torch import nn
from yacs.config import CfgNode

from internvl_ds.config.tree import set_options
from internvl_ds.errors import ConfigError, PretrainedError, few
from internvl_ds.pretrained import load_pretrained
from internvl_ds.train.model import build_model, input_dtype

# What a teacher is built without: it is timm's model as it was trained.
_PLAIN = {
    'MODEL.TYPE': 'timm', 'MODEL.FACTORY': '', 'MODEL.KWARGS': CfgNode(), 'MODEL.SYNC_BN': False,
    'MODEL.DROP_RATE': 0.0, 'MODEL.DROP_PATH_RATE': 0.0, 'MODEL.PRETRAINED_KEY': '',
    'MODEL.PRETRAINED_EMA': False, 'MODEL.PRETRAINED_RENAME': [], 'TRAIN.USE_CHECKPOINT': False,
    'TRAIN.RAND_INIT_FT_HEAD': False, 'TRAIN.OPTIMIZER.FREEZE_BACKBONE': None,
}  # fmt: skip


def teacher_config(config: CfgNode) -> CfgNode | None:
    """The tree of which the model TRAIN.DISTILL.TEACHER is built; None where none is named."""
    name, weights = config.TRAIN.DISTILL.TEACHER, config.TRAIN.DISTILL.PRETRAINED
    if not name:
        return None
    options = {**_PLAIN, 'MODEL.NAME': name, 'MODEL.PRETRAINED': weights}
    return set_options(config.clone(), options)


def build_teacher(config: CfgNode, logger: logging.Logger) -> nn.Module | None:
    """The model TRAIN.DISTILL.TEACHER with its weights, whole; None where none is named.

    Collective: every rank calls it. It draws from torch's generators.

    Raises:
        ConfigError: where TRAIN.DISTILL.PRETRAINED lacks weights of it.
        PretrainedError: as `load_pretrained`, also for a head of another length.
    """
    own = teacher_config(config)
    if own is None:
        return None
    name, weights = own.MODEL.NAME, own.MODEL.PRETRAINED
    model = build_model(own)
    try:
        report = load_pretrained(own, model, logger)
    except PretrainedError as error:
        raise PretrainedError(f'TRAIN.DISTILL.TEACHER {name!r}: {error}') from error
    missing = [key for key in report.missing if not key.endswith('num_batches_tracked')]
    if missing:
        raise ConfigError(
            f'TRAIN.DISTILL.TEACHER {name!r} would answer with random weights: '
            f'TRAIN.DISTILL.PRETRAINED {weights} has no {few(missing)} for MODEL.NUM_CLASSES '
            f'{config.MODEL.NUM_CLASSES}'
        )
    return model.requires_grad_(False)


class Teacher:
    """The teacher of one engine: beside it on each rank, in its precision, and in no checkpoint."""

    def __init__(self, config: CfgNode, model: nn.Module, engine: DeepSpeedEngine) -> None:
        self._settings, self._engine = config.TRAIN.DISTILL, engine
        self._model = DistillationTeacher(model).to(engine.device)
        self._model.model.to(input_dtype(engine))
        values = (config.AUG.MEAN, config.AUG.STD)
        self._mean, self._std = (
            torch.tensor(v, device=engine.device).view(1, -1, 1, 1) for v in values
        )

    @torch.no_grad()
    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Its answers, float32, to images as the student has them, float32."""
        engine = self._engine
        images = self._model.normalize_input(images, self._mean, self._std)
        autocasts = engine.torch_autocast_enabled()
        dtype = engine.torch_autocast_dtype() if autocasts else None
        with torch.autocast(engine.device.type, dtype, enabled=autocasts):
            return self._model(images.to(input_dtype(engine))).float()

    def joined(
        self, loss: torch.Tensor, logits: torch.Tensor, images: torch.Tensor
    ) -> torch.Tensor:
        """As the function `joined`, of its answers to ``images``, which are as for `logits`."""
        return joined(self._settings, loss, logits, self.logits(images))


def joined(
    settings: CfgNode, loss: torch.Tensor, logits: torch.Tensor, theirs: torch.Tensor
) -> torch.Tensor:
    """The loss of a batch with a part that follows a teacher: ALPHA of the whole.

    Args:
        settings: TRAIN.DISTILL.
        loss: of the labels.
        logits, theirs: the student's and the teacher's, float32, (images, classes).
    """
    t = settings.TEMPERATURE
    if settings.TYPE == 'hard':
        part = F.cross_entropy(logits, theirs.argmax(dim=-1))
    else:  # times t * t: gradients of one size at any temperature
        targets = F.softmax(theirs / t, dim=-1)
        part = F.kl_div(F.log_softmax(logits / t, dim=-1), targets, reduction='batchmean')
        part = part * t * t
    return (1 - settings.ALPHA) * loss + settings.ALPHA * part
