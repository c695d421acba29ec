"""Faults put into the core by hand, one at a time: the tests beside it must fail under each.

    python -m tests.bench.mutations [WORD ...] [--jobs N] [--out FILE]

applies the patches of `tests.bench.mutants` (those whose room, text or tests have one of the
words), each in a copy of the tree in a temporary folder, runs the tests that the patch names, and
prints a Markdown table: caught, survived, or an error. An error is a patch whose old text is no
longer there, or a test that fails without any patch. The exit status is 0 where there is no error,
at least 95 % are caught, and every survivor has a reason in the table.

A process imports torch and DeepSpeed once and forks for every patch, which then costs what its
tests cost. No test of ranks is run.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PACKAGE = 'internvl_ds'
TARGET = 0.95
LIMIT = 120  # seconds for the tests of a patch; then it is caught

_times = itertools.count(1)

CAUGHT, SURVIVED, ERROR = 'caught', 'survived', 'error'

_COPIED = (PACKAGE, 'tests', 'ds_configs', 'launch', 'pyproject.toml', 'README.md')
_PRELOADED = (
    'pytest', 'deepspeed', 'timm', 'torchvision', 'yaml', 'yacs.config', 'safetensors.torch',
    'xxhash', 'deepspeed.runtime.zero.stage3', 'deepspeed.runtime.zero.stage_1_and_2', 'mpi4py',
)  # fmt: skip


class Mutant(NamedTuple):
    """One fault.

    Attributes:
        room: the module or folder of the package, such as 'checkpoint/tag': the old text stands
            once in the files below it, so that code may move inside a room.
        old, new: the text that is replaced, and what replaces it.
        tests: files, or tests in them, of which one must fail.
        why: the reason for which no test can fail; '' for all others.
    """

    room: str
    old: str
    new: str
    tests: tuple[str, ...]
    why: str = ''


class NotApplicable(Exception):
    """The old text of a patch does not stand once in its room."""


class Verdict(NamedTuple):
    """What became of a mutant: `CAUGHT`, `SURVIVED` or `ERROR`, and by what."""

    mutant: Mutant
    result: str
    detail: str
    seconds: float


def mutants_of(room: str, tests: str, patches: Iterable[tuple[str, ...]]) -> list[Mutant]:
    """The mutants of a room; ``tests``: paths below tests/, by spaces."""
    paths = tuple(f'tests/{path}' for path in tests.split())
    return [Mutant(room, old, new, paths, *why) for old, new, *why in patches]


def place_of(mutant: Mutant, root: Path) -> tuple[Path, str]:
    """The file that a mutant changes, and its new text.

    Raises:
        NotApplicable: where the old text is not there, or more than once, or nothing changes.
    """
    room = root / PACKAGE / mutant.room
    files = sorted(room.rglob('*.py')) if room.is_dir() else [room.with_suffix('.py')]
    texts = {path: path.read_text() for path in files if path.exists()}
    counts = {path: count for path, text in texts.items() if (count := text.count(mutant.old))}
    if list(counts.values()) != [1]:
        where = {str(path.relative_to(root)): count for path, count in counts.items()}
        raise NotApplicable(f'{mutant.room}: {mutant.old!r} stands there {where or "nowhere"}')
    (path,) = counts
    changed = texts[path].replace(mutant.old, mutant.new)
    if changed == texts[path]:
        raise NotApplicable(f'{mutant.room}: {mutant.old!r} changes nothing')
    return path, changed


def copy_tree(target: Path) -> None:
    """Copies what tests need of the tree."""
    for name in _COPIED:
        ignored = shutil.ignore_patterns('__pycache__', 'data')
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, target / name)


def judge(mutant: Mutant, root: Path) -> Verdict:
    """Applies a mutant in a copy of the tree, runs its tests, and takes it back."""
    start = time.monotonic()
    try:
        path, changed = place_of(mutant, root)
    except NotApplicable as error:
        return Verdict(mutant, ERROR, str(error), 0.0)
    text, before = path.read_text(), path.stat()
    try:
        path.write_text(changed)
        # No bytecode of another text may be taken for this one's: it is told by time and size.
        os.utime(path, (next(_times), next(_times)))
        status, failed = run_tests(mutant.tests, root)
    finally:
        path.write_text(text)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    result = {0: SURVIVED, 1: CAUGHT}.get(status, CAUGHT if status < 0 else ERROR)
    details = {
        SURVIVED: mutant.why,
        CAUGHT: failed if status > 0 else f'signal {-status}; 9: no end within {LIMIT} s',
        ERROR: f'pytest ended with status {status}: {failed}',
    }
    return Verdict(mutant, result, details[result], time.monotonic() - start)


def run_tests(tests: Sequence[str], root: Path) -> tuple[int, str]:
    """Runs tests of a copy of the tree in a fork of this process, until one fails.

    Returns:
        pytest's exit status, -9 at the limit; and which test failed.
    """
    with tempfile.NamedTemporaryFile('r', suffix='.log') as log:
        pid = os.fork()
        if pid == 0:
            os.setsid()
            descriptor = os.open(log.name, os.O_WRONLY | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            status = 70
            try:
                status = _pytest(tests, root)
            finally:
                sys.stdout.flush()
                os._exit(status)
        status = _wait(pid)
        lines = Path(log.name).read_text(errors='replace').splitlines()
    found = [line for line in lines if line.startswith(('FAILED ', 'ERROR '))]
    return status, found[0].split(' - ')[0].split(' ', 1)[1] if found else '\n'.join(lines[-5:])


def _pytest(tests: Sequence[str], root: Path) -> int:
    import pytest

    os.chdir(root)
    os.environ['PYTHONPATH'] = str(root)
    sys.path[:] = [str(root), *(p for p in sys.path if p not in ('', str(ROOT)))]
    for name in [n for n in sys.modules if n.split('.')[0] in (PACKAGE, 'tests')]:
        del sys.modules[name]
    options = ['-x', '-q', '-p', 'no:cacheprovider', '-p', 'no:xdist', '-m', 'not ranks']
    return int(pytest.main([*options, '--rootdir', str(root), *tests]))


def _wait(pid: int) -> int:
    """Its exit status; at the limit its whole session is ended."""
    deadline = time.monotonic() + LIMIT
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.02)


def judge_all(
    mutants: Sequence[Mutant], jobs: int, tell: Callable[[Verdict], object]
) -> list[Verdict]:
    """Judges mutants, ``jobs`` at a time, after a look whether their tests pass without them."""
    with tempfile.TemporaryDirectory(prefix='mutations-') as folder:
        roots = [Path(folder, str(job)) for job in range(jobs)]
        for root in roots:
            root.mkdir()
            copy_tree(root)
        free = list(roots)

        def with_root(work: Callable[[Path], Verdict]) -> Verdict:
            root = free.pop()
            try:
                verdict = work(root)
            finally:
                free.append(root)
            tell(verdict)
            return verdict

        def unpatched(tests: tuple[str, ...]) -> Verdict:
            def work(root: Path) -> Verdict:
                status, failed = run_tests(tests, root)
                mutant = Mutant('', '', '', tests)
                result = ERROR if status else CAUGHT
                return Verdict(
                    mutant, result, f'{tests} without a patch: status {status}: {failed}', 0.0
                )

            return with_root(work)

        with ThreadPoolExecutor(jobs) as pool:
            before = list(pool.map(unpatched, dict.fromkeys(m.tests for m in mutants)))
            wrong = [verdict for verdict in before if verdict.result == ERROR]
            if wrong:
                return wrong
            return list(pool.map(lambda m: with_root(lambda root: judge(m, root)), mutants))


def table_of(verdicts: Iterable[Verdict]) -> str:
    """The verdicts as Markdown, in the order given."""
    rows = ['| room | fault | verdict | by, or why | s |', '| --- | --- | --- | --- | --- |']
    for mutant, result, detail, seconds in verdicts:
        cells = [*_front(mutant), result, ' '.join(detail.split()), f'{seconds:.1f}']
        rows.append(f'{_row(cells)} |')
    return '\n'.join(rows)


def _front(mutant: Mutant) -> list[str]:
    return [mutant.room, f'`{_short(mutant.old)}` -> `{_short(mutant.new)}`']


def _row(cells: Iterable[str]) -> str:
    return '| ' + ' | '.join(cell.replace('|', r'\|') for cell in cells)


def _short(text: str) -> str:
    text = ' '.join(text.split())
    return text if len(text) <= 70 else f'{text[:34]} .. {text[-32:]}'


def summary_of(verdicts: Sequence[Verdict]) -> tuple[str, bool]:
    """One line, and whether the tests are as good as they have to be."""
    counts = dict.fromkeys((CAUGHT, SURVIVED, ERROR), 0)
    for verdict in verdicts:
        counts[verdict.result] += 1
    unexplained = [v for v in verdicts if v.result == SURVIVED and not v.mutant.why]
    share = counts[CAUGHT] / max(1, len(verdicts))
    text = ', '.join(f'{count} {result}' for result, count in counts.items())
    good = not counts[ERROR] and share >= TARGET and not unexplained
    return f'{text}: {share:.1%} caught, {len(unexplained)} survivors without a reason', good


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument('words', nargs='*', help='of rooms, old texts or tests')
    parser.add_argument('--jobs', type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument('--out', type=Path, help='a file for the table')
    parser.add_argument('--again', type=Path, help='an earlier table: what it has as caught is out')
    args = parser.parse_args(argv)
    from tests.bench.mutants import MUTANTS

    texts = {mutant: ' '.join([mutant.room, mutant.old, *mutant.tests]) for mutant in MUTANTS}
    words = args.words or ['']
    chosen = [mutant for mutant, text in texts.items() if any(word in text for word in words)]
    if args.again:
        rows = args.again.read_text().splitlines()
        caught = tuple(row.split(f' | {CAUGHT} | ')[0] for row in rows if f' | {CAUGHT} | ' in row)
        chosen = [mutant for mutant in chosen if _row(_front(mutant)) not in caught]
    os.environ.update(DS_ACCELERATOR='cpu', CUDA_VISIBLE_DEVICES='')
    for name in _PRELOADED:
        importlib.import_module(name)

    def tell(verdict: Verdict) -> None:
        if verdict.mutant.room or verdict.result == ERROR:
            change = f'{_short(verdict.mutant.old)} -> {_short(verdict.mutant.new)}'
            print(f'{verdict.result:8} {verdict.seconds:5.1f} s  {change}', file=sys.stderr)

    verdicts = judge_all(chosen, args.jobs, tell)
    text, good = summary_of(verdicts)
    table = f'{table_of(verdicts)}\n\n{text}\n'
    print(table)
    if args.out:
        args.out.write_text(table)
    return 0 if good else 1


if __name__ == '__main__':
    sys.exit(main())
