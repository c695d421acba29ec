"""Every typo, wrong type and contradiction of a ds_config, before anything is built.

    findings = check(load_ds_config('zero2'), config, world_size=8)

Each of three steps sees only what the steps before found right, so that one fault gives one
finding: the shape (`validate_keys`), the contradictions (`resolve` and `cross_checks`), and
DeepSpeed's own judgement of the whole. No rank is started, and no GPU is needed.
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

from internvl_ds.config.ds.cross_checks import RULES, Facts
from internvl_ds.config.ds.diagnostics import Diagnostic, diagnostic, errors_of, pointer_of, refuse
from internvl_ds.config.ds.introspect import Path, quiet
from internvl_ds.config.ds.resolve import Resolution, resolve, size_buckets
from internvl_ds.config.ds.schema import Key, installed, walk
from internvl_ds.config.ds.validate_keys import check_shape
from internvl_ds.config.tree import value_at

logger = logging.getLogger(__name__)


def check(
    ds_config: Mapping[str, Any], config: CfgNode, world_size: int, **in_code: bool
) -> list[Diagnostic]:
    """The findings of `examine`, one for each fault."""
    return examine(ds_config, config, world_size, **in_code).findings


def examine(
    ds_config: Mapping[str, Any],
    config: CfgNode,
    world_size: int,
    *,
    optimizer_in_code: bool = True,
    scheduler_in_code: bool = False,
    cpu_optimizer: bool = False,
) -> Resolution:
    """Checks and resolves a ds_config. Pure: nothing is changed, started or read from disk.

    Args:
        ds_config: as `load_ds_config` returned it, 'auto' and all, or resolved.
        config: the yacs tree.
        world_size: the number of data-parallel ranks.
        optimizer_in_code: keyword-only; whether an optimizer is passed to `initialize`.
        scheduler_in_code: keyword-only; whether a scheduler is.
        cpu_optimizer: keyword-only; whether that optimizer is one of DeepSpeed's for the CPU.

    Returns:
        The resolved ds_config, with bucket sizes left open; not resolved where there are errors.
    """
    schema = installed()
    shape = check_shape(ds_config, schema, schema)
    in_code = optimizer_in_code, scheduler_in_code, cpu_optimizer
    facts = Facts(shape, schema, config, world_size, *in_code)
    findings = [*shape.findings, *(finding for rule in RULES for finding in rule(facts))]
    findings += _refused_blocks(facts.tree, schema, findings)
    if errors_of(findings):
        return Resolution(dict(ds_config), {}, findings)
    resolution = resolve(ds_config, config, world_size)
    findings += resolution.findings or _refused_whole(resolution, ds_config)
    return resolution._replace(findings=findings)


def require_right(findings: list[Diagnostic]) -> None:
    """Raises ConfigError with every error that `check` found, and logs its warnings.

    Each rank finds the same. An error names its JSON pointer and its yacs key.
    """
    refuse(errors_of(findings))
    for warning in findings:
        logger.warning('ds_config: %s', warning)


def _refused_blocks(
    tree: Mapping[str, Any], schema: Key, findings: list[Diagnostic]
) -> Iterator[Diagnostic]:
    """The verdicts of the pydantic models on blocks without an error so far."""
    faults = [error.pointer for error in errors_of(findings)]
    models = {path: key.model for path, key in walk(schema) if key.model is not None}
    for path, model in models.items():
        block = value_at(tree, *path)
        inside = any(path[:depth] in models for depth in range(1, len(path)))
        if inside or not isinstance(block, Mapping):
            continue
        pointer = pointer_of(path)
        if any(p == pointer or p.startswith(f'{pointer}/') for p in faults):
            continue
        try:
            with quiet():
                model(**copy.deepcopy(dict(block)))
        except ValidationError as error:
            for detail in error.errors()[:1]:
                inner = [str(part) for part in detail['loc']]
                text = re.sub(r'^(Value error|Assertion failed), ', '', detail['msg'])
                yield diagnostic(pointer_of((*path, *inner)), f'DeepSpeed refuses it: {text}')
        except (AssertionError, TypeError, ValueError) as error:
            yield diagnostic(pointer, f'DeepSpeed refuses it: {error}')


def _refused_whole(resolution: Resolution, ds_config: Mapping[str, Any]) -> Iterator[Diagnostic]:
    """DeepSpeed's own judgement of a ds_config that is resolved."""
    tree = size_buckets(resolution, 1).tree
    # DeepSpeed would compare the batch with the ranks that there are now.
    tree.pop('train_batch_size')
    try:
        with quiet():
            DeepSpeedConfig(tree)
    except Exception as error:  # whatever it is, the run would die of it
        text = str(error) or type(error).__name__
        yield diagnostic(_pointer_in(text, ds_config), f'DeepSpeed refuses it: {text}')


def _pointer_in(text: str, ds_config: Mapping[str, Any]) -> str:
    """The stated key that a message names; '' where it names none."""
    words = set(re.findall(r'\w+', text.lower()))
    paths = (path for path in _paths(ds_config) if path[-1].lower() in words)
    longest: Path = max(paths, key=lambda path: len(path[-1]), default=())
    return pointer_of(longest)


def _paths(tree: Any, path: Path = ()) -> Iterator[Path]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield (*path, str(key))
            yield from _paths(value, (*path, str(key)))
