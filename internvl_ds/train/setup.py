"""Sets a run up in order: data, weights, engine, checkpoint."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from yacs.config import CfgNode

from internvl_ds.checkpoint.choice import newer_than_best
from internvl_ds.checkpoint.sources.classes import require_same_classes, saved_classes
from internvl_ds.checkpoint.sources.downloads import local
from internvl_ds.checkpoint.tag import output_lock
from internvl_ds.config.counts import require_counts, require_linear_drop_path
from internvl_ds.config.ds import resolve as ds
from internvl_ds.config.ds.check import examine
from internvl_ds.config.ds.diagnostics import errors_of, refuse
from internvl_ds.config.ds.load import load_ds_config
from internvl_ds.config.tree import set_options
from internvl_ds.dist.preemption import Preemption
from internvl_ds.dist.rendezvous import exchange, from_rank_0, rank, world_size
from internvl_ds.engine.ema import ShardedEma
from internvl_ds.engine.epochs import make_deterministic, seed_everything
from internvl_ds.engine.grad_scaler import NativeScalerWithGradNormCount
from internvl_ds.engine.initialize import initialize
from internvl_ds.errors import ConfigError, few
from internvl_ds.files import for_show
from internvl_ds.pretrained import timm_weights
from internvl_ds.train.cores import share_cores
from internvl_ds.train.data import Loaders, build_loaders, order_of
from internvl_ds.train.model import build_model
from internvl_ds.train.models.build import warn_of_random_backbone
from internvl_ds.train.objective.distill import Teacher, build_teacher
from internvl_ds.train.optim import (
    accumulation_steps,
    build_optimizer,
    build_scheduler,
    scaled_lrs,
    told_lrs,
)
from internvl_ds.train.optimizer_check import examine_training
from internvl_ds.train.position import Position
from internvl_ds.train.reporting.log import write_config
from internvl_ds.train.reporting.start import StartClock
from internvl_ds.train.reporting.stopwatch import Stopwatch
from internvl_ds.train.save_interval import SaveInterval
from internvl_ds.utils import (
    auto_resume_helper,
    load_checkpoint,
    load_ema_checkpoint,
    load_pretrained,
)
from internvl_ds.zero.fast_adam import adam_class
from internvl_ds.zero.parameters import whole_numel
from internvl_ds.zero.sharded_build import ShardedBuild, choose_build

_HALVES = {ds.FP16: torch.float16, ds.BF16: torch.bfloat16}

DsConfig = str | Path | Mapping[str, Any] | None


@dataclass
class Run:
    """The parts of one run, and its position.

    Attributes:
        optimizer, scheduler: None where the run does not train.
        ema: the average that training keeps; None where there is none to keep.
        averaged_weights: those of the checkpoint, where the run evaluates only.
        best: highest top-1 validation accuracy (with DATA.MULTI_LABEL mAP) so far, percent.
        best_ema: the same of the averaged weights.
        position: how far the present epoch is.
        generators_go_on: whether the random number generators are those of that position.
        saved: the last (epoch, updates of it) that a step tag was saved at.
        save_due: whether to save after the next update.
        preemption: where to ask whether to save or stop; None outside training.
        stopwatch: to be told of each update; None where none is timed.
        save_interval: of TRAIN.SAVE_OVERHEAD, on rank 0; None without.
        teacher: whose answers training follows; None without TRAIN.DISTILL.
        start: until the first update; then None.
    """

    config: CfgNode
    logger: logging.Logger
    loaders: Loaders
    engine: DeepSpeedEngine
    scaler: NativeScalerWithGradNormCount
    optimizer: Any = None
    scheduler: Scheduler | None = None
    ema: ShardedEma | None = None
    averaged_weights: dict[str, torch.Tensor] | None = None
    best: float = 0.0
    best_ema: float = 0.0
    position: Position = field(default_factory=Position)
    generators_go_on: bool = False
    saved: tuple[int, int] | None = None
    save_due: bool = False
    preemption: Preemption | None = None
    stopwatch: Stopwatch | None = None
    save_interval: SaveInterval | None = None
    teacher: Teacher | None = None
    start: StartClock | None = None


def setup(
    config: CfgNode, ds_config: DsConfig, logger: logging.Logger, start: StartClock | None = None
) -> Run:
    """Sets a run up as the config says. Collective: every rank calls it.

    Args:
        config: what the ds_config decides, MODEL.RESUME (automatic resume) and TRAIN.START_EPOCH
            are written into it.
        ds_config: a DeepSpeed configuration: its path, shipped name or content; None for none.
        logger: told what was found, built and loaded.
        start: told of the parts of it.

    Raises:
        ConfigError: for settings that disagree with each other, the data or the model.
    """
    start = start or StartClock()
    tree = load_ds_config(ds_config)
    require_counts(config)
    require_linear_drop_path(config)
    trains = not (config.EVAL_MODE or config.THROUGHPUT_MODE)
    if trains:
        resolution = examine_training(tree, config, world_size())
    else:
        resolution = examine(tree, config, world_size(), optimizer_in_code=False)
    refuse(errors_of(resolution.findings))  # initialize logs the warnings
    ds.adopt(config, resolution.tree)
    if config.TRAIN.DETERMINISTIC:
        make_deterministic()
    start.passed('checks')
    loaders = build_loaders(config, rank(), world_size())
    if config.DATA.IMG_ON_MEMORY or config.DATA.ZIP_MODE:  # one host may take longer
        exchange('images in memory', None, config.CHECKPOINT.IO_TIMEOUT)
    start.passed('data')
    share_cores(config)
    seed_everything(config.SEED)  # the same weights on every rank
    model, build = _build(config, choose_build(config, resolution.tree) if trains else None)
    seed_everything(config.SEED + rank())
    sizes = {p: whole_numel(p) / 1e6 for p in model.parameters()}
    trained = sum(size for p, size in sizes.items() if p.requires_grad)
    name = config.MODEL.FACTORY or config.MODEL.NAME
    logger.info(
        f'model {name}: {sum(sizes.values()):.2f} M parameters, {trained:.2f} M of them trained'
        f'{f", built in {world_size()} slices" if build else ""}'
    )
    if config.THROUGHPUT_MODE:  # any weights are as fast
        engine = _inference_engine(config, model, resolution)
        return Run(config, logger, loaders, engine, NativeScalerWithGradNormCount())
    if config.MODEL.PRETRAINED == timm_weights.NAME:
        set_options(config, {'MODEL.PRETRAINED': timm_weights.address_of(model)})
    _choose_resume(config, logger)
    if config.MODEL.PRETRAINED and not config.MODEL.RESUME:
        _compare_pretrained_classes(config, loaders.classes, logger)
        load_pretrained(config, model, logger)
    warn_of_random_backbone(config, model, logger)
    if config.EVAL_MODE:
        return _setup_evaluation(config, model, resolution, loaders, logger)
    if build is not None:
        build.cast(model, _HALVES.get(ds.precision_of(resolution.tree)))
    start.passed('model')
    return _setup_training(config, model, resolution, loaders, logger, start)


def _build(config: CfgNode, build: ShardedBuild | None) -> tuple[nn.Module, ShardedBuild | None]:
    """The model, and its sharded build, if any.

    Raises:
        ConfigError: where ranks have built other weights, of which slices would be a mixture.
    """
    with build or contextlib.nullcontext():
        model = build_model(config)
    if build is None or not build.finish(model):
        return model, None
    timeout = config.CHECKPOINT.RENDEZVOUS_TIMEOUT
    digests = exchange('weights as built', build.digest(model), timeout)
    others = [r for r, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise ConfigError(
            f'ranks {few(others)} have built other weights than rank 0, with the same seed: have '
            "MODEL.FACTORY draw from torch's, numpy's or random's generators alone, or set "
            "TRAIN.SHARDED_BUILD 'never', which takes those of rank 0"
        )
    return model, build


def _setup_training(
    config: CfgNode,
    model: nn.Module,
    resolution: ds.Resolution,
    loaders: Loaders,
    logger: logging.Logger,
    start: StartClock,
) -> Run:
    assert loaders.train is not None
    if len(loaders.train) < accumulation_steps(config):
        raise ConfigError(
            f'TRAIN.ACCUMULATION_STEPS is {config.TRAIN.ACCUMULATION_STEPS}, but an epoch has '
            f'{len(loaders.train)} micro-batches of DATA.BATCH_SIZE {config.DATA.BATCH_SIZE} on '
            'each rank; lower one of the two'
        )
    if config.CHECKPOINT.ASYNC_COPY == 'auto' and not config.MODEL.FACTORY:
        # A model of the user's own may write to its weights in a forward pass.
        set_options(config, {'CHECKPOINT.ASYNC_COPY': 'overlap'})
    timeout = config.CHECKPOINT.RENDEZVOUS_TIMEOUT
    if rank() == 0:
        with for_show(Path(config.OUTPUT) / 'config.json', logger):
            logger.info('configuration, resolved: %s', write_config(config, config.OUTPUT))
    lrs = scaled_lrs(config, world_size())
    logger.info(told_lrs(config, world_size(), lrs))
    teacher = build_teacher(config, logger)  # before a load that restores the generators
    client = build_optimizer(config, model, lrs.base, adam_class(config, resolution.tree))
    scheduler = build_scheduler(config, client, len(loaders.train), lrs)
    engine, optimizer = initialize(
        config, model, client, resolution, lr_scheduler=scheduler, schedule_in='original'
    )
    scaler = NativeScalerWithGradNormCount()
    state = Run(config, logger, loaders, engine, scaler, optimizer, scheduler, start=start)
    start.passed('engine')
    if teacher is not None:
        state.teacher = Teacher(config, teacher, engine)
    if config.MODEL.RESUME:
        state.best = load_checkpoint(
            config, engine, optimizer, scheduler, scaler, logger,
            loop=state.position, class_names=loaders.classes,
        )  # fmt: skip
    if config.TRAIN.EMA.ENABLE:
        # After the load: without an average in the checkpoint it starts at the loaded weights.
        state.ema = ShardedEma(engine, config.TRAIN.EMA.DECAY, config.TRAIN.EMA.WARMUP)
        if config.MODEL.RESUME:
            state.best_ema = load_ema_checkpoint(config, state.ema, logger)
    if config.MODEL.RESUME:
        start.passed('load')
    train_loader = loaders.train  # of rank 0, so that all ranks decide alike
    order = from_rank_0('order of images', lambda: order_of(train_loader, config.SEED), timeout)
    same = state.position.fit(
        images=config.DATA.BATCH_SIZE * world_size(),
        ranks=world_size(),
        group=accumulation_steps(config),
        total=len(loaders.train),
        logger=logger,
        order=order,
    )
    state.generators_go_on = same and state.position.micro_batches > 0
    return state


def _setup_evaluation(
    config: CfgNode,
    model: nn.Module,
    resolution: ds.Resolution,
    loaders: Loaders,
    logger: logging.Logger,
) -> Run:
    """Loads before the engine exists, so that any layout of checkpoint fits."""
    best, averaged = 0.0, None
    if config.MODEL.RESUME:
        best = load_checkpoint(config, model, None, None, None, logger, class_names=loaders.classes)
        if config.TRAIN.EMA.ENABLE:
            ema = ModelEmaV3(model, config.TRAIN.EMA.DECAY)
            load_ema_checkpoint(config, ema, logger)
            averaged = ema.module.state_dict()
            if all(w.numel() and w.equal(averaged[n]) for n, w in model.state_dict().items()):
                averaged = None
                logger.info('the checkpoint has no average of its own to evaluate')
    elif not config.MODEL.PRETRAINED:
        part = 'head' if getattr(model, 'given_by_backbone', None) else 'model'
        logger.warning(f'neither MODEL.RESUME nor MODEL.PRETRAINED is set: the {part} is random')
    engine = _inference_engine(config, model, resolution)
    scaler = NativeScalerWithGradNormCount()
    return Run(config, logger, loaders, engine, scaler, averaged_weights=averaged, best=best)


def _inference_engine(
    config: CfgNode, model: nn.Module, resolution: ds.Resolution
) -> DeepSpeedEngine:
    resolution = resolution._replace(tree=ds.for_inference(resolution.tree))
    return initialize(config, model, None, resolution)[0]


def enter_output(config: CfgNode) -> None:
    """Locks OUTPUT for a run that saves there; refuses what would fail after an epoch of training.

    Collective: every rank calls it.

    Raises:
        ConfigError: when OUTPUT cannot be written.
        CheckpointError: when another job writes there.
    """
    if config.EVAL_MODE or config.THROUGHPUT_MODE:
        return
    output, timeout = Path(config.OUTPUT), config.CHECKPOINT.RENDEZVOUS_TIMEOUT

    def enter() -> None:
        try:
            output.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=output).close()
            if not config.BENCH.UPDATES:
                output_lock.enter_output(output, config, timeout)
        except OSError as error:
            raise ConfigError(
                f'OUTPUT {output}: no checkpoint can be saved there: {error}'
            ) from error

    from_rank_0('enter OUTPUT', enter, timeout)


def _compare_pretrained_classes(
    config: CfgNode, classes: Sequence[str], logger: logging.Logger
) -> None:
    """Refuses a head of equal length and other class names, which would be loaded row by row."""

    def compare() -> None:
        weights = local(config.MODEL.PRETRAINED, config)
        if len(saved_classes(weights) or ()) == len(classes):
            require_same_classes(config, classes, weights, logger)

    from_rank_0('compare classes', compare, config.CHECKPOINT.IO_TIMEOUT)


def _choose_resume(config: CfgNode, logger: logging.Logger) -> None:
    """Sets MODEL.RESUME if it is empty; else `load_checkpoint` looks into OUTPUT."""
    if not config.TRAIN.AUTO_RESUME:
        return
    if config.MODEL.RESUME:
        newest = None if config.EVAL_MODE else newer_than_best(config)
        if newest is None:
            return
        logger.warning('%s goes before MODEL.RESUME %s, as the newer', newest, config.MODEL.RESUME)
    else:
        newest = auto_resume_helper(config.OUTPUT, config=config)
        if newest is None:
            logger.info('no checkpoint in %s: starting anew', config.OUTPUT)
            return
    set_options(config, {'MODEL.RESUME': newest})
