"""The trials of the self-test, one after the other, with one result for all ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from internvl_ds.config.tree import default_config, set_options
from internvl_ds.dist.excepthook import one_line
from internvl_ds.dist.process_group import init_distributed
from internvl_ds.dist.rendezvous import exchange, from_rank_0, rank
from internvl_ds.dist.stranded import is_of_collective
from internvl_ds.errors import InternvlDsError, RankError
from internvl_ds.tools.doctor.shm import remove_buffers
from internvl_ds.tools.selftest.killed import killed_row
from internvl_ds.tools.selftest.links import links_row
from internvl_ds.tools.selftest.pace import pace_rows
from internvl_ds.tools.selftest.row import ABSENT, OK, SLOW, WRONG, Row
from internvl_ds.tools.selftest.subject import FP32, LIMIT, PRECISIONS
from internvl_ds.tools.selftest.tags import tags_row
from internvl_ds.tools.selftest.traffic import traffic_row
from internvl_ds.tools.selftest.updates import updates_row

Trial = Callable[[], Row | tuple[Row, ...]]

_SEVERITY = [ABSENT, OK, SLOW, WRONG]
_STAGES, _QUICK_STAGES = (0, 1, 2, 3), (1, 3)


def selftest(output: Path, quick: bool, local_rank: int | None = None) -> list[Row]:
    """Runs all trials. Collective: every rank calls it.

    Args:
        output: a directory that all ranks see, as the checkpoints' is. Nothing is left in it.
        quick: at ZeRO stages 1 and 3 only, in fp32 and bfloat16.
        local_rank: that a launcher gave as an argument.

    Returns:
        A row of each trial, the same on all ranks. Where a rank did not come, or a collective
        failed, that row is the last.
    """
    config = set_options(default_config(), {'COMM.TIMEOUT': LIMIT})
    init_distributed(config, local_rank=local_rank)
    signal.signal(signal.SIGTERM, _end)
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        folder: Path | None = None
        try:
            folder = stack.enter_context(_folder(output))
        except OSError as error:  # on rank 0; on the others it is one of this package's
            rows.append(Row('output', WRONG, f'{output}: {error.strerror}: give another --output'))
        except InternvlDsError as error:
            rows.append(Row('output', WRONG, str(error)))
        for name, trial in _trials(folder, quick):
            goes_on, added = _agreed(name, trial)
            rows += added
            if not goes_on:
                break
    if port := os.environ.get('MASTER_PORT'):
        remove_buffers(port)  # DeepSpeed does not; who has them open goes on to
    return rows


def _end(number: int, frame: object) -> None:
    """Ends by an exception, for the folder to be removed."""
    sys.exit(128 + number)


def _trials(folder: Path | None, quick: bool) -> Iterator[tuple[str, Trial]]:
    stages = _QUICK_STAGES if quick else _STAGES
    yield 'links', links_row
    for precision in (FP32, 'bf16') if quick else PRECISIONS:
        yield f'updates in {precision}', functools.partial(updates_row, precision, stages)
    yield 'collectives and reads', functools.partial(traffic_row, stages)
    pairs = ((3, 1),) if quick else ((0, 2), (1, 3), (3, 0))
    for stage, other in pairs:
        if folder is None:
            break
        yield f'tags of stage {stage}', functools.partial(tags_row, stage, other, folder)
    yield 'pace and plan', pace_rows
    yield 'a killed rank', killed_row


def _agreed(name: str, trial: Trial) -> tuple[bool, list[Row]]:
    """Runs a trial; whether the next can follow, and the worst row of all ranks."""
    start, goes_on = time.monotonic(), True
    try:
        result = trial()
        rows = list(result) if isinstance(result, tuple) else [result]
    except Exception as error:
        goes_on = not is_of_collective(error)
        rows = [Row(name, WRONG, f'{type(error).__name__}: {one_line(error)}')]
    seconds = time.monotonic() - start
    try:
        told = exchange(
            f'selftest {name}', [goes_on, [dataclasses.asdict(row) for row in rows]], LIMIT
        )
    except RankError as error:
        own = [row.found for row in rows if row.verdict == WRONG]
        return False, [Row(name, WRONG, '; '.join([*own, str(error)]), seconds=seconds)]
    all_rows = [[Row(**row) for row in of_rank] for _, of_rank in told]
    shortest = min(all_rows, key=len)  # a rank that failed has one row
    worst = [_worst([of_rank[i] for of_rank in all_rows]) for i in range(len(shortest))]
    share = round(seconds / len(worst), 3)
    worst = [dataclasses.replace(row, seconds=share) for row in worst]
    return all(goes for goes, _ in told), worst


def _worst(rows: list[Row]) -> Row:
    index = max(range(len(rows)), key=lambda r: (_SEVERITY.index(rows[r].verdict), -r))
    row = rows[index]
    if row.verdict == WRONG and len({r.found for r in rows}) > 1:
        return dataclasses.replace(row, found=f'rank {index}: {row.found}')
    return row


@contextlib.contextmanager
def _folder(output: Path) -> Iterator[Path]:
    """A folder of this run in ``output``, made and removed by rank 0."""
    is_new = not output.exists()

    def make() -> str:
        output.mkdir(parents=True, exist_ok=True)
        return tempfile.mkdtemp(prefix='selftest-', dir=output)

    folder = Path(from_rank_0('selftest folder', make, LIMIT))
    try:
        yield folder
    finally:
        if rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # it has others' files by now
                if is_new:
                    output.rmdir()
