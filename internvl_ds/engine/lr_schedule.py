"""The lr schedule that an engine steps: its unit, its position, and a check that only it steps."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from internvl_ds.dist.rendezvous import rank
from internvl_ds.errors import ConfigError

_log = logging.getLogger(__name__)

UPDATES, MICRO_BATCHES, ORIGINAL = 'updates', 'micro-batches', 'original'
UNITS = (UPDATES, MICRO_BATCHES, ORIGINAL)
_WORDS = {
    UPDATES: 'updates',
    MICRO_BATCHES: 'micro-batches',
    ORIGINAL: "micro-batches from 0 (as the original's loop does, one update later)",
}
# The length of a schedule: timm's name for it, and torch's.
_LENGTHS = ('t_initial', 'total_steps', 'T_max')


@dataclass
class LrSchedule:
    """A client's scheduler, with its unit and position.

    Attributes:
        scheduler: timm's or torch's.
        counts: 'updates' (applied ones) or 'micro-batches' (all that have come, those of skipped
            updates and dropped ones included). Both move it after an applied update only.
            'original': micro-batches from 0, and every whole update moves it, skipped or not, as
            ``step_update(epoch * len(loader) + idx)`` of the original's loop does.
        is_explicit: whether the client said which.
        group: micro-batches of a whole update when the schedule was built, in whose unit it counts.
        per_update: the same of the run as it is now.
        base, since: its position when the run's count of micro-batches was ``since``.
        moved: its position at the last move, where the learning rates are.
    """

    scheduler: Any
    counts: str
    is_explicit: bool
    group: int
    per_update: int
    base: float = 0
    since: int = 0
    moved: float = 0
    _mark: Any = None  # learning rates and count as this left them

    @classmethod
    def of(cls, scheduler: Any, schedule_in: str | None, accumulation_steps: int) -> LrSchedule:
        """A schedule at its beginning; see `require_unit`. Warns if its unit is not clear."""
        require_unit(scheduler, schedule_in)
        if schedule_in is None and accumulation_steps > 1 and rank() == 0:
            _log.warning(
                'lr_scheduler= is stepped by updates. If it was built over micro-batches, as by '
                'build_scheduler(config, optimizer, len(loader)), it would run '
                'TRAIN.ACCUMULATION_STEPS=%d times too slowly: then pass '
                "schedule_in='micro-batches'; schedule_in='updates' says that it counts updates",
                accumulation_steps,
            )
        is_explicit, counts = schedule_in is not None, schedule_in or UPDATES
        return cls(scheduler, counts, is_explicit, accumulation_steps, accumulation_steps)

    def position(self, updates: int, micro_batches: int) -> float:
        """The position of the schedule, in its unit.

        Args:
            updates: applied so far.
            micro_batches: that have come so far, in this process.
        """
        if self.counts == UPDATES:
            return updates
        count = micro_batches - self.since
        return _number(self.base + Fraction(count * self.group, self.per_update))

    def move(self, updates: int, micro_batches: int, groups: Sequence[Mapping[str, Any]]) -> None:
        """Moves the scheduler on, after an update.

        Args:
            updates, micro_batches: as of `position`.
            groups: the parameter groups whose lr it sets.
        """
        before, self.moved = self.moved_to, self.position(updates, micro_batches)
        if hasattr(self.scheduler, 'step_update'):
            self.scheduler.step_update(self.moved_to)
        else:
            for _ in range(int(self.moved_to) - int(before)):
                self.scheduler.step()
        self._mark = self._now(groups)

    def is_due(self, skipped: bool, whole: bool) -> bool:
        """Whether an update moves it.

        Args:
            skipped: for gradients that are not finite.
            whole: whether the update had as many micro-batches as were agreed on.
        """
        return whole if self.counts == ORIGINAL else not skipped

    @property
    def moved_to(self) -> float:
        """The number that the scheduler was given by the last move; 0 before any."""
        return max(0, self.moved - 1) if self.counts == ORIGINAL else self.moved

    def require_untouched(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Refuses a scheduler that the script steps too.

        Raises ConfigError when learning rates or the scheduler's count are not as this left them.
        """
        now = self._now(groups)
        if self._mark is not None and now != self._mark:
            raise ConfigError(
                f'the learning rates are {list(now[0])[:3]}, and {list(self._mark[0])[:3]} were '
                'set after the last update: the loop steps the lr_scheduler that the engine steps '
                'by itself. Remove lr_scheduler.step_update(...) or .step() from the loop (and '
                "pass schedule_in='micro-batches' where it was built over len(loader)), or do not "
                'pass lr_scheduler= to initialize or register.'
            )

    def state_dict(self, updates: int, micro_batches: int) -> dict[str, Any]:
        """The state for a checkpoint at a `position`, beside the scheduler's own state."""
        position = self.position(updates, micro_batches)
        return {
            'counts': self.counts, 'position': position, 'moved': self.moved, 'group': self.group
        }  # fmt: skip

    def restore(
        self, state: Mapping[str, Any] | None, updates: int, micro_batches: int, loaded: bool
    ) -> None:
        """Restores the position that a checkpoint was saved at.

        Args:
            state: of `state_dict`, or of `schedule_of_original`, which does not say what it counts;
                None for a checkpoint without: its updates are taken for whole ones.
            updates: applied so far, as restored.
            micro_batches: that have come so far, in this process.
            loaded: whether the scheduler itself was restored: then it counts what it counted, in
                the unit that it was built in. Else it is as this run has built it.
        """
        record, own_group = state or {}, self.group
        counts = record.get('counts', MICRO_BATCHES)
        if record and loaded:
            if record.get('counts', self.counts) != self.counts:
                if rank() == 0:
                    text = 'the lr schedule counts %s, as when it was saved, and not %s'
                    _log.warning(text, _WORDS[counts], _WORDS[self.counts])
                self.counts = counts
            self.group = record['group']
        self._mark, self.since, self.base = None, micro_batches, updates * self.group
        self.moved = updates if self.counts == UPDATES else self.base
        if record and UPDATES not in (counts, self.counts):
            scale = Fraction(1 if loaded else own_group, 1 if loaded else record['group'])
            self.base = _number(record['position'] * scale)
            self.moved = _number(record.get('moved', record['position']) * scale)

    def too_long(self, updates: int, epochs: int, all_epochs: int) -> str | None:
        """Whether the schedule turns out to count micro-batches, if its unit was not stated.

        Args:
            updates: applied so far.
            epochs: that have ended.
            all_epochs: TRAIN.EPOCHS.

        Returns:
            What to say of it; None where it fits.
        """
        names = [name for name in _LENGTHS if isinstance(vars(self.scheduler).get(name), int)]
        is_open = self.counts == UPDATES and not self.is_explicit and self.per_update > 1
        if not (is_open and names and min(updates, epochs, all_epochs) > 0):
            return None
        length = getattr(self.scheduler, names[0])
        plan, pace = length / all_epochs, updates / epochs
        # A schedule over updates has as many, one over micro-batches ``per_update`` times as many.
        if not (1 + self.per_update) / 2 <= plan / pace <= 2 * self.per_update:
            return None
        return (
            f'the lr schedule is too slow: {names[0]} {length} over {all_epochs} epochs is '
            f'{plan:g} an epoch, and an epoch has {pace:g} updates, by which it is stepped. It '
            "counts micro-batches: pass schedule_in='micro-batches' with lr_scheduler= (or "
            "schedule_in='updates' where this is meant)"
        )

    def _now(self, groups: Sequence[Mapping[str, Any]]) -> tuple[Any, Any]:
        # An lr that is a tensor would have to be read from the device.
        lrs = tuple(group['lr'] for group in groups if isinstance(group['lr'], float | int))
        return lrs, getattr(self.scheduler, 'last_epoch', None)


def _number(value: Fraction | float) -> float:
    """An int where it is one: timm seeds its noise with it."""
    return int(value) if value == int(value) else float(value)


def require_unit(scheduler: Any, schedule_in: str | None) -> None:
    """Raises ConfigError for a scheduler that counts epochs, and for an unknown unit."""
    if schedule_in not in (None, *UNITS):
        raise ConfigError(
            f"schedule_in={schedule_in!r}: it is 'updates', 'micro-batches' or 'original' "
            "(micro-batches from 0, as the original's loop), which is what the lr_scheduler counts"
        )
    if schedule_in is not None and scheduler is None:
        raise ConfigError(f'schedule_in={schedule_in!r} says what lr_scheduler= counts: pass both')
    if getattr(scheduler, 't_in_epochs', False):
        raise ConfigError(
            f'{type(scheduler).__name__} counts epochs (t_in_epochs=True), and an engine steps '
            'it by updates: build it with t_in_epochs=False, or keep it and step it yourself'
        )
