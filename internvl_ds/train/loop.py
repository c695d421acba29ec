"""The training loop: train, evaluate, save, epoch by epoch. Every rank runs all of it."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import time
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from yacs.config import CfgNode

from internvl_ds.checkpoint import async_save
from internvl_ds.checkpoint.mirror.uploads import uploads
from internvl_ds.dist.group import current_group
from internvl_ds.dist.preemption import STOP, Preempted, Preemption
from internvl_ds.dist.reduce import reduce_tensor
from internvl_ds.dist.rendezvous import rank, world_size
from internvl_ds.files import for_show
from internvl_ds.train.data import start_epoch
from internvl_ds.train.model import input_dtype, set_train_mode
from internvl_ds.train.models.batch_norm import distribute_statistics
from internvl_ds.train.objective.criterion import build_criterion
from internvl_ds.train.optim import accumulation_steps, updates_per_epoch
from internvl_ds.train.prefetch import on_device
from internvl_ds.train.reporting.log import FILE_ONLY, MetricsLog, close_log, open_log, shows_bar
from internvl_ds.train.reporting.plot import plot_curves
from internvl_ds.train.reporting.progress import Progress
from internvl_ds.train.reporting.start import StartClock
from internvl_ds.train.reporting.stopwatch import Stopwatch, TimeTaken
from internvl_ds.train.save_interval import SaveInterval
from internvl_ds.train.setup import DsConfig, Run, enter_output, setup
from internvl_ds.train.validation import (
    evaluate_loaded,
    report_evaluation,
    report_throughput,
    validate_epoch,
)
from internvl_ds.utils import save_checkpoint


def run(config: CfgNode, ds_config: DsConfig = None, start: StartClock | None = None) -> float:
    """Trains, evaluates or times the configured model. Collective: every rank calls it.

    Args:
        config: from `get_config`. Settings that the ds_config decides, MODEL.RESUME (automatic
            resume) and TRAIN.START_EPOCH are written into it.
        ds_config: a DeepSpeed configuration: its path, shipped name or content; None for none.
        start: that knows how long it took to come here; None counts it with the first part.

    Returns:
        The best top-1 accuracy (with DATA.MULTI_LABEL mAP), percent; in THROUGHPUT_MODE, and with
        BENCH.UPDATES, images per second over all ranks.

    Raises:
        Preempted: on all ranks, when training was asked to stop, and has saved.
    """
    enter_output(config)
    logger = open_log(config.OUTPUT, rank())
    logger.info(current_group().start)
    try:
        stopwatch = Stopwatch(config)
        state = setup(config, ds_config, logger, start)
        if config.THROUGHPUT_MODE:
            return report_throughput(state)
        if config.EVAL_MODE:
            return report_evaluation(state)
        if config.BENCH.UPDATES:
            return _time_updates(state, stopwatch)
        return _train(state)
    except Preempted:
        raise
    except BaseException:
        # The interpreter prints it; the file keeps it, on each rank.
        logger.exception('rank %d ends', rank(), extra=FILE_ONLY)
        raise
    finally:
        close_log(logger)


def train_one_epoch(state: Run, epoch: int) -> dict[str, float]:
    """Trains one epoch: one pass over this rank's batches, an update every ACCUMULATION_STEPS.

    The last group of an epoch may be shorter; it is divided by its own size and applied. It goes on
    where the run's position is.

    Returns:
        train_loss (mean over ranks), lr, grad_norm (mean of the last 300 updates), images_per_s
        (all ranks) and seconds.

    Raises:
        Preempted: on all ranks after the same update, when the run is to save and stop.
        DataError: on all ranks, when together they have found too many faulty images.
        TimeTaken: on all ranks after the last update that the run's stopwatch is for.
    """
    config, engine, loader = state.config, state.engine, state.loaders.train
    assert loader is not None
    position = state.position
    start = position.micro_batches
    start_epoch(loader, config.SEED, epoch, rank(), start, state.generators_go_on)
    state.generators_go_on = False  # only in the epoch that was resumed
    set_train_mode(engine, engine.module, config.TRAIN.OPTIMIZER.FREEZE_BACKBONE)
    soft = state.loaders.mixup is not None
    criterion = build_criterion(config, soft, state.loaders.weights).to(engine.device)
    dtype, steps, total = input_dtype(engine), accumulation_steps(config), len(loader)
    if start:
        state.logger.info('epoch %d goes on after micro-batch %d of %d', epoch, start, total)
    progress = Progress(
        config, epoch, total, world_size(), state.logger, shows_bar(rank()), start, position.meters
    )
    if state.save_interval is not None:
        state.save_interval.start()
    try:
        for index, (images, labels) in enumerate(on_device(loader, engine.device), start):
            if state.loaders.mixup is not None:
                images, labels = state.loaders.mixup(images, labels)
            logits = engine(images.to(dtype)).float()
            loss = criterion(logits, labels)
            if state.teacher is not None:
                loss = state.teacher.joined(loss, logits, images)
            group_size = min(steps, total - index // steps * steps)
            boundary = (index + 1) % steps == 0 or index + 1 == total
            norm = state.scaler(
                loss / group_size, state.optimizer, config.TRAIN.CLIP_GRAD, engine.parameters(),
                update_grad=boundary,
            )  # fmt: skip
            if boundary and state.ema is not None:
                state.ema.update()
            skipped = boundary and state.scaler.step_was_skipped
            progress.step(loss, norm, current_lr(engine), state.scaler.loss_scale, skipped)
            if boundary:
                if state.stopwatch is not None:
                    state.stopwatch.lap(group_size * len(labels) * world_size())
                position.micro_batches, position.complete = index + 1, index + 1 == total
                saves = async_save.is_running()
                _pass_boundary(state, epoch, progress)
                _measure_save(state, saves, epoch)
        position.meters = progress.state_dict()
    finally:
        progress.close()
    return {
        'train_loss': _end_of_epoch(state, epoch, progress.losses.avg),
        'lr': current_lr(engine),
        'grad_norm': progress.norms.avg,
        'images_per_s': round(progress.images_per_second, 2),
        'seconds': round(progress.seconds, 3),
    }


def _end_of_epoch(state: Run, epoch: int, loss: float) -> float:
    """The mean of a loss over ranks; tells of faulty images, if any rank has found some."""
    skipped = state.loaders.skipped
    untold = 0 if skipped is None else skipped.untold()
    mine = torch.tensor([loss, untold], dtype=torch.float32, device=state.engine.device)
    mean_loss, any_untold = reduce_tensor(mine).tolist()
    if skipped is not None and any_untold:
        skipped.tell(f'epoch {epoch}', state.config.CHECKPOINT.RENDEZVOUS_TIMEOUT)
    return mean_loss


def current_lr(engine: DeepSpeedEngine) -> float:
    """The largest learning rate of the engine's groups: the unscaled one under layer decay."""
    return max(group['lr'] for group in engine.optimizer.param_groups)


