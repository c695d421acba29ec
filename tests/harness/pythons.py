"""Saves tags under each of several Pythons, loads them under each, and prints which pairs work.

    python -m tests.harness.pythons PYTHON [PYTHON ...]

Each PYTHON is an interpreter in an environment that has the packages. One that has none of its own,
and is of the same minor version as the one that runs, shares those: `sharing` makes an environment
for it, as for Debian's Python beside one of pyenv.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

from internvl_ds.tools.text import table
from tests.harness.ranks import ROOT, base_env
from tests.harness.recorded_tags import check, failures, record

# It would take DeepSpeed most of a minute to compile its op for each new environment.
_ENV = {'TESTS_WITHOUT_SHM_OP': '1'}
_SHORT = 60  # characters of a reason in the table


def version_of(python: str) -> str:
    """As '3.11.2'.

    Raises:
        subprocess.CalledProcessError, OSError: for what is no Python that works.
    """
    code = 'import platform; print(platform.python_version())'
    return subprocess.run(
        [python, '-I', '-c', code], capture_output=True, text=True, timeout=60, check=True
    ).stdout.strip()


def sharing(folder: Path) -> list[str]:
    """Environments of the system's Pythons that can load the extension modules of this one's.

    They are of the same minor version and of another micro version. Their site-packages is this
    one's.
    """
    name = 'python{}.{}'.format(*sys.version_info[:2])
    found = {version_of(sys.executable): sys.executable}
    for directory in ('/usr/bin', '/usr/local/bin'):
        python = shutil.which(name, path=directory)
        if python is None or (version := version_of(python)) in found:
            continue
        environment = folder / f'shares-{version}'
        command = [python, '-m', 'venv', '--without-pip', environment]
        subprocess.run(command, check=True, timeout=60)
        (packages,) = environment.glob('lib/python*/site-packages')
        (packages / 'shared.pth').write_text(sysconfig.get_path('purelib') + '\n')
        found[version] = str(environment / 'bin' / 'python')
    return list(found.values())[1:]


def pairs(
    pythons: Sequence[str], folder: Path, *, few: bool = False
) -> dict[tuple[str, str], list[str]]:
    """Saves under each Python, and loads under each what each saved.

    Args:
        pythons: paths of interpreters.
        folder: for the tags.
        few: a tag of each stage, not of each stage and precision.

    Returns:
        (saved under, loaded under), as versions -> what went wrong; nothing where all is well.

    Raises:
        subprocess.CalledProcessError: when a Python cannot save; its output says why.
    """
    versions = {version_of(python): python for python in pythons}
    recordings = {v: folder / f'py{v}' for v in versions}
    *others, last = versions
    for version in others:
        _record(versions[version], recordings[version], few)
    found = {}
    for version in (last, *others):  # the last one saves first: its start takes longest
        saves = recordings[last] if version == last else None
        results = _load(versions[version], list(recordings.values()), saves, few)
        for saved, recording in recordings.items():
            own = {k: v for k, v in results.items() if k.startswith(f'{recording.name}/')}
            found[saved, version] = failures(own) if own else ['nothing was loaded']
    return {(a, b): found[a, b] for a in versions for b in versions}


def text_of(found: dict[tuple[str, str], list[str]]) -> str:
    """The table, a row for each Python that saved and a column for each that loaded."""
    versions = list(dict.fromkeys(saved for saved, _ in found))

    def cell(wrong: list[str]) -> str:
        return f'{len(wrong)} wrong: {wrong[0][:_SHORT]}' if wrong else 'ok'

    rows = [(saved, *(cell(found[saved, loaded]) for loaded in versions)) for saved in versions]
    return table(('saved under \\ loaded under', *versions), rows)


def _record(python: str, folder: Path, few: bool) -> None:
    if python == sys.executable:
        record(folder, few=few)
    else:
        _run(python, _recording(folder, few))


def _load(
    python: str, recordings: list[Path], saves: Path | None, few: bool
) -> dict[str, dict[str, str]]:
    with tempfile.TemporaryDirectory() as work:
        if python == sys.executable:
            if saves:
                record(saves, few=few)
            return check(recordings, Path(work))
        answer = Path(work, 'results.json')
        words = _recording(saves, few) if saves else []
        words += ['--check', *map(str, recordings), '--json', str(answer)]
        _run(python, words, statuses=(0, 1))
        return json.loads(answer.read_text())


def _recording(folder: Path, few: bool) -> list[str]:
    return [str(folder.parent), '--name', folder.name, '--unpacked', *(['--few'] if few else [])]


def _run(python: str, words: list[str], statuses: tuple[int, ...] = (0,)) -> None:
    done = subprocess.run(
        [python, '-m', 'tests.harness.recorded_tags', *words],
        cwd=ROOT, env=base_env(**_ENV), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    if done.returncode not in statuses:
        print(done.stdout[-4000:], done.stderr[-4000:], sep='\n', file=sys.stderr)
        done.check_returncode()


def main() -> int:
    parser = argparse.ArgumentParser(prog='python -m tests.harness.pythons')
    parser.add_argument('pythons', nargs='+', metavar='PYTHON', help='an interpreter with packages')
    parser.add_argument('--few', action='store_true', help='a tag of each stage')
    args = parser.parse_args()
    os.environ.update(_ENV)
    with tempfile.TemporaryDirectory() as folder:
        found = pairs(args.pythons, Path(folder), few=args.few)
    print(text_of(found))
    print(*(line for wrong in found.values() for line in wrong), sep='\n')
    return 1 if any(found.values()) else 0


if __name__ == '__main__':
    sys.exit(main())
