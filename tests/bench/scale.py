"""What a save asks of rank 0 with very many ranks, which are simulated in one process.

    python -m tests.bench.scale --ranks 64 1024 --writers 512 --json figures.json

`meetings`: calls of the store and bytes read, by a rank, in one meeting of each kind. `writers`:
the second half of a save (each rank writes, proves and reports its files; rank 0 commits), on so
many simulated ranks, as the package does it. `tags`: a tag of so many ranks, its files empty: how
long rank 0 is at it. Seconds are of this machine's disk; counts are what carries over.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from internvl_ds.checkpoint.checkpoint_engine import ShardWriter
from internvl_ds.checkpoint.finish_save import Save, finish
from internvl_ds.checkpoint.proof import Wanted
from internvl_ds.checkpoint.tag import commit, discovery
from internvl_ds.checkpoint.tag.manifest import FileEntry, Header, Identity, Manifest
from internvl_ds.checkpoint.tag.retention import KeepNewest
from internvl_ds.checkpoint.tag.verify import share_of
from internvl_ds.config.tree import default_config
from internvl_ds.dist.rendezvous import agree, exchange, from_rank_0, gather, rank
from tests.bench.figures import table
from tests.harness.simulated import simulate

logger = logging.getLogger(__name__)

_LIMIT = 600.0  # seconds
_TAGS = 3
_OF_A_RANK = ('zero_pp_rank_{}_mp_rank_00_optim_states.pt', 'loop_rank_{}.json')
_HEADER: dict[str, Any] = {
    'epoch': 0, 'step': None, 'max_accuracy': 0.0, 'zero_stage': 1, 'precision': 'bf16',
    'global_steps': 1, 'versions': {},
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints tables, and writes JSON where asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    parser.add_argument('--ranks', type=int, nargs='*', default=[64, 1024])
    parser.add_argument('--writers', type=int, default=512)
    parser.add_argument('--json', type=Path, help='where all figures go')
    parser.add_argument('--folder', type=Path, default=Path('/var/tmp'), help='where files go')
    options = parser.parse_args(arguments)
    report: dict[str, Any] = {'meetings': {}, 'tags': {}}
    for ranks in options.ranks:
        report['meetings'][ranks] = measure_meetings(ranks)
        with tempfile.TemporaryDirectory(prefix='bench-', dir=options.folder) as folder:
            report['tags'][ranks] = measure_tags(Path(folder), ranks)
    with tempfile.TemporaryDirectory(prefix='bench-', dir=options.folder) as folder:
        report['writers'] = {options.writers: measure_writers(Path(folder), options.writers)}
    print(tables(report), flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + '\n')


def measure_meetings(ranks: int) -> dict[str, dict[str, int]]:
    """Of each kind: calls by rank 0 and most by another; bytes that rank 0 and another read."""
    kinds: dict[str, Callable[[], Any]] = {
        'exchange, all alike': lambda: exchange('x', ['ckpt_epoch_1', 1], _LIMIT),
        'exchange, all different': lambda: exchange('x', f'host{rank():05d}', _LIMIT),
        'from rank 0': lambda: from_rank_0('x', lambda: 'staging-name', _LIMIT),
        'agree': lambda: agree('x', lambda: None, _LIMIT),
        'gather 200 bytes of each': lambda: gather('x', 200 * '-', _LIMIT),
    }
    found = {}
    for kind, meet in kinds.items():
        counts, _ = simulate(ranks, functools.partial(_forget, meet))
        last_but_one = sorted(one.bytes for one in counts[1:])[-2]  # the last puts all together
        found[kind] = {
            'calls, rank 0': counts[0].calls,
            'calls, another': max(one.calls for one in counts[1:]),
            'bytes, rank 0': counts[0].bytes,
            'bytes, another': last_but_one,
        }
    return found


def _forget(meet: Callable[[], Any]) -> None:
    """Keeps no result: the lists of all ranks together have the square of their number."""
    meet()


def measure_writers(output: Path, ranks: int) -> dict[str, float]:
    """Seconds of a whole second half of a save, all ranks after one another, and of rank 0's."""
    staging = commit.begin(output, 'ckpt_epoch_0')
    name = staging.path.name.rpartition('-')[2]
    config = default_config()

    def write() -> float:
        own = rank()
        writer, identity = ShardWriter(), Identity('ckpt_epoch_0', name, own)
        writer.begin(identity, updates=1, in_background=False)
        entry = {Identity.KEY: identity.to_dict()}
        writer.save({'optimizer_state_dict': {'m': torch.zeros(64)}, **entry},
                    staging.path / _OF_A_RANK[0].format(own))  # fmt: skip
        save = Save(
            output=output, tag='ckpt_epoch_0', writer=writer, staging_path=staging.path,
            header={**_HEADER, 'world_size': ranks, 'save': name}, policies=[KeepNewest(2)],
            in_background=False, io_timeout=_LIMIT, logger=logger,
            wanted=Wanted({}, frozenset(), None, None, own), loop=entry,
            staging=staging if own == 0 else None,
            state={'config': config, 'epoch': 0, **entry} if own == 0 else {},
        )  # fmt: skip
        start = time.perf_counter()
        finish(save)
        return time.perf_counter() - start

    start = time.perf_counter()
    counts, _ = simulate(ranks, write)
    seconds = time.perf_counter() - start
    manifest = discovery.read_manifest(output / 'ckpt_epoch_0')
    assert manifest is not None
    assert len(manifest.files) == 2 * ranks + 1
    assert discovery.problem(output / 'ckpt_epoch_0') is None
    return {
        'seconds in all': round(seconds, 1),
        'calls, rank 0': counts[0].calls,
        'calls, another': max(one.calls for one in counts[1:]),
        'bytes, rank 0': counts[0].bytes,
        'bytes, another': sorted(one.bytes for one in counts[1:])[-2],
        'manifest, bytes': (output / 'ckpt_epoch_0' / 'manifest.json').stat().st_size,
    }


