"""What DeepSpeed needs to compile its ops, and the op of CPU ranks. Imports no torch."""

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
    built = extensions_dir() / _OP / f'{_OP}.so'
    return [_tools(needed=not has_gpu() and not built.is_file()), _op(built)]


def has_gpu() -> bool:
    """Whether there is an NVIDIA driver, whatever torch thinks of it."""
    return Path('/dev/nvidiactl').exists() or shutil.which('nvidia-smi') is not None


def extensions_dir() -> Path:
    """Where torch builds extensions for this environment."""
    given = os.environ.get('TORCH_EXTENSIONS_DIR')
    if given:
        return Path(given)
    cuda = _torch_version_file().get('cuda')
    kind = f'cu{cuda.replace(".", "")}' if cuda else 'cpu'
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
    python = f'py{sys.version_info.major}{sys.version_info.minor}'
    return cache / 'torch_extensions' / f'{python}_{kind}'


def _tools(needed: bool) -> ProbeResult:
    compiler = (os.environ.get('CXX') or 'c++').split()[0]
    header = Path(sysconfig.get_path('include'), 'Python.h')
    missing = []
    if shutil.which(compiler) is None:
        missing.append(f'the C++ compiler ({compiler})')
    if not header.is_file():
        missing.append(f"Python's headers ({header})")
    if shutil.which('ninja') is None:
        missing.append('ninja on PATH')
    if not missing:
        return ok('compilers', f'{_version(compiler)}; ninja; Python.h')
    found = 'missing: ' + ', '.join(missing)
    install = (
        f'Debian, Ubuntu: apt-get install g++ {header.parent.name}-dev; pip install ninja, and '
        'activate the environment'
    )
    if needed:
        return fault(
            'compilers',
            found,
            f'DeepSpeed compiles an op as soon as CPU ranks meet, and fails there. {install}',
        )
    return warn(
        'compilers', found, f'FusedAdam, CPU Adam and NVMe offload cannot be built. {install}'
    )


def _op(built: Path) -> ProbeResult:
    topic, place = 'CPU op', built.parent.parent
    if not built.is_file():
        return warn(topic, f'not built yet in {place}', 'the first start on CPU ranks takes 40 s')
    other = _built_for(built.parent / 'build.ninja')
    torch = _torch_dir()
    if other is not None and torch is not None and other.resolve() != torch.resolve():
        if not other.exists():
            found = f'in {place}, built for a torch that is gone ({other})'
            return warn(topic, found, 'the next start on CPU ranks builds it anew: 40 s')
        return fault(
            topic,
            f'in {place}, built for the torch of {other.parent}',
            'two environments share this directory: each rebuilds it (40 s), and breaks a run of '
            f'the other. export TORCH_EXTENSIONS_DIR={sys.prefix}/torch_extensions',
        )
    if torch is not None and built.stat().st_mtime < (torch / 'version.py').stat().st_mtime:
        return warn(
            topic,
            f'in {place}, built before this torch was installed',
            "one built for an earlier torch may not load ('undefined symbol'), and is not rebuilt: "
            f'rm -r {built.parent}',
        )
    if 'TORCH_EXTENSIONS_DIR' not in os.environ:
        return warn(
            topic,
            f'built, in {place}',
            'every environment of this Python builds there, one over the other: export '
            f'TORCH_EXTENSIONS_DIR={sys.prefix}/torch_extensions',
        )
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


def _torch_version_file() -> dict[str, str | None]:
    """What torch/version.py says, without importing torch."""
    folder = _torch_dir()
    if folder is None or not (folder / 'version.py').is_file():
        return {}
    return runpy.run_path(str(folder / 'version.py'))


def _version(compiler: str) -> str:
    """The first line of what it says; its name where it says nothing in time."""
    try:
        said = ask(compiler, '--version')
    except (OSError, subprocess.TimeoutExpired) as error:
        return f'{compiler} (no version: {error})'
    return (said.strip().splitlines() or [compiler])[0]


def ask(*command: str) -> str:
    """What a program prints, on stderr where nothing comes on stdout; it has ten seconds."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors='replace',
        timeout=_SECONDS,
    )  # fmt: skip
    return done.stdout or done.stderr
