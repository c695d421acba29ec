"""Ranks that fail or hang, for the tests of the harness itself."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from internvl_ds.comm import rank


def fail_on_rank_1() -> None:
    if rank() == 1:
        raise ValueError('on purpose')
    print('rank 0 waits', flush=True)
    time.sleep(600)


def hang(folder: str) -> None:
    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
    Path(folder, f'child_{rank()}').write_text(str(child.pid))
    time.sleep(600)
