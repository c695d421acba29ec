"""The position of a run inside an epoch, to resume from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from internvl_ds.errors import brief


@dataclass
class Position:
    """A place in an epoch, always after a whole update; kept in every tag, for each rank.

    Attributes:
        micro_batches: how many of the epoch each rank has done; 0 at an epoch's beginning.
        complete: whether these are all of the epoch, and only its evaluation is left.
        images: in a micro-batch, over all ranks.
        ranks: how many there were.
        meters: what `Progress.state_dict` told there.
        order: what the epoch's order of images depends on, from `internvl_ds.train.data.order_of`;
            empty where that is not known.
        record: the metrics of the epoch before, for a run that was killed before it wrote them.
    """

    micro_batches: int = 0
    complete: bool = False
    images: int = 0
    ranks: int = 0
    meters: dict[str, Any] = field(default_factory=dict)
    order: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)

    def reset(self) -> None:
        """Goes to the beginning of the next epoch."""
        self.micro_batches, self.complete, self.meters = 0, False, {}

    def state_dict(self) -> dict[str, Any]:
        """For `save_checkpoint`."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """For `load_checkpoint`; `fit` has to follow.

        Raises:
            ValueError: for a value of another type, before anything is taken over.
        """
        fields = asdict(self)
        saved = {name: state[name] for name in state.keys() & fields.keys()}
        for name, value in saved.items():
            if type(value) is not type(fields[name]) or (type(value) is int and value < 0):
                raise ValueError(f'{name} of a position is {brief(value)}')
        vars(self).update(saved)

    def fit(
        self,
        images: int,
        ranks: int,
        group: int,
        total: int,
        logger: logging.Logger,
        order: Mapping[str, Any] | None = None,
    ) -> bool:
        """Converts a loaded position to the batch sizes and ranks of this run.

        With another batch or number of ranks that is the last whole update before the images that
        all ranks together have seen. In another order of images the epoch is begun anew.

        Args:
            images: in a micro-batch, over all ranks, now.
            ranks: now.
            group: micro-batches of an update, now.
            total: micro-batches of an epoch, now.
            logger: gets a warning where images will be seen twice.
            order: what the order of images depends on, now; None where that is not known.

        Returns:
            Whether it is a position of the same ranks, whose generators and meters go on.
        """
        same = ranks == self.ranks
        if self.micro_batches and not self.complete and self._order_changed(order, logger):
            self.micro_batches, same = 0, False
        before = self.micro_batches * self.images
        if self.complete:
            self.micro_batches = total
        elif images:
            self.micro_batches = min(before // images, total)
            self.micro_batches -= self.micro_batches % group
            if self.micro_batches * images != before:
                logger.warning(
                    f'the epoch goes on after {self.micro_batches * images} of its images; '
                    f'{before} have been seen: another batch size or number of ranks has no whole '
                    'update there, and repeats the rest'
                )
        self.images, self.ranks, self.order = images, ranks, dict(order or {})
        if not same:
            self.meters = {}
        return same

    def _order_changed(self, now: Mapping[str, Any] | None, logger: logging.Logger) -> bool:
        if not self.order or not now:
            logger.warning(
                f'an epoch goes on after {self.micro_batches} micro-batches, and it is not known '
                'whether its order of images is still the same: if images or the SEED have changed '
                'since, some images are seen twice in it, and others not at all'
            )
            return False
        both = {key: (self.order.get(key), now.get(key)) for key in {**self.order, **now}}
        changed = {key: pair for key, pair in both.items() if pair[0] != pair[1]}
        if changed:
            logger.warning(
                f'the epoch is begun anew: after {self.micro_batches} of its micro-batches the '
                f'order of its images has changed; (then, now) differ in {changed}'
            )
        return bool(changed)
