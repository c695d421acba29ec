"""The faults of a ds_config: one record a fault, its words, and the error made of records. Pure."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from internvl_ds.config.ds.pairs import COUNTERPARTS
from internvl_ds.errors import ConfigError

ERROR, WARNING = 'error', 'warning'


@dataclass(frozen=True)
class Diagnostic:
    """One fault of a ds_config.

    Attributes:
        pointer: JSON pointer of what is wrong; '' where it is not in the JSON.
        message: what is wrong, and what to do.
        severity: ERROR or WARNING.
        yacs: the yacs key that speaks of the same; '' where there is none.
    """

    pointer: str
    message: str
    severity: str = ERROR
    yacs: str = ''

    def __str__(self) -> str:
        """The diagnostic in one line, each key in it once."""
        match = re.search(rf'(?<!\w){re.escape(self.pointer)}(?![\w/])', self.message)
        where = '' if not self.pointer or match else f'{self.pointer}: '
        key = f' [{self.yacs}]' if self.yacs and self.yacs not in self.message else ''
        return f'{where}{self.message}{key}'


def diagnostic(pointer: str, message: str, severity: str = ERROR, yacs: str = '') -> Diagnostic:
    """A `Diagnostic`, with the yacs key that belongs to the pointer where none is given."""
    return Diagnostic(pointer, message, severity, yacs or COUNTERPARTS.get(pointer, ''))


def errors_of(findings: Iterable[Diagnostic]) -> list[Diagnostic]:
    """The findings that are errors."""
    return [each for each in findings if each.severity == ERROR]


def refuse(errors: Sequence[Diagnostic]) -> None:
    """Raises ConfigError if there are errors, a line each."""
    if len(errors) == 1:
        raise ConfigError(str(errors[0]))
    if errors:
        lines = ''.join(f'\n  {error}' for error in errors)
        raise ConfigError(f'the ds_config has {len(errors)} errors:{lines}')


def pointer_of(path: Iterable[str]) -> str:
    """The JSON pointer (RFC 6901) of a path of keys."""
    return ''.join('/' + str(key).replace('~', '~0').replace('/', '~1') for key in path)


def shown(value: Any) -> str:
    """A value as the JSON has it, cut where it is long."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else f'{text[:57]}...'


def nearest(name: str, names: Iterable[str], least: float) -> str | None:
    """The known name most like one, in any case of letters; None below ``least``, from 0 to 1."""
    by_lower = {key.lower(): key for key in names}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=least)
    return by_lower[near[0]] if near else None
