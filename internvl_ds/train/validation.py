"""The evaluations of a run (before training, after an epoch, alone) and their log lines."""

from __future__ import annotations

import torch

from internvl_ds.checkpoint.restore import load_weights
from internvl_ds.dist.preemption import SAVE, STOP, Preempted
from internvl_ds.dist.reduce import reduce_tensor
from internvl_ds.dist.rendezvous import world_size
from internvl_ds.files.addresses import shown
from internvl_ds.train.datasets.imagenet import REAL
from internvl_ds.train.evaluate import EvalResult, MultiLabelResult, evaluate, measure_throughput
from internvl_ds.train.setup import Run


def evaluate_loaded(state: Run) -> None:
    """Evaluates what was loaded, before training, unless EVAL_LOADED is False. Collective.

    A checkpoint of something else shows here, not an epoch later.

    Raises:
        Preempted: on all ranks, when the run is to stop: there is nothing new to save.
    """
    model = state.config.MODEL
    if not (state.config.EVAL_LOADED and (model.RESUME or model.PRETRAINED)):
        return
    _report_accuracy(state, validate(state, 'weights as loaded'))
    if state.ema is not None and model.RESUME:
        with state.ema.swapped_in():
            _report_accuracy(state, validate(state, 'weights as loaded, EMA'), 'ema ')


def validate_epoch(state: Run, epoch: int) -> tuple[EvalResult, EvalResult | None]:
    """With the weights, and with their average where one is kept."""
    result = validate(state, f'epoch {epoch}')
    if state.ema is None:
        return result, None
    with state.ema.swapped_in():
        return result, validate(state, f'epoch {epoch}, EMA')


def validate(state: Run, what: str) -> EvalResult:
    """Evaluates the engine's weights, and logs the result under a name. Collective.

    Raises:
        Preempted: on all ranks, when the run is to stop.
    """

    def stop_if_asked() -> None:
        action = state.preemption.reached() if state.preemption is not None else None
        if action == STOP:
            raise Preempted
        # Not here: the averaged weights may be where the weights belong.
        state.save_due |= action == SAVE

    engine, loader = state.engine, state.loaders.val
    result = evaluate(state.config, engine, loader, engine.device, stop_if_asked)
    state.logger.info(f'{what}: {result.told()} on {result.count} validation images')
    return result


def report_evaluation(state: Run) -> float:
    """Evaluates a run of EVAL_MODE; returns the top-1 accuracy (or mAP), percent. Collective."""
    result = validate(state, 'evaluation')
    _report_accuracy(state, result)
    if state.averaged_weights is not None:
        where = f'EMA of {shown(state.config.MODEL.RESUME)}'
        load_weights(state.engine, state.averaged_weights, where)
        _report_accuracy(state, validate(state, 'evaluation, EMA'), 'ema ')
    return result.acc1


def report_throughput(state: Run) -> float:
    """Times forward passes; returns images per second over all ranks. Collective."""
    rate = measure_throughput(state.engine, state.loaders.val, state.engine.device)
    mean = reduce_tensor(torch.tensor(rate, device=state.engine.device)).item()
    total = mean * world_size()
    state.logger.info('throughput %.1f img/s on %d ranks', total, world_size())
    return total


def _report_accuracy(state: Run, result: EvalResult, which: str = '') -> None:
    """Logs the original's two lines of an evaluation; ``which``: 'ema ' for averaged weights."""
    real = 'ReaL ' if state.config.DATA.DATASET == REAL else ''
    log = state.logger.info
    if isinstance(result, MultiLabelResult):
        log(f'mAP of the {which}network on the {result.count} test images: {result.acc1:.1f}%')
        return
    accuracies = f'Acc@1 {result.acc1:.3f} Acc@5 {result.acc5:.3f}'
    log(f'* {real}{accuracies} loss {result.loss:.3f}' if real else f' * {accuracies}')
    network = f'{real}Accuracy of the {which}network'
    log(f'{network} on the {result.count} test images: {result.acc1:.1f}%')
