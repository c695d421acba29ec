"""Finds the ds_config keys that the installed DeepSpeed reads, by letting it read probes.

`deepspeed.runtime.config.DeepSpeedConfig` is built again and again over a mapping that notes every
key it is asked for. Each key found is then stated in turn - as an empty block, as text, as true, as
null - so that what DeepSpeed reads only then is found too, until nothing new turns up. No process
group is needed, and nothing is started.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import logging
import textwrap
from collections.abc import Callable, Collection, Iterator, KeysView
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import deepspeed
from deepspeed.runtime import config as ds_runtime_config
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.runtime.config_utils import DeepSpeedConfigModel

from internvl_ds.config.tree import nest

Path = tuple[str, ...]

_MARK = '\0path'  # an entry by which a pydantic model that is made of a block tells which block


@dataclass
class Read:
    """The facts about one key.

    Attributes:
        defaults: what DeepSpeed takes where the key is left out, one for each place that reads it.
        model: the pydantic model that is made of the block.
        is_block: whether keys are read below it.
        copied: whether all of the block is taken, so that keys which are read later are not known.
        takes_null: whether DeepSpeed's configuration takes null for it.
        refused: why DeepSpeed refuses the key, whatever its value; '' where it does not.
    """

    defaults: list[Any] = field(default_factory=list)
    model: type[DeepSpeedConfigModel] | None = None
    is_block: bool = False
    copied: bool = False
    takes_null: bool = False
    refused: str = ''


class _Probe(dict):
    """A block of a ds_config that records which keys are looked up in it."""

    def __init__(self, reads: dict[Path, Read], path: Path, tree: dict[str, Any]) -> None:
        super().__init__(
            {k: _Probe(reads, (*path, k), v) if type(v) is dict else v for k, v in tree.items()}
        )
        self.reads, self.path = reads, path
        if path:  # an entry of the top level would be taken for a key
            dict.__setitem__(self, _MARK, path)

    def _note(self, key: str) -> Read:
        for depth in range(1, len(self.path) + 1):
            self.reads.setdefault(self.path[:depth], Read()).is_block = True
        return self.reads.setdefault((*self.path, key), Read())

    def __contains__(self, key: object) -> bool:
        self._note(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self._note(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """Records the default; an absent block is answered with an empty one."""
        read = self._note(key)
        if not any(default is d or default == d for d in read.defaults):
            read.defaults.append(default)
        if super().__contains__(key):
            return super().__getitem__(key)
        return _Probe(self.reads, (*self.path, key), {}) if default == {} else default

    def keys(self) -> Any:
        """Keys that record which key is sought among them."""
        return _Keys(self)

    def items(self) -> Any:
        self._take_all()
        return {k: v for k, v in super().items() if k != _MARK}.items()

    def __copy__(self) -> dict:
        self._take_all()
        copy = _Probe(self.reads, self.path, {})
        copy.update(self)
        return copy

    def __deepcopy__(self, memo: dict[int, Any]) -> dict:
        return self.__copy__()

    def _take_all(self) -> None:
        if self.path:  # the top level is copied for safety's sake, and read key by key
            read = self.reads.setdefault(self.path, Read())
            read.is_block = read.copied = True


class _Keys(KeysView):
    _mapping: _Probe

    def __iter__(self) -> Iterator[str]:
        return iter([key for key in dict.keys(self._mapping) if key != _MARK])


# Stands for DeepSpeed's communication where there is one process: rank 0 of 1.
_ALONE = SimpleNamespace(get_rank=lambda: 0, get_world_size=lambda group=None: 1)


def keys_read() -> dict[Path, Read]:
    """Every key that the installed DeepSpeed reads of a ds_config, by its path from the top.

    The keys of blocks that are pydantic models are the models' fields, and not among them. For its
    fraction of a second no other thread may make a DeepSpeedConfig: it would take itself for rank 0
    of 1.
    """
    reads: dict[Path, Read] = {}
    with quiet(), _models_recorded(reads):
        _run(reads, {})
        history: set[Path] = set()
        groups: set[frozenset[Path]] = set()
        while todo := [path for path in reads if path not in history]:
            history.update(todo)
            for path in todo:
                _state(reads, path)
            for block in [path for path in reads if reads[path].is_block]:
                below = frozenset(path for path in reads if path[:-1] == block)
                if below not in groups:
                    groups.add(below)
                    _state_together(reads, block, below)
    for key in keys_in_source(deepspeed.initialize, 'config'):
        reads.setdefault((key,), Read())
    return reads


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences DeepSpeed's logger while it reads probes."""
    logger = logging.getLogger('DeepSpeed')
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


