"""Whether a saved optimizer state is the running optimizer's: its class, its keys, its form.

What an optimizer keeps for a tensor is found out by a step of a copy of it on a tensor of its own.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from internvl_ds.errors import CheckpointError, CheckpointMismatch, few

# Classes whose state means the same under the same keys. Another's may have equal keys (RAdam's are
# Adam's), and training would go on from it without a word.
_FAMILIES = (
    frozenset({'Adam', 'AdamW', 'AdamWLegacy', 'FusedAdam', 'DeepSpeedCPUAdam'}),
    frozenset({'Lion', 'FusedLion', 'DeepSpeedCPULion'}),
    frozenset({'SGD', 'SGDW'}),
)

# State of DeepSpeed's own, which cannot be tried on a copy: that would end the original's.
_MOMENT = torch.empty(1)
_DEEPSPEED: dict[str, dict[str, Any]] = {
    'FusedAdam': {'exp_avg': _MOMENT, 'exp_avg_sq': _MOMENT, 'step': 0},
    'DeepSpeedCPUAdam': {'exp_avg': _MOMENT, 'exp_avg_sq': _MOMENT, 'step': 0},
    'FusedLion': {'exp_avg': _MOMENT, 'step': 0},
    'DeepSpeedCPULion': {'exp_avg': _MOMENT, 'step': 0},
    'DeepSpeedCPUAdagrad': {'exp_avg_sq': _MOMENT, 'step': 0},
}

# Which tensors a group holds, and what moves with the schedule: no settings of the optimizer.
_NOT_SETTINGS = frozenset(
    {'params', 'param_names', 'names', 'name', 'lr', 'initial_lr', 'lr_scale'}
)

# Elements of the largest tensor that is tried in its own shape, and updates after which no key is
# new any more: timm's Lookahead has one after its sixth.
_LARGEST, _SMALL, _UPDATES = 1 << 20, (3,), 32

REMEDY = (
    'Resume with the optimizer and the settings that it was saved with, or take its weights only: '
    'name it in MODEL.PRETRAINED in place of MODEL.RESUME (load_pretrained, before initialize), '
    'with another OUTPUT where TRAIN.AUTO_RESUME is on; or evaluate with EVAL_MODE.'
)

# What a value of a state is: a number, a tensor of the parameter's own shape, of one that does not
# matter, or of another; or else the name of its type.
Form = tuple[int, ...] | str
NUMBER, ELEMENTS, TENSOR = 'number', 'elements', 'tensor'


class Kept(NamedTuple):
    """What an optimizer keeps for a tensor of one of its groups.

    Attributes:
        forms: key -> its form, after the first update.
        numbers: key -> a number of it, for its type.
        exact: whether the tensor was tried in its own shape; else a shape's dimensions count only.
        late: keys that come with a later update only.
        counters: entries of the group that updates change, such as the ``step`` of timm's Lamb ->
            their value after some.
    """

    forms: Mapping[str, Form]
    numbers: Mapping[str, Any]
    exact: bool
    late: frozenset[str] = frozenset()
    counters: Mapping[str, Any] = {}


class SavedTensor(NamedTuple):
    """What a checkpoint holds of an optimizer for one tensor.

    Attributes:
        names: of the parameters that lie in it, for messages.
        forms: key -> form of its state; empty where there is none.
        settings: of the group that it was in.
    """

    names: Sequence[str]
    forms: Mapping[str, Form]
    settings: Mapping[str, Any]


def optimizer_name(optimizer: Any) -> str:
    """The class of an optimizer, as a tag keeps it; 'Lookahead(AdamW)' for one around another."""
    inner = getattr(optimizer, '_base_optimizer', None)
    return type(optimizer).__name__ + ('' if inner is None else f'({optimizer_name(inner)})')


def state_of_optimizer(optimizer: Any) -> Any:
    """Tensor -> its state; of the optimizer inside, where timm's Lookahead is around it."""
    return getattr(optimizer, '_base_optimizer', optimizer).state


