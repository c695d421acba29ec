"""The work that failures of hosts cost, and how often to save against it. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from yacs.config import CfgNode


@dataclass(frozen=True)
class Failures:
    """What is expected of a run in which any host may fail at any moment."""

    hosts: int
    between: float  # seconds from a failure to the next, of all hosts together, on average
    interval: float  # seconds from a save to the next
    setting: str  # that makes it so; '' where it is the best, and none says so
    saving: float  # share of the time that saves take, at the most
    lost: float  # share of the time whose work is done again

    @property
    def words(self) -> str:
        """For people."""
        every = _time(self.interval)
        says = f'as {self.setting} has it' if self.setting else 'which loses least'
        advice = '' if self.setting else f' (TRAIN.SAVE_MINUTES {self.interval / 60:.3g})'
        return (
            f'Of {self.hosts} hosts one fails every {_time(self.between)} on average. With a save '
            f'every {every}{advice}, {says}, a failure costs {_time(self.interval / 2)} of work '
            f'and the start: {100 * self.lost:.2g} % of the time, beside '
            f'{100 * self.saving:.2g} % for saves at the most.'
        )


def failures(config: CfgNode, save_seconds: float, hosts: int, hours: float) -> Failures:
    """What to expect of failures, and of saves at the rate that the config, or else theory, has.

    The best interval is sqrt(2 x seconds of a save x seconds between failures), of Young ("A first
    order approximation to the optimum checkpoint interval", CACM 17:9, 1974).

    Args:
        config: TRAIN.SAVE_OVERHEAD and TRAIN.SAVE_MINUTES are read.
        save_seconds: that training waits for a save, at the most.
        hosts: any of which ends the run when it fails.
        hours: between two failures of one host, on average.
    """
    between, train = 3600 * hours / hosts, config.TRAIN
    if train.SAVE_OVERHEAD:
        interval, key = save_seconds / train.SAVE_OVERHEAD, 'SAVE_OVERHEAD'
    elif train.SAVE_MINUTES:
        interval, key = 60 * train.SAVE_MINUTES, 'SAVE_MINUTES'
    else:
        interval, key = math.sqrt(2 * save_seconds * between), ''
    setting = f'TRAIN.{key} {getattr(train, key):g}' if key else ''
    lost = interval / 2 / between
    return Failures(hosts, between, interval, setting, save_seconds / interval, lost)


def _time(seconds: float) -> str:
    for unit, name in ((86400, 'days'), (3600, 'h'), (60, 'min')):
        if seconds >= 2 * unit:
            return f'{seconds / unit:.3g} {name}'
    return f'{seconds:.3g} s'
