"""Ranks that fail or hang, for the tests of the harness itself."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from torch.distributed import distributed_c10d

from internvl_ds.dist.rendezvous import rank


def fail_on_rank_1() -> None:
    if rank() == 1:
        raise ValueError('on purpose')
    print('rank 0 waits', flush=True)
    time.sleep(600)


def hang(folder: str) -> None:
    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
    Path(folder, f'child_{rank()}').write_text(str(child.pid))
    time.sleep(600)


def leave_late() -> str:
    """Rank 1 still reads the store when rank 0 is done."""
    if rank() == 1:
        time.sleep(3)
        store = distributed_c10d._get_default_store()
        store.set('late', 'x')
        return store.get('late').decode()
    return ''