def require_optimizer(engine: Any) -> None:
    """Refuses to go on training in an engine that cannot.

    Raises:
        CheckpointError: when it has no optimizer.
    """
    if getattr(engine, 'basic_optimizer', None) is None:
        raise CheckpointError('this engine has no optimizer: load with EVAL_MODE')


def slots_of(engine: Any) -> list[tuple[dict[str, Any], torch.Tensor]]:
    """The tensors of an engine's optimizer in its order, each with the group that it is in."""
    groups = engine.basic_optimizer.param_groups
    if engine.zero_optimization_stage() != 3:
        return [(group, tensor) for group in groups for tensor in group['params']]
    optimizer = engine.optimizer  # between updates its groups are empty
    return [
        (groups[optimizer.sub_group_to_group_id[index]], tensor)
        for index, tensor in enumerate(optimizer.fp32_partitioned_groups_flat)
    ]


def form_of(value: Any, shape: Sequence[int] | None = None) -> Form:
    """The form of what an optimizer keeps for a tensor.

    Args:
        value: a number, a tensor or a `Flat`, or anything else.
        shape: of the tensor that it is kept for; None where shapes do not matter.
    """
    if isinstance(value, int | float):
        return NUMBER
    own = getattr(value, 'shape', None)
    if own is None:
        return type(value).__name__
    if not len(own):
        return NUMBER
    if shape is None:
        return TENSOR
    return ELEMENTS if tuple(own) == tuple(shape) else tuple(own)


def forms_of(state: Mapping[str, Any], shape: Sequence[int] | None = None) -> dict[str, Form]:
    """The forms of a tensor's state; what is None is nothing. See `form_of`."""
    return {key: form_of(value, shape) for key, value in state.items() if value is not None}


