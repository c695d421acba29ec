"""Whether a saved optimizer state is the running optimizer's: its class, its keys, its form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from internvl_ds.engine.optimizer_trial import (
    ELEMENTS,
    NOT_SETTINGS,
    NUMBER,
    TENSOR,
    Form,
    Kept,
    Trials,
)
from internvl_ds.errors import CheckpointError, CheckpointMismatch, few

# Classes whose state means the same under the same keys. Another's may have equal keys (RAdam's are
# Adam's), and training would go on from it without a word.
_FAMILIES = (
    frozenset({'Adam', 'AdamW', 'AdamWLegacy', 'FusedAdam', 'DeepSpeedCPUAdam'}),
    frozenset({'Lion', 'FusedLion', 'DeepSpeedCPULion'}),
    frozenset({'SGD', 'SGDW'}),
)

REMEDY = (
    'Resume with the optimizer and the settings that it was saved with, or take its weights only: '
    'name it in MODEL.PRETRAINED in place of MODEL.RESUME (load_pretrained, before initialize), '
    'with another OUTPUT where TRAIN.AUTO_RESUME is on; or evaluate with EVAL_MODE.'
)


class SavedTensor(NamedTuple):
    """The optimizer state in a checkpoint for one tensor.

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


def require_optimizer(client: Any) -> None:
    """Raises CheckpointError for an engine without an optimizer: it cannot resume training."""
    if client is None:
        raise CheckpointError('this engine has no optimizer: load with EVAL_MODE')


class RunningOptimizer:
    """The state that the running optimizer keeps, by group. Reading changes nothing."""

    def __init__(self, optimizer: Any) -> None:
        """Takes the optimizer of the client, or of DeepSpeed."""
        self.optimizer = optimizer
        self.name = optimizer_name(optimizer)
        self.kept = Trials(optimizer).kept

    def require_saved_by(self, where: str, saved_by: str, fresh: bool, states: States) -> list[str]:
        """Raises CheckpointMismatch, naming both, for the state of another optimizer.

        Args:
            where: the checkpoint's path, for errors.
            saved_by: the class that it was saved with; '' where it does not say.
            fresh: whether it was saved before the first update.
            states: of each tensor its saved state, the settings of its group now, and itself.

        Returns:
            Warnings: another class of the family, changed settings, nothing that could be compared.
        """
        is_related = not saved_by or same_family(saved_by, self.name)
        is_stateless = not saved_by and not any(entry.forms for entry, _, _ in states)
        changes: dict[str, tuple[Any, Any]] = {}
        is_unknown = False
        for entry, settings, tensor in states:
            trial = self.kept(settings, tensor)
            is_unknown = is_unknown or (trial is None and not saved_by)
            changes = {**self._changes(entry.settings, settings, trial), **changes}
            if trial is None or (fresh and not entry.forms):
                fits = True  # saved before the first update, there is nothing to take over
            elif entry.forms:
                fits = _same_forms(entry, trial)
            elif is_stateless:  # nor does anything else say which optimizer that was
                fits = not trial.forms
            else:  # of a parameter that had no gradient, or of a plain SGD
                old_trial = self.kept({**settings, **entry.settings}, tensor)
                fits = old_trial is None or old_trial.forms == trial.forms
            if not (is_related and fits):
                raise self._mismatch(where, saved_by, entry, trial, settings)
        warnings = []
        if is_unknown:
            warnings.append(
                f'{where} does not say which optimizer it was saved with, and what {self.name} '
                'keeps cannot be told: make sure that it is the same'
            )
        if saved_by and saved_by != self.name:
            warnings.append(f'{where}: {self.name} goes on from the state of {saved_by}')
        if changes:
            warnings.append(f'{where}: (saved, now) of the optimizer differ, now holds: {changes}')
        return warnings

    def _changes(
        self, saved: Mapping[str, Any], now: Mapping[str, Any], trial: Kept | None
    ) -> dict[str, tuple[Any, Any]]:
        """The changed settings of a group, without scheduled ones: key -> (saved, now)."""
        keys = self.optimizer.defaults.keys() - NOT_SETTINGS - set(trial.counters if trial else ())
        return {
            key: (saved[key], now[key])
            for key in sorted(keys & saved.keys() & now.keys())
            if not _equal(saved[key], now[key])
        }

    def _mismatch(
        self, where: str, saved_by: str, entry: SavedTensor, trial: Kept | None, settings: Mapping
    ) -> CheckpointMismatch:
        with_forms = trial is not None and entry.forms.keys() == trial.forms.keys()
        text = f'{where}: holds {_list_of(entry.forms, with_forms)} of '
        text += f'{saved_by or "an optimizer"} for {few(entry.names, 3)}, and {self.name} keeps '
        text += _list_of(trial.forms, with_forms) if trial else 'a state of its own'
        changes = self._changes(entry.settings, settings, trial)
        if saved_by != self.name or changes:
            text += ': it was saved with another optimizer'
            text += f', by its settings (saved, now): {changes}' * (saved_by == self.name)
        else:
            text += ' in this layout: its state goes on only in the layout that it was saved in'
        return CheckpointMismatch(f'{text}. {REMEDY}')


States = Sequence[tuple[SavedTensor, Mapping[str, Any], torch.Tensor]]


def same_family(one: str, other: str) -> bool:
    """Whether two classes' state means the same under the same keys."""
    return one == other or any({one, other} <= family for family in _FAMILIES)


def _equal(one: Any, other: Any) -> bool:
    numbers = isinstance(one, int | float) and isinstance(other, int | float)
    return one == other if numbers else repr(one) == repr(other)


def _same_forms(entry: SavedTensor, trial: Kept) -> bool:
    for key in entry.forms.keys() | trial.forms.keys():
        form, running = entry.forms.get(key), trial.forms.get(key)
        if running is None:
            # Its number may be kept for all parameters of a group together, or be a later one's.
            if key not in trial.late and not (key in trial.counters and form == NUMBER):
                return False
        elif form is None:
            if running != NUMBER or key not in entry.settings:
                return False
        elif form == TENSOR:
            if running != ELEMENTS and not isinstance(running, tuple):
                return False
        elif form != running:
            shapes = isinstance(form, tuple) and isinstance(running, tuple)
            if trial.exact or not shapes or len(form) != len(running):
                return False
    return True


def _list_of(forms: Mapping[str, Form], with_forms: bool) -> str:
    if not forms:
        return 'no state'
    entries = [
        f'{key} {form}' if with_forms and form not in (NUMBER, ELEMENTS, TENSOR) else key
        for key, form in sorted(forms.items())
    ]
    return f'[{", ".join(entries)}]'