def keys_in_source(function: Callable[..., Any], variable: str) -> list[str]:
    """The keys that a function's source looks up in a mapping: by [], in, get or pop.

    Args:
        function: of a module whose constants may name the keys.
        variable: the mapping's name in it.
    """
    names = inspect.getmodule(function).__dict__
    keys: list[str] = []
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        match node:
            case ast.Subscript(value=mapping, slice=key):
                pass
            case ast.Compare(left=key, ops=[ast.In(), *_], comparators=[mapping, *_]):
                pass
            case ast.Call(func=ast.Attribute(value=mapping, attr='get' | 'pop'), args=[key, *_]):
                pass
            case _:
                continue
        match mapping:
            case ast.Call(func=ast.Attribute(value=mapping, attr='keys')):
                pass  # as in `key in mapping.keys()`
        if isinstance(mapping, ast.Name) and mapping.id == variable:
            name = key.value if isinstance(key, ast.Constant) else None
            name = names.get(key.id) if isinstance(key, ast.Name) else name
            if isinstance(name, str) and name not in keys:
                keys.append(name)
    return keys


def _state(reads: dict[Path, Read], path: Path) -> None:
    """Parses, with DeepSpeed, ds_configs of one key, in each form that may reveal more keys."""
    read = reads[path]
    default = next((d for d in read.defaults if d is not None and d != {}), None)
    if default is not None:  # it is a value, then, and only true may have more read
        if default is False:
            _run(reads, nest(path, True))
        return
    errors = [_run(reads, nest(path, {}))]
    if read.is_block:
        read.takes_null = _run(reads, nest(path, None)) is None
        return
    errors += [_run(reads, nest(path, form)) for form in ('text', True)]
    if all(isinstance(e, DeepSpeedConfigError) for e in errors) and len(set(map(str, errors))) == 1:
        read.refused = str(errors[0])


def _state_together(reads: dict[Path, Read], block: Path, below: Collection[Path]) -> None:
    """Probes with several keys stated: some keys are read only beside switches or blocks."""
    switches = {path[-1]: True for path in below if False in reads[path].defaults}
    blocks: dict[str, Any] = {path[-1]: {} for path in below if not reads[path].defaults}
    _run(reads, nest(block, {**blocks, **switches}))


def _run(reads: dict[Path, Read], tree: dict[str, Any]) -> Exception | None:
    # Without a batch size it stops before its last checks, which read a few keys more.
    probe = _Probe(reads, (), {'train_batch_size': 1, **tree})
    try:
        ds_runtime_config.DeepSpeedConfig(probe)
    except Exception as error:  # whatever a form provokes: what was read before it counts
        return error
    return None


@contextlib.contextmanager
def _models_recorded(reads: dict[Path, Read]) -> Iterator[None]:
    """Records the block of each pydantic model that is made of a `_Probe`."""
    before, before_comm = DeepSpeedConfigModel.__init__, ds_runtime_config.dist

    def recording(self: DeepSpeedConfigModel, strict: bool = False, **data: Any) -> None:
        path = data.pop(_MARK, None)
        if path is not None:
            read = reads.setdefault(path, Read())
            read.model, read.is_block = type(self), True
        before(self, strict, **data)

    DeepSpeedConfigModel.__init__ = recording
    ds_runtime_config.dist = _ALONE
    try:
        yield
    finally:
        DeepSpeedConfigModel.__init__ = before
        ds_runtime_config.dist = before_comm
