"""Resumes by DeepSpeed's own load: from a tag of the running layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from internvl_ds.checkpoint.checkpoint_engine import install_writer
from internvl_ds.checkpoint.formats.zero_shards import TagShards
from internvl_ds.checkpoint.load_context import Load
from internvl_ds.checkpoint.optimizer_state import RunningOptimizer, SavedTensor
from internvl_ds.checkpoint.restore_scheduler import restore_schedule, set_lr_of_schedule
from internvl_ds.dist.process_group import collectives_within
from internvl_ds.dist.rendezvous import rank
from internvl_ds.engine.optimizer_trial import NUMBER, Kept, forms_of, like
from internvl_ds.engine.registry import registration_of
from internvl_ds.engine.scheduling import restore_schedule_position
from internvl_ds.errors import CheckpointError, brief
from internvl_ds.files.reading import interpreting
from internvl_ds.zero.passes.unused import restore_idle
from internvl_ds.zero.wrapper import Wrapper


def load_same_layout(
    load: Load,
    engine: DeepSpeedEngine,
    shards: TagShards,
    state: dict[str, Any],
    ready: Callable[[], None],
) -> None:
    """Resumes from a tag by DeepSpeed's own load. Collective: every rank calls it.

    Args:
        load: what is restored beside the engine.
        engine: as the tag's layout is.
        shards: of the tag.
        state: of the tag, beside its tensors.
        ready: called on all ranks when all is checked, before anything is changed.
    """
    registration = registration_of(engine)
    wrapper = registration.wrapper
    scaled = ['lr_scale' in group for group in wrapper.client.param_groups]
    _load_engine(load, wrapper, shards, str(state.get('optimizer_class') or ''), ready)
    wrapper.restore_scale(state.get('loss_scale'))
    is_restored = restore_schedule(
        load.config, state, load.lr_scheduler, load.scaler, shards.tag, load.logger
    )
    restore_idle(wrapper, state.get('idle'))
    groups = wrapper.client.param_groups
    for group, had in zip(groups, scaled, strict=True):
        if not (is_restored or had):  # it goes with the schedule of earlier versions; see by name
            group.pop('lr_scale', None)
    position = restore_schedule_position(engine, state.get('schedule'), is_restored)
    is_stepped = load.lr_scheduler is registration.scheduler
    if not is_restored or (is_stepped and not shards.has_manifest):  # else the lr is in the shards
        set_lr_of_schedule(load.lr_scheduler, groups, position if is_stepped else shards.updates)


def _load_engine(
    load: Load, wrapper: Wrapper, shards: TagShards, saved_by: str, ready: Callable[[], None]
) -> None:
    engine, client, path = wrapper.engine, wrapper.client, shards.tag
    writer = install_writer(engine)

    def open_own_files() -> tuple[list[str], list[Kept | None]]:
        # Before any rank changes state or enters a collective: can this rank read its shards, and
        # are they the running optimizer's?
        with interpreting(path, CheckpointError):
            for files in (shards.model_files, shards.optim_files):
                if files:
                    writer.open(_own_file(files), shards)
            outcome = _require_same_optimizer(wrapper, shards, saved_by)
            if shards.zero_stage:
                state = shards.read(shards.optim_files[rank()])['optimizer_state_dict']
                _require_like(state, engine.optimizer.state_dict(), 'its optimizer_state_dict')
            return outcome

    def load_shards() -> None:
        with (
            interpreting(path, CheckpointError),
            wrapper.loading(str(_own_file(shards.model_files))),
            collectives_within(load.io_timeout),
        ):
            loaded, _ = engine.load_checkpoint(str(path.parent), tag=path.name)
        if loaded is None:
            raise CheckpointError(f'{path}: DeepSpeed found nothing to load in it')
        state = wrapper.inner.state
        _into_buffers(state, buffers)
        for (group, tensor), trial in zip(wrapper.slots(), trials, strict=True):
            _give_numbers_form(state.get(tensor) or {}, group, trial)

    try:
        warnings, trials = load.agree('read shards', open_own_files)
        for warning in warnings:
            load.logger.warning(warning)
        counters = {key for trial in trials if trial for key in trial.counters}
        keys = client.defaults.keys() - {'lr'} - counters
        settings = [{k: g[k] for k in keys & g.keys()} for g in engine.optimizer.param_groups]
        buffers = {p: dict(tensors) for p, tensors in wrapper.inner.state.items()}
        ready()
        load.agree('load shards', load_shards)
    finally:
        writer.close()
    # Those of the running configuration hold; the lr is the scheduler's.
    for group, values in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(values)


def _own_file(files: Sequence[Path]) -> Path:
    """The file that this rank reads, of one kind of shards."""
    return files[min(rank(), len(files) - 1)]


def _require_like(saved: Any, running: Any, what: str) -> None:
    """Raises TypeError, naming it, for the first value of another kind than DeepSpeed saves now."""
    alike = True
    if isinstance(running, Mapping):
        alike = isinstance(saved, Mapping)
        for key in running.keys() & saved.keys() if alike else ():
            _require_like(saved[key], running[key], f'{what}/{key}')
    elif isinstance(running, list | tuple):
        alike = isinstance(saved, list | tuple) and len(saved) == len(running)
        for index, pair in enumerate(zip(saved, running, strict=True) if alike else ()):
            _require_like(*pair, f'{what}/{index}')
    elif isinstance(running, torch.Tensor) and running.dim():
        alike = isinstance(saved, torch.Tensor) and saved.shape == running.shape
    elif isinstance(running, int | float | torch.Tensor):  # some count in tensors
        alike = isinstance(saved, int | float | None) or getattr(saved, 'shape', None) == ()
    elif isinstance(running, str):
        alike = isinstance(saved, str | None)
    elif running is not None:  # a loss scaler, of either class
        plain = Mapping | list | tuple | torch.Tensor | int | float | str | None
        alike = not isinstance(saved, plain)
    if not alike:
        raise TypeError(f'{what} is {brief(saved)}')


def _require_same_optimizer(
    wrapper: Wrapper, shards: TagShards, saved_by: str
) -> tuple[list[str], list[Kept | None]]:
    """Compares a tag of the same layout with the running optimizer; see `RunningOptimizer`.

    Returns warnings, and what the optimizer keeps for each of its tensors.
    """
    optimizer, stage = RunningOptimizer(wrapper.client), shards.zero_stage
    groups = shards.groups()
    names = groups if stage else [[name] for group in groups for name in group]
    comparisons = []
    slots = zip(wrapper.slots(), shards.optimizer_state(rank()), names, strict=True)
    for index, ((group, tensor), tensor_state, names_of_tensor) in enumerate(slots):
        # A partition is flat whatever the parameters' shapes.
        shape = None if stage else tensor.shape
        shown_names = [name for name in names_of_tensor if name] or [f'parameter {index}']
        entry = SavedTensor(shown_names, forms_of(tensor_state.state, shape), tensor_state.settings)
        comparisons.append((entry, group, tensor if tensor is not None else torch.empty(0)))
    warnings = optimizer.require_saved_by(str(shards.tag), saved_by, shards.fresh, comparisons)
    return warnings, [optimizer.kept(group, tensor) for _, group, tensor in comparisons]


def _give_numbers_form(state: dict[str, Any], group: Mapping[str, Any], trial: Kept | None) -> None:
    """Converts the numbers of a tensor's state to the form that this optimizer keeps.

    DeepSpeed's Adam for the CPU counts in an int, torch's in a tensor, apex's in the group.
    """
    if trial is None or not state:
        return
    for key in (key for key, form in trial.forms.items() if form == NUMBER):
        if key in state or key in group:
            state[key] = like(state.get(key, group.get(key)), trial.numbers[key])


@torch.no_grad()
def _into_buffers(state: Mapping[Any, dict[str, Any]], buffers: Mapping[Any, Any]) -> None:
    """Copies loaded optimizer state into the memory that held it before, or into memory of its own.

    torch's optimizers take over the tensors that they are given, which here are the file, mapped
    into memory.
    """
    for parameter, tensors in state.items():
        before = buffers.get(parameter, {})
        for key, tensor in tensors.items():
            if not isinstance(tensor, torch.Tensor) or tensor.device.type != 'cpu':
                continue
            memory = before.get(key)
            fits = isinstance(memory, torch.Tensor) and memory.device == tensor.device
            if fits and (memory.shape, memory.dtype) == (tensor.shape, tensor.dtype):
                tensors[key] = memory.copy_(tensor)
            else:
                tensors[key] = tensor.clone()
