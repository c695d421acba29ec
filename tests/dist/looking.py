"""Looks at the main thread as stranded.py does, while collections free tensors and threads begin.

python -m tests.dist.looking SECONDS
"""

from __future__ import annotations

import gc
import sys
import threading
import time

import torch

from internvl_ds.dist.stranded import _main_frame


def main(seconds: float) -> None:
    end = time.monotonic() + seconds
    gc.set_threshold(1)

    def look() -> None:
        while time.monotonic() < end:
            tensor = torch.ones(1)
            tensor.cycle = [tensor]  # type: ignore[attr-defined]
            del tensor
            _main_frame()

    thread = threading.Thread(target=look)
    thread.start()
    while thread.is_alive():
        threading.Thread(target=int).start()
    print(gc.isenabled())


if __name__ == '__main__':
    main(float(sys.argv[1]))
