"""OUTPUT: where it lies, what is free, how fast it is written, and whether it can be relied on."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from internvl_ds.files import flush, write_text
from internvl_ds.tools.doctor.probe_result import ProbeResult, fault, ok, warn
from internvl_ds.tools.text import human_size

_WRITTEN = 256 * 2**20  # bytes
_PIECE = 16 * 2**20
_ENOUGH_SECONDS = 6.0  # after which a slow disk's rate is known
_FREE_LEAST, _FREE_GOOD = 1e9, 20e9
_SLOW = 100e6  # bytes a second
_TAG = 4.2e9  # bytes: weights, masters and moments of 300 M parameters, bf16 with AdamW
_VOLATILE = {'tmpfs': 'memory: gone at a reboot', 'overlay': "a container's: gone with it"}


def probe(output: Path) -> list[ProbeResult]:
    """Space, then safety and rate, of the directory or of the nearest one that exists."""
    output = output.absolute()
    place = next(p for p in (output, *output.parents) if p.exists())
    if not place.is_dir():
        return [fault('OUTPUT', f'{place} is a file', 'name a directory')]
    free_space = _free_space(output, place)
    try:
        _try_a_save(place)
        return [free_space, _rate(place)]
    except OSError as error:
        text = f'{place}: {error.strerror} (errno {error.errno})'
        advice = 'every save would fail, and the run with it: name another directory'
        return [free_space, fault('writing OUTPUT', text, advice)]


def _free_space(output: Path, place: Path) -> ProbeResult:
    stats = os.statvfs(place)
    free, size = stats.f_frsize * stats.f_bavail, stats.f_frsize * stats.f_blocks
    kind = filesystem(place, Path('/proc/self/mountinfo').read_text())
    where = f'{output}' if place == output else f'{place} (for {output}, not there yet)'
    text = f'{where}, {kind}: {human_size(free)} free of {human_size(size)}'
    tag = f'300 M parameters take {human_size(_TAG)} a tag'
    no_inode = stats.f_files and not stats.f_favail
    if free < _FREE_LEAST or no_inode:
        lack = 'no inode' if no_inode else 'too little room'
        advice = 'and one more while it is saved. Free some, or name another directory'
        return fault('OUTPUT', text, f'{lack} for a checkpoint: {tag}, {advice}')
    if kind in _VOLATILE:
        return warn('OUTPUT', text, f'{kind} is {_VOLATILE[kind]}')
    return warn('OUTPUT', text, tag) if free < _FREE_GOOD else ok('OUTPUT', text)


def filesystem(place: Path, mountinfo: str) -> str:
    """The type of the file system of an existing path, by the text of /proc/self/mountinfo."""
    place, best, kind = place.resolve(), -1, 'unknown'
    for line in mountinfo.splitlines():
        before, _, after = line.partition(' - ')
        point = before.split()[4].encode().decode('unicode_escape')
        # a later mount hides an earlier one of the same place
        if place.is_relative_to(point) and len(point) >= best:
            best, kind = len(point), after.split()[0]
    return kind


def _try_a_save(place: Path) -> None:
    """Writes, flushes and renames as a save does: a file over another, and a directory.

    Raises:
        OSError: where any of it is refused.
    """
    with tempfile.TemporaryDirectory(prefix='.internvl_ds-doctor-', dir=place) as name:
        folder = Path(name)
        for text in ('one', 'two'):
            write_text(folder / 'latest', text)
        (folder / 'staged').mkdir()
        (folder / 'staged').rename(folder / 'tag')
        flush(folder)
        if (folder / 'latest').read_text() != 'two':
            raise OSError(0, 'a file that was replaced by a rename still shows its old content')


def _rate(place: Path) -> ProbeResult:
    """Writes up to 256 MiB, or for some seconds, flushed every 16 MiB; the file has no name.

    Should this be killed, the kernel frees the space.
    """
    stats = os.statvfs(place)
    total = min(_WRITTEN, stats.f_frsize * stats.f_bavail // 2)
    piece, size = os.urandom(min(_PIECE, max(total, 4096))), 0
    with tempfile.TemporaryFile(dir=place) as file:
        start = time.monotonic()
        for _ in range(max(1, total // len(piece))):
            file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            size += len(piece)
            if time.monotonic() - start > _ENOUGH_SECONDS:
                break
        seconds = time.monotonic() - start
    rate = size / seconds
    text = f'{human_size(rate)}/s with fsync ({human_size(size)}); rename and fsync work'
    if rate < _SLOW:
        advice = (
            f'a tag of {human_size(_TAG)} takes {_TAG / rate / 60:.0f} min: CHECKPOINT.ASYNC True '
            'saves beside training, a larger SAVE_FREQ seldomer'
        )
        return warn('writing OUTPUT', text, advice)
    return ok('writing OUTPUT', text)
