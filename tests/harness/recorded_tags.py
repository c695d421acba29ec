"""Tags saved under one Python, as small data in the repository, and loads of them under another.

    python -m tests.harness.recorded_tags OUT                 records under the Python that runs
    python -m tests.harness.recorded_tags --check PATH ...    loads archives or folders

A recording holds a tag of 2 ranks of each layout in tests/harness/recorded.py, and ``record.json``:
all that is in each, by name. tests/data/recorded_tags/README.md says how those there were made.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import platform
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.harness import recorded
from tests.harness.ranks import run_ranks

FOLDER = Path(__file__).parents[1] / 'data' / 'recorded_tags'
RANKS = 2


def own_name() -> str:
    """What a recording of the Python that runs is called."""
    return f'py{platform.python_version()}'


def record(folder: Path, *, few: bool = False, plain: bool = False) -> Path:
    """Saves the tags of a recording into a folder, with ``record.json``.

    Args:
        folder: named as the recording.
        few: a tag of each stage, not of each stage and precision.
        plain: tags of plain DeepSpeed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        found = run_ranks(
            recorded.save_all, RANKS, Path(work), root=folder, name=folder.name,
            few=few, plain=plain,
        )  # fmt: skip
    assert found[0] == found[1]
    (folder / 'record.json').write_text(json.dumps(found[0]))
    return folder


def pack(folder: Path, archive: Path) -> None:
    """Makes one file of a recording."""

    def plainly(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
        info.uid = info.gid = info.mtime = 0
        info.uname = info.gname = ''
        return None if info.name.endswith('.py') else info

    with tarfile.open(archive, 'w:xz', preset=9) as file:
        file.add(folder, '.', filter=plainly)


def unpack(archive: Path, folder: Path) -> Path:
    """Unpacks a recording into a folder of its name, and returns that."""
    target = folder / archive.name.removesuffix('.tar.xz')
    with tarfile.open(archive) as file:
        safely = {'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}
        file.extractall(target, **safely)
    return target


def check(folders: Sequence[Path], work: Path) -> dict[str, dict[str, str]]:
    """Loads every tag of some recordings in every way.

    Args:
        folders: of recordings.
        work: for what is written meanwhile.

    Returns:
        'RECORDING/LAYOUT' -> way -> 'ok', or what is wrong.
    """
    by_rank = run_ranks(recorded.load_all, RANKS, work, roots=folders, timeout=500)
    names = {str(folder): folder.name for folder in folders}
    found = {}
    for key, ways in by_rank[0].items():
        folder, _, layout = key.rpartition('/')
        said = {
            way: '; '.join(sorted({results_of[key][way] for results_of in by_rank} - {'ok'}))
            or 'ok'
            for way in ways
        }
        tag = next(Path(key).glob('ckpt_epoch_*'))
        expected = json.loads(Path(folder, 'record.json').read_text())[layout]
        said.update(_check_alone(tag, expected, work))
        found[f'{names[folder]}/{layout}'] = said
    return found


def failures(results: dict[str, dict[str, str]]) -> list[str]:
    """A line for each way that did not go, of what `check` returned."""
    return [
        f'{tag}, {way}: {said}'
        for tag, ways in results.items()
        for way, said in ways.items()
        if said != 'ok'
    ]


def _check_alone(tag: Path, expected: dict, work: Path) -> dict[str, str]:
    """What needs no ranks: the commands, and a plain module."""
    import torch

    from internvl_ds import load_pretrained
    from tests.harness.model import make_config
    from tests.harness.recorded import Net, differences, digest

    exported = work / 'exported.pth'
    verified = 0 if (tag / 'manifest.json').exists() else 3

    def export() -> str | None:
        status = _command('export', str(tag), str(exported))
        weights = torch.load(exported, weights_only=False)['model']
        found = {name: digest(weights[name]) for name in expected['state']}
        masters = {name: values[0] for name, values in expected['state'].items()}
        return status or differences({'masters': found}, {'masters': masters})

    def pretrained() -> str | None:
        torch.manual_seed(7)
        model = Net()
        config = make_config(MODEL__PRETRAINED=str(tag))
        load_pretrained(config, model, logging.getLogger('test'))
        found = {name: digest(p) for name, p in model.named_parameters()}
        sharded = 'zero3' in tag.parent.name  # whose tags hold masters only
        masters = {name: values[0] for name, values in expected['state'].items()}
        wanted = {**expected['weights'], **(masters if sharded else {})}
        return differences({'weights': found}, {'weights': wanted})

    ways: dict[str, Callable[[], str | None]] = {
        'verify': lambda: _command('verify', str(tag), status=verified),
        'export': export,
        'diff': lambda: _command('diff', str(tag), str(exported)),
        'pretrained': pretrained,
    }
    return {way: _said(act) for way, act in ways.items()}


def _said(act: Callable[[], str | None]) -> str:
    try:
        return act() or 'ok'
    except Exception as error:  # each is a finding
        return f'{type(error).__name__}: {error}'


def _command(action: str, *words: str, status: int = 0) -> str | None:
    """Runs ``internvl-ds ckpt``; says what it printed where its status is another."""
    from internvl_ds.tools.cli import main

    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        got = main(['ckpt', action, *words])
    return None if got == status else f'status {got}: {output.getvalue().strip()}'


def main() -> int:
    parser = argparse.ArgumentParser(prog='python -m tests.harness.recorded_tags')
    parser.add_argument('out', nargs='?', type=Path, help='the folder that the recording goes to')
    parser.add_argument(
        '--name', default=own_name(), help='of the recording (default: %(default)s)'
    )
    parser.add_argument('--plain', action='store_true', help='tags of plain DeepSpeed')
    parser.add_argument('--few', action='store_true', help='a tag of each stage')
    parser.add_argument('--unpacked', action='store_true', help='leave a folder, not an archive')
    parser.add_argument('--check', nargs='+', type=Path, metavar='PATH', help='recordings to load')
    parser.add_argument('--json', type=Path, help='where the results of --check go')
    args = parser.parse_args()
    if not args.check and args.out is None:
        parser.error('name the folder of a new recording, or --check recordings')
    with tempfile.TemporaryDirectory() as work:
        if args.out is not None:
            out = args.out.resolve()
            folder = (out if args.unpacked else Path(work)) / args.name
            record(folder, few=args.few, plain=args.plain)
            if not args.unpacked:
                out.mkdir(parents=True, exist_ok=True)
                pack(folder, out / f'{args.name}.tar.xz')
        return _check(args, Path(work)) if args.check else 0


def _check(args: argparse.Namespace, work: Path) -> int:
    folders = [path.resolve() if path.is_dir() else unpack(path, work) for path in args.check]
    results = check(folders, work)
    if args.json:
        args.json.write_text(json.dumps(results))
    wrong = failures(results)
    print(*wrong or ['all is as it was recorded'], sep='\n')
    return 1 if wrong else 0


if __name__ == '__main__':
    sys.exit(main())
