"""The order of training images, and their augmentation seeds: functions of the seed alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler, get_worker_info


class Draw(NamedTuple):
    """One image of an epoch: its number in the data set, and the seed of its augmentation."""

    image: int
    seed: int


class TrainSampler(Sampler[Draw]):
    """Deals a shuffled data set out to the ranks, from any position of the epoch on.

    The order depends on (seed, epoch) alone, and image number n of it goes to rank n % world_size;
    the last few that do not come out even are left out. The seed of an image's augmentation depends
    on (seed, epoch, n): not on the rank, nor on what was drawn before.

    Attributes:
        parts: None; or, where each rank draws from a part of its own, how many there are.
        repeats: how many times in a row the order has each image.
    """

    def __init__(
        self,
        total: int,
        world_size: int,
        rank: int,
        seed: int,
        *,
        parts: bool = False,
        repeats: int = 1,
    ) -> None:
        """Starts at the beginning of epoch 0.

        Args:
            total: images in the data set.
            world_size, rank: of the processes that share it.
            seed: the config's SEED.
            parts: give image i to rank i % world_size in every epoch, so that a rank reads the
                same images again and again; of those, it is the same order that decides.
            repeats: how many times in a row the order has each image, each time with a seed of its
                own, and so on as many ranks; of this order an epoch has the first ``total``.
        """
        self.parts, self.repeats = world_size if parts else None, max(1, repeats)
        self._total, self._world_size, self._rank = total, world_size, rank
        self._seed, self._epoch, self._first = abs(seed), 0, 0

    def start(self, epoch: int, first: int = 0) -> None:
        """Sets what the next iteration yields.

        Args:
            epoch: counted from 0.
            first: how many images of this rank's share to leave out, which were seen before.
        """
        self._epoch, self._first = epoch, first

    def __iter__(self) -> Iterator[Draw]:
        # As torch's DistributedSampler shuffles.
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        order = torch.randperm(self._total, generator=generator)
        # As timm's RepeatAugSampler repeats.
        order = order.repeat_interleave(self.repeats)[: self._total]
        if self.parts:
            own_order = order[order % self._world_size == self._rank].tolist()
        else:
            own_order = order[self._rank :: self._world_size].tolist()
        for own in range(self._first, len(self)):
            number = own * self._world_size + self._rank
            seeds = np.random.SeedSequence([self._seed, self._epoch, number])
            yield Draw(own_order[own], int(seeds.generate_state(1)[0]))

    def __len__(self) -> int:
        """Images of a whole epoch on each rank."""
        return self._total // self._world_size


class SeededImages(Dataset):
    """A data set indexed by `Draw`; leaves the global generators unchanged."""

    def __init__(self, images: Any) -> None:
        self.images = images

    def __getitem__(self, draw: Draw) -> Any:
        if get_worker_info() is not None:  # nothing else draws there; 7 of 96 us are the seeds
            return self._augmented(draw)
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        try:
            return self._augmented(draw)
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])

    def _augmented(self, draw: Draw) -> Any:
        random.seed(draw.seed)
        np.random.seed(draw.seed)
        torch.default_generator.manual_seed(draw.seed)  # torch.manual_seed would reach the GPU's
        return self.images[draw.image]

    def __len__(self) -> int:
        return len(self.images)