class RunningOptimizer:
    """What the optimizer that runs keeps, group by group. Asking changes nothing of it."""

    def __init__(self, optimizer: Any) -> None:
        """Takes the client's optimizer, or the one that DeepSpeed made."""
        self.optimizer = optimizer
        self.name = optimizer_name(optimizer)
        self._tried: dict[Any, Any] = {}

    def kept(self, settings: Mapping[str, Any], tensor: torch.Tensor) -> Kept | None:
        """What it keeps for a tensor.

        Args:
            settings: of the tensor's group.
            tensor: of which shape, dtype and device matter.

        Returns:
            None where that cannot be told.
        """
        if type(self.optimizer).__module__.startswith('deepspeed.'):
            state = _DEEPSPEED.get(self.name)
            return None if state is None else Kept(forms_of(state, (1,)), state, True)
        moved = self._after(_UPDATES, settings, tensor, _SMALL)
        if moved is None:
            return None
        # What it has counted so far does not count: the copy begins anew.
        defaults, counters = self.optimizer.defaults, moved.counters
        fresh = {k: v for k, v in settings.items() if k not in counters}
        fresh.update({key: defaults[key] for key in counters if key in defaults})
        shape = _cut(tensor.shape)
        first = self._after(1, fresh, tensor, shape)
        small = self._after(1, fresh, tensor, _SMALL)
        later = self._after(_UPDATES, fresh, tensor, _SMALL)
        if first is None or small is None or later is None:
            return None
        late = frozenset(later.forms.keys() - small.forms.keys())
        return Kept(first.forms, first.numbers, shape == tensor.shape, late, counters)

    def _after(
        self,
        updates: int,
        settings: Mapping[str, Any],
        tensor: torch.Tensor,
        shape: tuple[int, ...],
    ) -> Kept | None:
        """What a copy keeps for a blank tensor after updates; None where it cannot be stepped."""
        own = sorted((key, repr(settings[key])) for key in settings.keys() - _NOT_SETTINGS)
        key = (updates, tuple(own), shape, tensor.dtype, tensor.device)
        if key not in self._tried:
            blank = torch.ones(shape, dtype=tensor.dtype, device=tensor.device)
            kind = tensor.device.type
            devices = [] if kind == 'cpu' else [tensor.device]
            with (
                torch.random.fork_rng(devices, device_type=kind if devices else 'cuda'),
                torch.compiler.set_stance('force_eager'),
            ):
                try:
                    self._tried[key] = _stepped(self.optimizer, settings, blank, updates)
                except Exception:  # it needs a closure, or more than its class says
                    self._tried[key] = None
        return self._tried[key]

    def require_saved_by(self, where: str, saved_by: str, fresh: bool, found: Found) -> list[str]:
        """Refuses the state of another optimizer.

        Args:
            where: the checkpoint's path, for errors.
            saved_by: the class that it was saved with; '' where it does not say.
            fresh: whether it was saved before the first update.
            found: each tensor's saved state, the settings of the group it is in now, and itself.

        Returns:
            Warnings: of another class of the family, of settings that are others now, and where
            nothing could be compared.

        Raises:
            CheckpointMismatch: naming both optimizers and what they keep.
        """
        related = not saved_by or same_family(saved_by, self.name)
        stateless = not saved_by and not any(saved.forms for saved, _, _ in found)
        changed: dict[str, tuple[Any, Any]] = {}
        unknown = False
        for saved, settings, tensor in found:
            kept = self.kept(settings, tensor)
            unknown = unknown or (kept is None and not saved_by)
            changed = {**self._changed(saved.settings, settings, kept), **changed}
            if kept is None or (fresh and not saved.forms):
                fits = True  # saved before the first update, there is nothing to take over
            elif saved.forms:
                fits = _same_forms(saved, kept)
            elif stateless:  # nor does anything else say which optimizer that was
                fits = not kept.forms
            else:  # of a parameter that had no gradient, or of a plain SGD
                before = self.kept({**settings, **saved.settings}, tensor)
                fits = before is None or before.forms == kept.forms
            if not (related and fits):
                raise self._mismatch(where, saved_by, saved, kept, settings)
        said = []
        if unknown:
            said.append(
                f'{where} does not say which optimizer it was saved with, and what {self.name} '
                'keeps cannot be told: make sure that it is the same'
            )
        if saved_by and saved_by != self.name:
            said.append(f'{where}: {self.name} goes on from the state of {saved_by}')
        if changed:
            said.append(f'{where}: (saved, now) of the optimizer differ, now holds: {changed}')
        return said

    def _changed(
        self, saved: Mapping[str, Any], now: Mapping[str, Any], kept: Kept | None
    ) -> dict[str, tuple[Any, Any]]:
        """The settings of a group, but for what moves: key -> (saved, now) where they differ."""
        keys = self.optimizer.defaults.keys() - _NOT_SETTINGS - set(kept.counters if kept else ())
        return {
            key: (saved[key], now[key])
            for key in sorted(keys & saved.keys() & now.keys())
            if not _equal(saved[key], now[key])
        }

    def _mismatch(
        self,
        where: str,
        saved_by: str,
        saved: SavedTensor,
        kept: Kept | None,
        settings: Mapping[str, Any],
    ) -> CheckpointMismatch:
        with_forms = kept is not None and saved.forms.keys() == kept.forms.keys()
        text = f'{where}: holds {_listed(saved.forms, with_forms)} of '
        text += f'{saved_by or "an optimizer"} for {few(saved.names, 3)}, and {self.name} keeps '
        text += _listed(kept.forms, with_forms) if kept else 'a state of its own'
        changed = self._changed(saved.settings, settings, kept)
        if saved_by != self.name:
            text += ': it was saved with another optimizer'
        elif changed:
            text += (
                f': it was saved with another optimizer, by its settings (saved, now): {changed}'
            )
        else:
            text += ' in this layout: its state goes on only in the layout that it was saved in'
        return CheckpointMismatch(f'{text}. {REMEDY}')


Found = Sequence[tuple[SavedTensor, Mapping[str, Any], torch.Tensor]]


