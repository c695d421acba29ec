"""The shape of a ds_config: its keys are known and its values of the right type. Pure.

Invalid values are dropped before the next checks, and a misspelt key goes on under the name that
was probably meant: one fault gives one finding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import deepspeed

from internvl_ds.config.ds import diagnostics, schema
from internvl_ds.config.ds.diagnostics import Diagnostic, diagnostic, nearest, pointer_of, shown
from internvl_ds.config.ds.introspect import Path
from internvl_ds.config.ds.pairs import COUNTERPARTS
from internvl_ds.config.ds.schema import BOOL, INT, LIST, NULL, NUMBER, OBJECT, TEXT, Key, Value

_ALIKE = 0.6  # how like a known key one must be to be taken for a misspelling of it
# And where it may well be something else: a key that DeepSpeed reads and nobody here knows of, or
# one that is known elsewhere.
_ALIKE_IN_DOUBT = 0.85
_MANY = 3  # a name that is known in more places than this tells nothing of where it belongs


@dataclass
class Shape:
    """The result of `check_shape`.

    Attributes:
        findings: in the order of the tree's keys.
        tree: the tree without its invalid values.
        doubtful: JSON pointers of the invalid values, with every key rightly spelt.
        misspelt: those of keys that were meant, probably, by misspelt ones.
    """

    findings: list[Diagnostic] = field(default_factory=list)
    tree: dict[str, Any] = field(default_factory=dict)
    doubtful: set[str] = field(default_factory=set)
    misspelt: set[str] = field(default_factory=set)

    def doubts(self, *pointers: str) -> bool:
        """Whether any of these values is invalid, or lies in a block that is."""
        return any(p == d or p.startswith(f'{d}/') for p in pointers for d in self.doubtful)


def check_shape(
    tree: Mapping[str, Any], key: Key, root: Key | None = None, path: Path = ()
) -> Shape:
    """Compares a block with the schema.

    Args:
        tree: the block, as stated.
        key: what DeepSpeed knows of it.
        root: the whole schema, to look elsewhere for what is not known here.
        path: of the block, from the top.
    """
    shape = Shape()
    shape.tree = _Walk(shape, root).block(tree, key, path, path)
    return shape


@dataclass
class _Walk:
    shape: Shape
    root: Key | None

    def block(self, tree: Mapping[str, Any], key: Key, path: Path, target: Path) -> dict[str, Any]:
        """Checks a block's keys; ``target`` is its path in right spelling."""
        values: dict[str, Any] = {}
        for name, value in tree.items():
            entry, here = (key.keys or {}).get(name), (*path, str(name))
            spelling, is_misspelt = str(name), entry is None
            if entry is None:
                like = self._like(spelling, key)
                if like is None and not key.complete:
                    values[spelling] = value
                    continue
                self._unknown(spelling, like, key, path, target)
                if like is None or like in tree or like in values:
                    continue
                spelling, entry = like, (key.keys or {})[like]
                self.shape.misspelt.add(pointer_of((*target, like)))
            if entry.refused:
                self.shape.findings.append(diagnostic(pointer_of(here), entry.refused))
                continue
            self.value(value, entry, here, (*target, spelling), values, silent=is_misspelt)
            if entry.deprecated and not is_misspelt and spelling in values:
                self._deprecated(entry, key, tree, here)
        return values

    def value(
        self, value: Any, key: Key, path: Path, target: Path, values: dict[str, Any], silent: bool
    ) -> None:
        """Adds a valid value to ``values``; silent: its key has a finding already."""
        if key.keys is not None and isinstance(value, Mapping):
            values[target[-1]] = self.block(value, key, path, target)
            return
        # DeepSpeed takes 'auto' for 'left out' in some places; where not is known to `resolve`.
        fault = '' if value == 'auto' and key.keys is None else misfit(value, key.value)
        if not fault:
            values[target[-1]] = value
            return
        self.shape.doubtful.add(pointer_of(target))
        if not silent:
            yacs = COUNTERPARTS.get(pointer_of(target), '')
            self.shape.findings.append(diagnostic(pointer_of(path), fault, yacs=yacs))

    def _like(self, name: str, key: Key) -> str | None:
        """The known key in the block that an unknown key misspells."""
        doubtful = not key.complete or self._elsewhere(name, exactly=True) is not None
        names = [k for k, entry in (key.keys or {}).items() if not entry.refused]
        return nearest(name, names, _ALIKE_IN_DOUBT if doubtful else _ALIKE)

    def _unknown(self, name: str, like: str | None, key: Key, path: Path, target: Path) -> None:
        where = self._elsewhere(name)
        if like is not None:
            where = pointer_of((*target, (key.keys or {})[like].name or like))
        hint = f'DeepSpeed {deepspeed.__version__} reads no such key'
        hint = f'the nearest known key is {where}' if where else hint
        self.shape.findings.append(diagnostic(pointer_of((*path, name)), f'unknown key; {hint}'))

    def _elsewhere(self, name: str, exactly: bool = False) -> str | None:
        """The other blocks that know a key of that name, or a similar one."""
        if self.root is None:
            return None
        by_name: dict[str, list[Path]] = {}
        for path, entry in schema.walk(self.root):
            if not entry.refused:
                by_name.setdefault(path[-1], []).append(path)
        like = nearest(name, by_name, 1.0 if exactly else _ALIKE_IN_DOUBT)
        places = by_name[like] if like else []
        if not 0 < len(places) <= _MANY:
            return None
        shortest: Path = min(places, key=lambda place: (len(place), place))
        return pointer_of(shortest)

    def _deprecated(self, entry: Key, block: Key, tree: Mapping[str, Any], path: Path) -> None:
        keys, text, severity = block.keys or {}, 'is deprecated', diagnostics.WARNING
        successor = keys.get(entry.successor)
        names = sorted(n for n in tree if successor is not None and keys.get(n) is successor)
        if names:
            text += f', and its successor {names[0]} is stated as well; remove {path[-1]}'
            severity = diagnostics.ERROR
        elif entry.successor:
            name = successor.name if successor is not None else ''
            text += f'; use {name or entry.successor}'
        self.shape.findings.append(diagnostic(pointer_of(path), text, severity))


