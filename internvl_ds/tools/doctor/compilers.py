"""The tools that compile DeepSpeed's ops, and the op of CPU ranks. Imports no torch."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from internvl_ds.tools.doctor.probe_result import ProbeResult, fault, ok, warn

_OP = 'deepspeed_shm_comm'  # with it CPU ranks of one host reduce gradients
_SECONDS = 10  # for a program to answer


def probe() -> list[ProbeResult]:
    """The compiler, ninja and Python's headers; and the op of CPU ranks."""
    library = extensions_dir() / _OP / f'{_OP}.so'
    return [_tools(required=not has_gpu() and not library.is_file()), _op(library)]


def has_gpu() -> bool:
    """Whether there is an NVIDIA driver, whatever torch thinks of it."""
    return Path('/dev/nvidiactl').exists() or shutil.which('nvidia-smi') is not None


def extensions_dir() -> Path:
    """Where torch builds extensions for this environment."""
    if folder := os.environ.get('TORCH_EXTENSIONS_DIR'):
        return Path(folder)
    torch = _torch_dir()
    version = torch / 'version.py' if torch else None  # torch itself is not imported
    cuda = runpy.run_path(str(version)).get('cuda') if version and version.is_file() else None
    kind = f'cu{cuda.replace(".", "")}' if cuda else 'cpu'
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
    python = f'py{sys.version_info.major}{sys.version_info.minor}'
    return cache / 'torch_extensions' / f'{python}_{kind}'


def _tools(required: bool) -> ProbeResult:
    topic = 'compilers'
    compiler = (os.environ.get('CXX') or 'c++').split()[0]
    header = Path(sysconfig.get_path('include'), 'Python.h')
    presence = {
        f'the C++ compiler ({compiler})': shutil.which(compiler),
        f"Python's headers ({header})": header.is_file(),
        'ninja on PATH': shutil.which('ninja'),
    }
    if all(presence.values()):
        text = ask(compiler, '--version', failure=f'{compiler} (no version: {{}})').strip()
        return ok(topic, f'{(text.splitlines() or [compiler])[0]}; ninja; Python.h')
    text = 'missing: ' + ', '.join(tool for tool, present in presence.items() if not present)
    install = (
        f'Debian, Ubuntu: apt-get install g++ {header.parent.name}-dev; pip install ninja, and '
        'activate the environment'
    )
    if required:
        effect = 'DeepSpeed compiles an op as soon as CPU ranks meet, and fails there'
        return fault(topic, text, f'{effect}. {install}')
    return warn(topic, text, f'FusedAdam and CPU Adam cannot be built. {install}')


def _op(library: Path) -> ProbeResult:
    topic, place = 'CPU op', library.parent.parent
    if not library.is_file():
        return warn(topic, f'not built yet in {place}', 'the first start on CPU ranks takes 40 s')
    export = f'export TORCH_EXTENSIONS_DIR={sys.prefix}/torch_extensions'
    other = _built_for(library.parent / 'build.ninja')
    torch = _torch_dir()
    if other is not None and torch is not None and other.resolve() != torch.resolve():
        if not other.exists():
            text = f'in {place}, built for a torch that is gone ({other})'
            return warn(topic, text, 'the next start on CPU ranks builds it anew: 40 s')
        advice = (
            'two environments share this directory: each rebuilds it (40 s), and breaks a run of '
            f'the other. {export}'
        )
        return fault(topic, f'in {place}, built for the torch of {other.parent}', advice)
    if torch is not None and library.stat().st_mtime < (torch / 'version.py').stat().st_mtime:
        advice = (
            "one built for an earlier torch may not load ('undefined symbol'), and is not rebuilt: "
            f'rm -r {library.parent}'
        )
        return warn(topic, f'in {place}, built before this torch was installed', advice)
    if 'TORCH_EXTENSIONS_DIR' not in os.environ:
        advice = f'every environment of this Python builds there, one over the other: {export}'
        return warn(topic, f'built, in {place}', advice)
    return ok(topic, f'built, in {place}')


def _built_for(build_file: Path) -> Path | None:
    """The torch whose headers an extension was compiled with."""
    try:
        text = build_file.read_text(errors='replace')
    except OSError:
        return None
    match = re.search(r'-isystem (\S+/torch)/include(?= )', text)
    return Path(match[1]) if match else None


def _torch_dir() -> Path | None:
    spec = find_spec('torch')
    return Path(spec.origin).parent if spec and spec.origin else None


def ask(*command: str, failure: str = '{}') -> str:
    """What a program prints to stdout, else to stderr.

    Where the program cannot be run, or takes over ten seconds: ``failure``, with the reason in it.
    """
    try:
        process = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors='replace',
            timeout=_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return failure.replace('{}', str(error))
    return process.stdout or process.stderr
