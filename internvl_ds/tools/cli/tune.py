"""Find a fast ds_config by short runs of the training program, through your launcher.

    internvl-ds tune --cfg digits_quickstart --data-path data/digits -- deepspeed --num_gpus 2

A trial that runs out of memory, crashes or hangs is a row of trials.csv; the others go on. Started
again with the same words and --output, tuning goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any

from internvl_ds.tools.cli.quantities import whole
from internvl_ds.tools.text import json_text, say, table

_SIGNAL_STATUS = 128  # and the signal's number: the exit status of what a signal ended


class _Signal(BaseException):
    """A signal asks tuning to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what ``tune`` takes."""
    add = parser.add_argument
    add('--cfg', required=True, metavar='YAML', help='as for the training program')
    add('--data-path', metavar='DIR', help='as for the training program')
    add('--opts', nargs='+', default=[], metavar='KEY VALUE', help='as for the training program')
    text = 'the ds_config that tuning starts from (default: none)'
    add('--deepspeed_config', '--deepspeed-config', metavar='FILE', help=text)
    text = 'JSON of what to try, as internvl_ds/tools/tune/search_space.py says (default: built in)'
    add('--space', type=Path, metavar='FILE', help=text)
    add('--output', type=Path, default=Path('tune'), metavar='DIR', help='default: ./tune')
    add('--trials', type=whole(1), default=40, metavar='N', help='configurations to run (40)')
    add('--budget', type=_positive, default=30, metavar='MINUTES', help='for all trials (30)')
    add('--confirm', type=whole(0), default=3, metavar='ROUNDS', help='rounds of the finals (3)')
    add('--updates', type=whole(0), default=0, metavar='N', help='timed (0: what takes 3 s)')
    add('--warmup', type=whole(0), default=3, metavar='N', help='updates that are not timed (3)')
    text = 'of one trial (default: four times the first, at least 120)'
    add('--limit', type=_positive, default=0, metavar='SECONDS', help=text)
    add('--ranks', type=whole(1), default=0, metavar='N', help='that the launcher has to start')
    add('--seed', type=int, default=0, metavar='N', help='of the search (0)')
    add('--json', action='store_true', help='print one JSON object')
    add('launcher', nargs='*', metavar='-- LAUNCHER ...', help='such as: deepspeed --num_gpus 2')


def run(args: argparse.Namespace) -> int:
    """Tunes, and prints the finals and the words to use the result."""
    try:
        with _raise_on_signals():
            return _tune(args)
    except _Signal as error:
        text = 'ended by a signal: what ran is stopped, and not recorded.'
        print(f'\n{text} The same command goes on from there.', file=sys.stderr)
        return _SIGNAL_STATUS + error.number


def _tune(args: argparse.Namespace) -> int:
    from internvl_ds.tools.plan.memory_planner import MemoryPlanner
    from internvl_ds.tools.tune.request import Request
    from internvl_ds.tools.tune.result import as_json, table_rows
    from internvl_ds.tools.tune.tuner import tune

    words: dict[str, Any] = {f.name: getattr(args, f.name, None) for f in fields(Request)}
    words |= {'ds_config': args.deepspeed_config, 'budget': 60 * args.budget}
    result = tune(Request(**words), MemoryPlanner)
    if args.json:
        say(json_text(as_json(result)))
        return 0
    titles = ('finalist', 'img/s', 'ratio', 'of rounds', 'GB a rank')
    say(table(titles, table_rows(result), right=titles[1:]))
    say(f'\nratio: to {result.names[result.reference]}, median of the rounds')
    say(f'all trials: {args.output}/trials.csv, {args.output}/tuned.png\n')
    say('to train with the result, give the training program:')
    say('    ' + shlex.join(result.words))
    return 0


@contextmanager
def _raise_on_signals() -> Iterator[None]:
    """Makes SIGINT, SIGTERM and SIGHUP raise `_Signal`, so that the present trial is ended too.

    Only the first one raises: later ones, while the trial is being ended, change nothing.
    """

    def end(number: int, frame: FrameType | None) -> None:
        for each in handlers:
            signal.signal(each, signal.SIG_IGN)
        raise _Signal(number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup sees to that
        numbers.append(signal.SIGHUP)
    handlers = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r} is no number') from None
    if not value > 0:
        raise argparse.ArgumentTypeError(f'{text} is not above 0')
    return value