def _train(state: Run) -> float:
    config, logger = state.config, state.logger
    first, last = config.TRAIN.START_EPOCH, config.TRAIN.EPOCHS - 1
    metrics = MetricsLog(Path(config.OUTPUT) / 'metrics.jsonl')
    if rank() == 0:
        with for_show(metrics.path, logger):
            metrics.drop_from(first, state.position.record)
    if first > last:
        logger.info('nothing to train: epoch %d of %d is next', first, config.TRAIN.EPOCHS)
    start = time.perf_counter()
    if config.TRAIN.SAVE_OVERHEAD and rank() == 0:  # which says when all save
        state.save_interval = SaveInterval(config.TRAIN.SAVE_OVERHEAD, logger)
    with Preemption(config) as state.preemption:
        evaluate_loaded(state)
        if config.EVAL_LOADED and state.start is not None:
            state.start.passed('evaluation')
        for epoch in range(first, last + 1):
            try:
                _run_epoch(state, epoch, metrics)
            except Preempted:
                _save_step(state, epoch)
                async_save.wait()  # while the log is open
                uploads().finish()
                _tell_all_skipped(state, f'epoch {epoch}, preempted')
                raise
        async_save.wait()  # before signals mean something else again
        uploads().finish()
    _tell_all_skipped(state, 'end')
    name = 'mAP' if config.DATA.MULTI_LABEL else 'top-1'
    logger.info('trained in %.1f s; best %s %.2f %%', time.perf_counter() - start, name, state.best)
    return state.best


def _tell_all_skipped(state: Run, when: str) -> None:
    if (skipped := state.loaders.skipped) is not None:
        skipped.tell(when, state.config.CHECKPOINT.RENDEZVOUS_TIMEOUT)
        skipped.tell_all()


def _time_updates(state: Run, stopwatch: Stopwatch) -> float:
    """Trains until the stopwatch has its updates, over as many epochs as needed."""
    state.stopwatch = stopwatch
    stopwatch.start()
    with contextlib.suppress(TimeTaken):
        for epoch in itertools.count():
            train_one_epoch(state, epoch)
            state.position.reset()
    return stopwatch.report(state.config, state.engine.device, state.logger)


