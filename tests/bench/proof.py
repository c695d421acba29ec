"""What a save's proof of itself costs: its share of the save's time, and the bytes it reads.

    python -m tests.bench.proof --params 100 --stages 0 1 2 3

Proof and save are timed in the same call, on two ranks. Bytes are those that the rank has asked the
kernel for in `read` and its kin (rchar of /proc/self/io); tensors are mapped and not touched.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from internvl_ds.checkpoint import finish_save
from internvl_ds.dist.rendezvous import rank
from tests.bench.figures import Pair, ratios_report, table
from tests.bench.harness import Contender, barrier, measure, remove_tags
from tests.bench.subject import Subject
from tests.harness.ranks import run_ranks

TARGET = 0.01
PAIR = Pair('save: proof', 'save: whole', TARGET)
_RANKS, _TIMEOUT = 2, 3600.0


def measure_proof(millions: float, stage: int, rounds: int, folder: str) -> dict[str, Any]:
    """On each rank: saves again and again; the ratios are of the slowest rank's times."""
    subject, output = Subject(millions, stage), Path(folder) / 'output'
    for _ in range(2):  # the first makes the optimizer's state
        subject.step()
    prove = finish_save.prove
    seen: dict[str, float] = {}

    def timed(*arguments: Any) -> None:
        start, read = time.perf_counter(), _bytes_read()
        prove(*arguments)
        seen.update(proof=time.perf_counter() - start, bytes=_bytes_read() - read)

    def run() -> dict[str, float]:
        start = time.perf_counter()
        subject.save(output)
        return {'proof': seen['proof'], 'whole': time.perf_counter() - start}

    def prepare() -> None:
        if rank() == 0:
            remove_tags(output)
        barrier()

    finish_save.prove = timed
    try:
        samples = measure({'save': Contender(run, prepare)}, rounds)
    finally:
        finish_save.prove = prove
    tag = next(output.glob('ckpt_epoch_*'))
    return {
        'stage': stage,
        'parameters': subject.parameters,
        'ratios': ratios_report(samples, [PAIR]),
        'milliseconds': max(samples['save: proof']) * 1e3,
        'bytes_read': int(seen['bytes']),
        'tag_bytes': sum(path.stat().st_size for path in tag.iterdir()),
    }


def measure_one(millions: float, stage: int, rounds: int, folder: Path | None) -> list[Any]:
    """Starts the ranks for one ZeRO stage; returns the report of each."""
    with tempfile.TemporaryDirectory(prefix='bench-', dir=folder) as made:
        return run_ranks(
            measure_proof,
            _RANKS,
            Path(made),
            timeout=_TIMEOUT,
            millions=millions,
            stage=stage,
            rounds=rounds,
            folder=made,
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what the arguments ask for and prints a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    parser.add_argument('--params', type=float, default=100, help='in millions')
    parser.add_argument('--stages', type=int, nargs='+', default=[0, 1, 2, 3])
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--folder', type=Path, default=Path('/var/tmp'))
    options = parser.parse_args(arguments)
    rows = []
    for stage in options.stages:
        reports = measure_one(options.params, stage, options.rounds, options.folder)
        read = ' + '.join(f'{report["bytes_read"] / 1e3:.0f}' for report in reports)
        first = reports[0]
        slowest = f'{max(report["milliseconds"] for report in reports):.1f}'
        judged = first['ratios'][0]
        share = '{median:.4f} [{min:.4f}-{max:.4f}]'.format(**judged)
        size = f'{first["tag_bytes"] / 1e6:.0f}'
        rows.append((str(stage), share, judged['verdict'], slowest, read, size))
    head = ('stage', 'proof / save', f'<= {TARGET:g}', 'slowest, ms', 'ranks read, kB', 'tag, MB')
    print(table(head, rows))


def _bytes_read() -> int:
    lines = Path('/proc/self/io').read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith('rchar')))


if __name__ == '__main__':
    main()