def same_family(one: str, other: str) -> bool:
    """Whether two classes' state means the same under the same keys."""
    return one == other or any({one, other} <= family for family in _FAMILIES)


def like(value: Any, other: Any) -> Any:
    """A copy of a value; a number in the form of another: a tensor as it is, an int or a float."""
    if form_of(value) != NUMBER:
        return copy.deepcopy(value)
    if isinstance(other, int | float):
        return type(other)(value)
    dtype, device = (other.dtype, other.device) if torch.is_tensor(other) else (torch.float32, None)
    return torch.tensor(float(value), dtype=dtype, device=device)


def _equal(one: Any, other: Any) -> bool:
    numbers = isinstance(one, int | float) and isinstance(other, int | float)
    return one == other if numbers else repr(one) == repr(other)


def _same_forms(saved: SavedTensor, kept: Kept) -> bool:
    for key in saved.forms.keys() | kept.forms.keys():
        found, needed = saved.forms.get(key), kept.forms.get(key)
        if needed is None:
            # Its number may be kept for all parameters of a group together, or be a later one's.
            if key not in kept.late and not (key in kept.counters and found == NUMBER):
                return False
        elif found is None:
            if needed != NUMBER or key not in saved.settings:
                return False
        elif found == TENSOR:
            if needed != ELEMENTS and not isinstance(needed, tuple):
                return False
        elif found != needed:
            shapes = isinstance(found, tuple) and isinstance(needed, tuple)
            if kept.exact or not shapes or len(found) != len(needed):
                return False
    return True


def _listed(forms: Mapping[str, Form], with_forms: bool) -> str:
    if not forms:
        return 'no state'
    shown = [
        f'{key} {form}' if with_forms and form not in (NUMBER, ELEMENTS, TENSOR) else key
        for key, form in sorted(forms.items())
    ]
    return f'[{", ".join(shown)}]'


def _cut(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape, its long sides cut where the tensor would be too large to try."""
    if math.prod(shape) <= _LARGEST:
        return tuple(shape)
    side = int(_LARGEST ** (1 / len(shape)))
    return tuple(min(n, side) for n in shape)


def _stepped(
    optimizer: Any, settings: Mapping[str, Any], blank: torch.Tensor, updates: int
) -> Kept:
    """What a copy keeps for a parameter of its own after updates."""
    parameter = nn.Parameter(blank)
    memo: dict[int, Any] = {
        id(p): parameter for group in optimizer.param_groups for p in group['params']
    }
    own = copy.deepcopy({key: value for key, value in settings.items() if key != 'params'}, memo)
    group = {**own, 'params': [parameter]}
    trial = _apart(optimizer, [group], memo)
    for _ in range(updates):
        parameter.grad = torch.ones_like(parameter)
        type(optimizer).step(trial)
    state = state_of_optimizer(trial)[parameter]
    forms = forms_of(state, parameter.shape)
    numbers = {key: state[key] for key, form in forms.items() if form == NUMBER}
    entries = group.keys() - _NOT_SETTINGS
    counters = {k: group[k] for k in entries if repr(group[k]) != repr(settings.get(k))}
    return Kept(forms, numbers, True, frozenset(), counters)


def _apart(optimizer: Any, groups: list[dict[str, Any]], memo: dict[int, Any]) -> Any:
    """A copy of an optimizer for other groups, which shares nothing that a step could change."""
    trial: Any = object.__new__(type(optimizer))
    memo[id(optimizer)] = trial
    for name, value in vars(optimizer).items():
        if name.endswith('_hooks'):
            trial.__dict__[name] = OrderedDict()
        elif isinstance(value, torch.optim.Optimizer):
            trial.__dict__[name] = _apart(value, groups, memo)
        elif isinstance(value, nn.Module):
            trial.__dict__[name] = value
        elif name not in ('state', 'param_groups', 'step'):  # a scheduler puts a step there
            trial.__dict__[name] = copy.deepcopy(value, memo)
    trial.state, trial.param_groups = defaultdict(dict), groups
    return trial