def misfit(value: Any, spec: Value) -> str:
    """The fault of a value, in words that begin with 'is'; '' for a right value."""
    kinds = spec.kinds
    if kinds and not any(_is_a(value, kind) for kind in kinds):
        quoted = isinstance(value, str) and (
            (_is_number(value) and bool({INT, NUMBER} & set(kinds)))
            or (value.lower() in ('true', 'false') and BOOL in kinds)
        )
        hint = ' (without the quotation marks)' if quoted else ''
        return f'is {shown(value)}; it takes {" or ".join(kinds)}{hint}'
    if spec.choices and value is not None and value not in spec.choices:
        texts = [choice for choice in spec.choices if isinstance(choice, str)]
        near = nearest(value, texts, _ALIKE) if isinstance(value, str) else None
        hint = f'; {near!r} is the nearest' if near else ''
        return f'is {shown(value)}; it takes {", ".join(map(shown, spec.choices))}{hint}'
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _out_of_limits(value, spec)
    if spec.items is not None and isinstance(value, list | tuple):
        for index, item in enumerate(value):
            if fault := misfit(item, spec.items):
                return f'has entry {index}, which {fault}'
    return ''


def _out_of_limits(value: float, spec: Value) -> str:
    if not math.isfinite(value):
        return f'is {shown(value)}, which is no finite number'
    for limit, broken, words in (
        (spec.least, lambda least: value < least, 'at least'),
        (spec.most, lambda most: value > most, 'at most'),
        (spec.above, lambda above: value <= above, 'more than'),
        (spec.below, lambda below: value >= below, 'less than'),
    ):
        if limit is not None and broken(limit):
            return f'is {shown(value)}; it must be {words} {limit:g}'
    return ''


def _is_a(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == BOOL
    if isinstance(value, int):
        return kind in (INT, NUMBER)
    if isinstance(value, float):
        return kind == NUMBER or (kind == INT and value.is_integer())
    classes = {TEXT: str, LIST: list | tuple, NULL: type(None), OBJECT: Mapping}
    return isinstance(value, classes.get(kind, ()))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