def measure_tags(output: Path, ranks: int) -> dict[str, float]:
    """Seconds that rank 0 is at a tag of so many ranks; the files are there, and empty."""
    names = [name.format(r) for r in range(ranks) for name in _OF_A_RANK]
    files = {name: FileEntry(0, 32 * '0') for name in names}
    seconds = {}
    for number in range(_TAGS):
        tag = f'ckpt_epoch_{number}'
        staging = commit.begin(output, tag)
        for name in names:
            (staging.path / name).touch()
        start = time.perf_counter()
        sizes = discovery.sizes_of(staging.path, files)
        commit.require_files(staging, files, sizes)
        header = Header(
            tag=tag, sequence=commit.next_sequence(output), saved_at='', size=0, world_size=ranks,
            **{**_HEADER, 'epoch': number}, save='0',
        )  # fmt: skip
        commit.commit(staging, Manifest(header, files), latest=True)
        seconds['commit'] = time.perf_counter() - start
    start = time.perf_counter()
    newest = discovery.newest(output)
    seconds['find the newest'] = time.perf_counter() - start
    assert newest is not None
    start = time.perf_counter()
    manifest = discovery.read_manifest(output / f'ckpt_epoch_{_TAGS - 1}')
    seconds['read a manifest'] = time.perf_counter() - start
    assert manifest is not None
    start = time.perf_counter()
    assert len(share_of(manifest.files, 1, ranks)) == len(_OF_A_RANK)
    seconds["a rank's share of it"] = time.perf_counter() - start
    start = time.perf_counter()
    assert commit.prune(output, [KeepNewest(_TAGS - 1)]) == ['ckpt_epoch_0']
    seconds['remove a tag'] = time.perf_counter() - start
    return {name: round(value, 3) for name, value in seconds.items()}


def tables(report: dict[str, Any]) -> str:
    """The report as markdown."""
    blocks = []
    for ranks, kinds in report['meetings'].items():
        rows = [[kind, *map(str, found.values())] for kind, found in kinds.items()]
        head = [f'a meeting of {ranks} ranks', *next(iter(kinds.values()))]
        blocks.append(table(head, rows))
    for title, entries in (('a tag of', report['tags']), ('a save of', report['writers'])):
        for ranks, found in entries.items():
            rows = [[name, str(value)] for name, value in found.items()]
            blocks.append(table([f'{title} {ranks} ranks', ''], rows))
    return '\n\n'.join(blocks)


if __name__ == '__main__':
    main()
