"""Every typo, wrong type and contradiction of a ds_config, before anything is built.

    findings = check(load_ds_config('zero2'), config, world_size=8)

In three steps, each of which sees only what the ones before found right, so that one fault gives
one finding: the shape (`ds_shape`), the contradictions (`ds_rules`), and at last DeepSpeed's own
judgement of the whole. No rank is started, and no GPU is needed.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

from deepspeed.runtime.config import DeepSpeedConfig
from pydantic import ValidationError
from yacs.config import CfgNode

from internvl_ds.config.ds import resolve as ds
from internvl_ds.config.ds.cross_checks import RULES, Facts
from internvl_ds.config.ds.diagnostics import ERROR, Finding, finding, pointer_of, value_at
from internvl_ds.config.ds.introspect import Path, quiet
from internvl_ds.config.ds.schema import Key, installed, walk
from internvl_ds.config.ds.validate_keys import check_shape
from internvl_ds.errors import ConfigError

logger = logging.getLogger(__name__)


def check(
    ds_config: Mapping[str, Any],
    config: CfgNode,
    world_size: int,
    *,
    optimizer_in_code: bool = True,
    scheduler_in_code: bool = False,
    cpu_optimizer: bool = False,
) -> list[Finding]:
    """Looks a ds_config over. Pure: nothing is changed, started or read from disk.

    Args:
        ds_config: as `ds_config.load_ds_config` returned it, 'auto' and all, or resolved.
        config: the yacs tree.
        world_size: the number of data-parallel ranks.
        optimizer_in_code: keyword-only; whether an optimizer is passed to `initialize`.
        scheduler_in_code: keyword-only; whether a scheduler is.
        cpu_optimizer: keyword-only; whether that optimizer is one of DeepSpeed's for the CPU.

    Returns:
        One finding a fault; none where all is well.
    """
    schema = installed()
    shape = check_shape(ds_config, schema, schema)
    facts = Facts(
        shape, schema, config, world_size, optimizer_in_code, scheduler_in_code, cpu_optimizer
    )
    found = list(shape.findings)
    for rule in RULES:
        found += rule(facts)
    found += _refused_blocks(facts.tree, schema, found)
    if not any(f.severity == ERROR for f in found):
        found += _refused_whole(ds_config, config, world_size, schema)
    return found


def errors_of(findings: list[Finding]) -> list[Finding]:
    """Those with which nothing can be trained."""
    return [f for f in findings if f.severity == ERROR]


def require_right(found: list[Finding]) -> None:
    """Raises for what `check` found of errors, and logs its warnings. Each rank finds the same.

    Raises:
        ConfigError: with every error, each with its JSON pointer and its yacs key.
    """
    refuse(errors_of(found))
    for warning in found:
        logger.warning('ds_config: %s', warning)


def refuse(errors: list[Finding]) -> None:
    """Raises ConfigError where there are errors: one in one line, more in one line each."""
    if len(errors) == 1:
        raise ConfigError(str(errors[0]))
    if errors:
        lines = ''.join(f'\n  {error}' for error in errors)
        raise ConfigError(f'the ds_config has {len(errors)} errors:{lines}')


def _refused_blocks(
    tree: Mapping[str, Any], schema: Key, found: list[Finding]
) -> Iterator[Finding]:
    """What the pydantic models say to blocks in which nothing was found yet."""
    wrong = [f.pointer for f in found if f.severity == ERROR]
    models = {path: key.model for path, key in walk(schema) if key.model is not None}
    for path, model in models.items():
        block = value_at(tree, *path)
        inside = any(path[:depth] in models for depth in range(1, len(path)))
        if inside or not isinstance(block, Mapping):
            continue
        pointer = pointer_of(path)
        if any(p == pointer or p.startswith(f'{pointer}/') for p in wrong):
            continue
        try:
            with quiet():
                model(**copy.deepcopy(dict(block)))
        except ValidationError as error:
            for detail in error.errors()[:1]:
                inner = [str(part) for part in detail['loc']]
                text = re.sub(r'^(Value error|Assertion failed), ', '', detail['msg'])
                yield finding(pointer_of((*path, *inner)), f'DeepSpeed refuses it: {text}')
        except (AssertionError, TypeError, ValueError) as error:
            yield finding(pointer, f'DeepSpeed refuses it: {error}')


def _refused_whole(
    ds_config: Mapping[str, Any], config: CfgNode, world_size: int, schema: Key
) -> Iterator[Finding]:
    """What is left to be said once all is resolved: by `resolve`, then by DeepSpeed's own check."""
    try:
        resolved = ds.resolve(ds_config, config, world_size, trained=1)
    except ConfigError as error:
        yield from _unresolved(str(error), ds_config)
        return
    # It would compare the batch with the ranks that there are now.
    resolved.pop('train_batch_size')
    try:
        with quiet():
            DeepSpeedConfig(resolved)
    except Exception as error:  # whatever it is, the run would die of it
        text = str(error) or type(error).__name__
        yield finding(_pointer_in(text, ds_config, schema), f'DeepSpeed refuses it: {text}')


def _unresolved(text: str, ds_config: Mapping[str, Any]) -> Iterator[Finding]:
    """One finding for each pointer at the head of a message, as for several 'auto' at once."""
    head, colon, rest = text.partition(": 'auto'")
    pointers = head.split(', ')
    stated = {pointer_of(path) for path, _ in _nodes(ds_config)}
    if colon and stated.issuperset(pointers):
        for pointer in pointers:
            yield finding(pointer, f"'auto'{rest}")
        return
    first = re.match(r'(/[\w/]+)', text)
    yield finding(first[0] if first else '', text)


def _pointer_in(text: str, ds_config: Mapping[str, Any], schema: Key) -> str:
    """The stated key that a message names; '' where it names none."""
    words = set(re.findall(r'\w+', text.lower()))
    named = [path for path, _ in _nodes(ds_config) if path[-1].lower() in words]
    longest: Path = max(named, key=lambda path: len(path[-1]), default=())
    return pointer_of(longest)


def _nodes(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield (*path, str(key)), value
            yield from _nodes(value, (*path, str(key)))