def _run_epoch(state: Run, epoch: int, metrics: MetricsLog) -> None:
    """Trains, evaluates, saves and records one epoch."""
    config = state.config
    if config.TRAIN.SAVE_ON_OVERFLOW:
        state.scaler.before_stop = functools.partial(_save_overflow, state, epoch)
    record: dict[str, Any] = {'epoch': epoch, **train_one_epoch(state, epoch)}
    distribute_statistics(state.engine.module.named_buffers(), config.TRAIN.DIST_BN)
    if state.ema is not None:
        distribute_statistics(state.ema.buffers().items(), config.TRAIN.DIST_BN)
    improved = improved_ema = False
    if _is_due(config, epoch, config.EVAL_FREQ):
        result, averaged = validate_epoch(state, epoch)
        improved, state.best = result.acc1 > state.best, max(state.best, result.acc1)
        record.update(result.record())
        if averaged is not None:
            improved_ema = averaged.acc1 > state.best_ema
            state.best_ema = max(state.best_ema, averaged.acc1)
            record[f'ema_{averaged.key}'] = averaged.acc1
        state.logger.info('best %s %.2f %%', result.name, state.best)
    state.position.reset()
    state.position.record = record
    # The best first: a run that is killed in between repeats the epoch, and saves both again.
    if improved:
        _save(state, epoch, best='best')
    if improved_ema:
        _save(state, epoch, best='ema_best')
    if _is_due(config, epoch, config.SAVE_FREQ):
        _save(state, epoch)
    # Last: none of it may keep an epoch from being saved.
    _write_monitor(state, record)
    if rank() == 0:
        with for_show(metrics.path, state.logger):
            metrics.append(record)
        curves = Path(config.OUTPUT) / 'curves.png'
        with for_show(curves, state.logger):
            plot_curves(metrics.read(), curves)


def _is_due(config: CfgNode, epoch: int, every: int) -> bool:
    """Whether an epoch is due, by EVAL_FREQ or SAVE_FREQ; the last one always is."""
    return (every > 0 and epoch % every == 0) or epoch == config.TRAIN.EPOCHS - 1


def _pass_boundary(state: Run, epoch: int, progress: Progress) -> None:
    """After an update: saves if due, and stops if asked to."""
    if state.start is not None:
        _tell_start(state, state.start)
    if state.preemption is None:
        return
    action = state.preemption.reached()
    every = state.config.TRAIN.SAVE_STEPS
    at_step = every > 0 and _updates(state, epoch) % every == 0
    if action is None and not at_step and not state.save_due:
        return
    state.position.meters = progress.state_dict()
    if action == STOP:
        raise Preempted
    if not (state.position.complete and _is_due(state.config, epoch, state.config.SAVE_FREQ)):
        _save_step(state, epoch)


def _tell_start(state: Run, start: StartClock) -> None:
    """After the first update: rank 0 logs how long each part of the start took."""
    state.start = None
    if rank() == 0:
        get_accelerator().synchronize()  # else the device is still at it
        start.passed('first update')
        start.tell(state.logger)


def _measure_save(state: Run, saves: bool, epoch: int) -> None:
    """Counts an update for TRAIN.SAVE_OVERHEAD; ``saves``: a save was being written in it."""
    if (interval := state.save_interval) is None or (preemption := state.preemption) is None:
        return
    interval.lap(saves or async_save.is_running() or state.saved == (epoch, _updates(state)))
    preemption.save_every = interval.seconds


def _updates(state: Run, epoch: int = 0) -> int:
    """Updates since the beginning of epoch 0, ``epoch`` whole ones before the present one."""
    assert state.loaders.train is not None
    group = accumulation_steps(state.config)
    whole = updates_per_epoch(state.config, len(state.loaders.train))
    return epoch * whole + math.ceil(state.position.micro_batches / group)


def _save_step(state: Run, epoch: int) -> None:
    place = epoch, _updates(state)
    if state.saved != place:
        _save(state, epoch, step=place[1])
    state.saved = place


def _write_monitor(state: Run, record: dict[str, Any]) -> None:
    """Sends the epoch's numbers to what the ds_config asks for: TensorBoard, CSV, ..."""
    monitor = state.engine.monitor
    if monitor.enabled:
        samples = state.engine.global_samples
        monitor.write_events([(f'Epoch/{k}', v, samples) for k, v in record.items()])


def _save_overflow(state: Run, epoch: int) -> None:
    _save(state, epoch, best='overflow', step=_updates(state))


def _save(state: Run, epoch: int, best: str | None = None, step: int | None = None) -> None:
    best_ema, decay = (None, None) if state.ema is None else (state.best_ema, state.ema.decay)
    save_checkpoint(
        state.config, epoch, state.engine, state.best, state.optimizer, state.scheduler,
        state.scaler, state.logger, state.ema, best_ema, decay, best=best, step=step,
        loop=state.position, class_names=state.loaders.classes,
    )  # fmt: skip
    if best is None and state.preemption is not None:
        state.preemption.saved()
        state.save_due = False
