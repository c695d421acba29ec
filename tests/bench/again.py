"""A save of the state that the save before wrote, as of a best epoch: its time, and what it writes.

    python -m tests.bench.again --params 100 --stages 1 3 --rounds 9

Beside a save with no earlier tag. Bytes are what all ranks gave to the kernel to write (wchar of
/proc/self/io).
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from internvl_ds.dist.rendezvous import rank
from tests.bench.figures import Pair, ratios_report, table
from tests.bench.harness import ROUNDS, Contender, barrier, measure, remove_tags
from tests.bench.subject import Subject
from tests.harness.ranks import run_ranks

PAIR = Pair('again: seconds', 'first: seconds')
_RANKS, _TIMEOUT = 2, 3600.0


def measure_again(millions: float, stage: int, rounds: int, folder: str) -> dict[str, Any]:
    """On each rank: the ratios of the slowest rank's times, and the bytes of this one's writes."""
    subject, output = Subject(millions, stage), Path(folder) / 'output'
    for _ in range(2):  # the first makes the optimizer's state
        subject.step()
    written: dict[str, int] = {}

    def saving(name: str) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            before, start = _bytes_written(), time.perf_counter()
            subject.save(output)
            seconds = time.perf_counter() - start
            written[name] = _bytes_written() - before
            return {'seconds': seconds}

        return run

    def first() -> None:
        if rank() == 0:
            remove_tags(output)
            os.sync()
        barrier()

    def again() -> None:
        first()
        subject.save(output)

    contenders = {'first': first, 'again': again}
    samples = measure({n: Contender(saving(n), p) for n, p in contenders.items()}, rounds)
    return {'ratio': ratios_report(samples, [PAIR])[0], 'written': written}


def measure_one(millions: float, stage: int, rounds: int, folder: Path | None) -> list[Any]:
    """Starts the ranks for one ZeRO stage; returns the report of each."""
    with tempfile.TemporaryDirectory(prefix='bench-', dir=folder) as made:
        values = {'millions': millions, 'stage': stage, 'rounds': rounds, 'folder': made}
        return run_ranks(measure_again, _RANKS, Path(made), timeout=_TIMEOUT, **values)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what the arguments ask for and prints a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    parser.add_argument('--params', type=float, default=100, help='in millions')
    parser.add_argument('--stages', type=int, nargs='+', default=[1, 3])
    parser.add_argument('--rounds', type=int, default=ROUNDS)
    parser.add_argument('--folder', type=Path, default=Path('/var/tmp'))
    options = parser.parse_args(arguments)
    rows = []
    for stage in options.stages:
        reports = measure_one(options.params, stage, options.rounds, options.folder)
        total = {n: sum(r['written'][n] for r in reports) for n in reports[0]['written']}
        ratio = '{median:.3f} [{min:.3f}-{max:.3f}]'.format(**reports[0]['ratio'])
        rows.append((str(stage), ratio, *(f'{total[n] / 1e6:.2f}' for n in ('again', 'first'))))
    print(table(('stage', 'again / first', 'again writes, MB', 'first, MB'), rows))


def _bytes_written() -> int:
    lines = Path('/proc/self/io').read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith('wchar')))


if __name__ == '__main__':
    main()
