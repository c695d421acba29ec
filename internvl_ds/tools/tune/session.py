"""A directory of trials: one tuner at a time, and always with the same settings."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from internvl_ds.errors import ConfigError
from internvl_ds.files import open_own, write_text
from internvl_ds.files.locks import try_lock
from internvl_ds.files.reading import read_json


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Makes the directory, and holds it while the block runs.

    Raises:
        ConfigError: when another process holds it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = open_own(folder / '.lock', os.O_RDWR)
    except OSError as error:
        raise ConfigError(f'--output {folder}: cannot be written to: {error}') from error
    try:
        if try_lock(descriptor) is False:
            other = os.read(descriptor, 32).decode(errors='replace').strip()
            raise ConfigError(
                f'--output {folder}: process {other} is tuning there; wait for it, or name another'
            )
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f'{os.getpid()}\n'.encode())
        yield
    finally:
        os.close(descriptor)


def same_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Notes the settings in a fresh directory; in another one they have to be the same.

    Raises:
        ConfigError: names each setting that differs, and both values.
    """
    path = folder / 'settings.json'
    if not os.path.lexists(path):
        write_text(path, json.dumps(settings, indent=2) + '\n')
        return
    try:
        before = read_json(path, ours=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f'{path}: cannot be read: {error}') from error
    differences = list(_differences('', before, json.loads(json.dumps(settings))))
    if differences:
        raise ConfigError(
            f'--output {folder} holds trials of other settings: {"; ".join(differences[:5])}. Name '
            'another --output, or start with the same settings to go on there'
        )


def _differences(where: str, before: Any, now: Any) -> Iterator[str]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys([*before, *now]):
            inner = f'{where}/{key}' if where else str(key)
            yield from _differences(inner, before.get(key), now.get(key))
    elif before != now:
        yield f'{where} was {json.dumps(before)[:200]} and is {json.dumps(now)[:200]}'
