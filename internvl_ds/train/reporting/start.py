"""What the start of a run took, from the beginning of its process to its first update."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path


class StartClock:
    """Gives the time since the process began to the parts of a start, one after the other."""

    def __init__(self) -> None:
        """Begins when the process did, not when this is called."""
        self._parts: dict[str, float] = {}
        self._last = self._begin = time.monotonic() - _age()

    def passed(self, part: str) -> None:
        """Counts all time since the part before as this part's; one may come in pieces."""
        now = time.monotonic()
        self._parts[part] = self._parts.get(part, 0.0) + now - self._last
        self._last = now

    def tell(self, logger: logging.Logger) -> None:
        """Writes the line that says how long each part took, in seconds."""
        parts = ', '.join(f'{part} {seconds:.2f}' for part, seconds in self._parts.items())
        whole = self._last - self._begin
        logger.info(f'the first update came {whole:.2f} s after the process began: {parts}')


def _age() -> float:
    """Seconds since this process began; 0 where the system does not say."""
    try:
        # The fields behind the name, which may hold anything; the 22nd of all is the time.
        fields = Path('/proc/self/stat').read_text().rpartition(')')[2].split()
        began = int(fields[19]) / os.sysconf('SC_CLK_TCK')
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - began)
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0
