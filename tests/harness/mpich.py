"""An environment whose MPI is MPICH, beside the one of the tests, whose MPI is Open MPI."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path


def make_environment(folder: Path) -> dict[str, str]:
    """Makes a virtual environment with MPICH, from PyPI, that borrows all else from this one.

    Returns:
        Variables with which its mpirun and python come first.
    """
    home = folder / 'mpich'
    subprocess.run([sys.executable, '-m', 'venv', str(home)], check=True)
    install = [str(home / 'bin' / 'pip'), 'install', '--quiet', '--no-input', 'mpich>=4.3']
    done = subprocess.run(install, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    own = sysconfig.get_path('purelib', vars={'base': str(home)})
    Path(own, 'borrowed.pth').write_text(sysconfig.get_path('purelib') + '\n')
    return {
        'PATH': os.pathsep.join([str(home / 'bin'), os.environ.get('PATH', '')]),
        'VIRTUAL_ENV': str(home),
    }
