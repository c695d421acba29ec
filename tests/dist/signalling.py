"""Programs that signals end or ask to stop: `python -m tests.dist.signalling WHAT`."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time

from internvl_ds.dist import signals
from internvl_ds.dist.signals import Request, end_at_interrupt


def in_c_code() -> None:
    """Waits where Python runs no handler."""
    end_at_interrupt()
    print('ready', flush=True)
    hashlib.pbkdf2_hmac('sha256', b'', b'', 2 * 10**9)


def asked() -> None:
    """Tells what it was asked for, in the program and in a child that it forks."""
    request = Request()
    child = os.fork()
    if child == 0:
        time.sleep(60)
    print(child, flush=True)
    while request.signal is None:
        time.sleep(0.01)
    print(request.signal.name, flush=True)
    hashlib.pbkdf2_hmac('sha256', b'', b'', 2 * 10**9)


def stuck() -> None:
    """Is asked to stop, and does not get out of C code, where Python runs no handler."""
    signals._STANDS = 2.0  # type: ignore[attr-defined]
    Request()
    print('ready', flush=True)
    hashlib.pbkdf2_hmac('sha256', b'', b'', 2 * 10**9)


def released() -> None:
    """Has its own handlers back."""
    signal.signal(signal.SIGUSR1, before := lambda number, frame: None)
    request = Request()
    taken = signal.getsignal(signal.SIGUSR1) is not before
    request.release()
    request.release()
    back = signal.getsignal(signal.SIGUSR1) is before
    back = back and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    print(taken, back, signal.set_wakeup_fd(-1), flush=True)


if __name__ == '__main__':
    {'in_c_code': in_c_code, 'asked': asked, 'stuck': stuck, 'released': released}[sys.argv[1]]()
