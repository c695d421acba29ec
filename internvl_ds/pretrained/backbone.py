"""Loads the weights of a backbone into a backbone with a head: all of them, or an error."""

from __future__ import annotations

import functools
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from yacs.config import CfgNode

from internvl_ds.checkpoint.sources import downloads
from internvl_ds.checkpoint.sources.open_weights import open_weights
from internvl_ds.errors import PretrainedError, few
from internvl_ds.files.addresses import repository_at, shown
from internvl_ds.files.reading import interpreting, read_json
from internvl_ds.pretrained import apply, transforms, unwrapping
from internvl_ds.pretrained.api import Plan, load_planned, run_steps
from internvl_ds.pretrained.places import origins_in
from internvl_ds.pretrained.report import PretrainedReport
from internvl_ds.pretrained.transforms import Note, Result, Specs, State, Step

_FIRST_NUMBER = re.compile(r'\.(\d+)\.')


@dataclass(frozen=True)
class Backbone:
    """The weights to load, and their differences from the model.

    Attributes:
        key: of the yacs tree, for errors.
        path: its value: a file, a directory, an address, or ORG/REPO of the Hugging Face Hub.
        keys: of the model's state dict; the file must hold all of them. It may hold
            more blocks, and a head, which are left out.
        renames: pairs of a regular expression and its replacement, from a file's names.
        position: name of the position embedding, (..., 1 + side * side, width).
        patch: name of the weight that makes patches, (width, 3, side, side).
        image: side of the images that the file was trained on, pixels.
        unused: beginnings of names that a file may hold, and the model has no use for.
        settings: of the ``config.json`` beside the file, which no shape of a weight tells: name ->
            what the model was built for.
    """

    key: str
    path: str
    keys: Sequence[str]
    renames: Sequence[tuple[str, str]]
    position: str
    patch: str
    image: int
    unused: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)


def load_backbone(
    config: CfgNode, model: nn.Module, backbone: Backbone, logger: logging.Logger
) -> PretrainedReport:
    """Loads a backbone's weights into a module. Collective: every rank calls it.

    The position embedding is resized bicubically to the model's grid of patches, and the weights
    that make patches to the model's patch. A module built under ``deepspeed.zero.Init`` gets its
    slices.

    Args:
        config: MODEL.PRETRAINED_READERS, MODEL.DOWNLOAD_TIMEOUT and CHECKPOINT are read.
        model: belongs to no engine; on any device but meta.
        backbone: what to load.
        logger: gets what was done.

    Raises:
        PretrainedError: where the file cannot be read, or is not exactly of this backbone; it names
            the key, the file and the first names that differ. Nothing of the model is changed.
    """
    apply.require_writable(model, backbone.key)
    decide = functools.partial(_decide, config, model, backbone)
    return load_planned(config, model, decide, logger, alike=True)


def local_files(config: CfgNode, path: str) -> tuple[Path, Path | None]:
    """The weights at a path or address (downloaded), and their config.json.

    Returns:
        A file or directory, and None where no config.json is beside it.
    """
    repository = repository_at(path)
    if path.lower().startswith('hf-hub:') and path.count(':') == 1:
        repository = path
    if repository is None:
        file = Path(downloads.local(path, config))
        settings = (file if file.is_dir() else file.parent) / 'config.json'
        # A .pth is the original's, which writes no such file: one beside it is of something else.
        known = settings.is_file() and file.suffix not in ('.pth', '.pt')
        return file, settings if known else None
    try:
        return Path(downloads.local(repository, config)), Path(
            downloads.local(f'{repository}:config.json', config)
        )
    except PretrainedError as error:
        if repository == path:
            raise
        raise PretrainedError(f'no such file or directory, and of the hub: {error}') from error


def settings_of(path: Path) -> Mapping[str, Any]:
    """The settings of an image model in a config.json of transformers."""
    with interpreting(path, PretrainedError):
        tree = read_json(path)
        inner = tree.get('vision_config')
        return inner if isinstance(inner, Mapping) else tree


def _decide(config: CfgNode, model: nn.Module, backbone: Backbone) -> Plan:
    """Opens the weights and adapts them. Reads files; no collective."""
    name = f'{backbone.key} {shown(backbone.path)}'
    try:
        path, settings = local_files(config, backbone.path)
        if settings is not None:
            _require_settings(settings_of(settings), backbone.settings, settings)
        with interpreting(path, PretrainedError):
            source = open_weights(str(path))
            plan = _adapt(source, model, backbone, name)
            return replace(plan, origins=origins_in(str(path), source, plan.state, model))
    except PretrainedError as error:
        raise PretrainedError(f'{name}: {error}') from error


def _require_settings(saved: Mapping[str, Any], running: Mapping[str, Any], where: Path) -> None:
    for name, value in running.items():
        if name in saved and saved[name] != value:
            raise PretrainedError(
                f'{where} says {name} {saved[name]!r}, and the model is built with {value!r}'
            )


def _adapt(source: State, model: nn.Module, backbone: Backbone, name: str) -> Plan:
    specs = apply.describe(model)
    steps: tuple[Step, ...] = (
        unwrapping.unwrap,
        transforms.rename_by(backbone.renames, 'renamed'),
        functools.partial(_resize, backbone),
    )
    state, notes = run_steps(steps, source, specs)
    keys = set(backbone.keys)
    kept = {key: value for key, value in state.items() if key in keys}
    missing = [key for key in backbone.keys if key not in kept]
    others = [key for key in state if key not in keys]
    deeper = [key for key in others if _FIRST_NUMBER.sub('.0.', key, count=1) in keys]
    heads = model.state_dict(keep_vars=True).keys() - keys
    unexpected = [
        key
        for key in others
        if not (key.startswith(backbone.unused) or key in heads or key in deeper)
    ]
    if missing or unexpected:
        raise PretrainedError(
            f'is of another backbone: {len(missing)} names of the model are not in it '
            f'({few(missing) or "none"}), and {len(unexpected)} of its names are not in the model '
            f'({few(unexpected) or "none"}). Set the keys beside {backbone.key} as for the file'
        )
    apply.require_shapes(kept, specs)
    if deeper:  # InternViT-6B-448px-V1-0 has 48 blocks, and the original's YAMLs use 45 of them
        blocks = sorted({int(_FIRST_NUMBER.findall(key)[0]) for key in deeper})
        text = f'{name}: its blocks {few(blocks)} are not used: the model is built with fewer'
        notes += (Note(f'{text} ({backbone.key.removesuffix("PRETRAINED")}DEPTH)', True),)
    if others:
        notes += (Note(f'left {len(others)} entries out that this model does not use'),)
    named = [n for n, _ in model.named_parameters()]
    matched = sum(n in keys for n in named) / len(named)
    report = PretrainedReport(name, notes, tuple(kept), (), (), matched)
    return Plan(kept, (), report)


def _resize(backbone: Backbone, state: State, specs: Specs) -> Result:
    """Fits the two tensors whose size depends on that of the images and patches."""
    position, patch = state.get(backbone.position), state.get(backbone.patch)
    if not (transforms.is_weight(position) and transforms.is_weight(patch)):
        return Result(state)
    fitted = {}
    to_patch, to_position = specs[backbone.patch].shape, specs[backbone.position].shape
    if patch.shape[-2:] != to_patch[-2:]:
        weight = transforms.read(patch).float()
        fitted[backbone.patch] = F.interpolate(
            weight, tuple(to_patch[-2:]), mode='bicubic', align_corners=False
        )
    if position.shape[-2] != to_position[-2]:
        side, have = backbone.image // patch.shape[-1], position.shape[-2] - 1
        if side * side != have:
            raise PretrainedError(
                f'{backbone.position} is of {have} patches, and images of {backbone.image} pixels '
                f'have {side} x {side} of {patch.shape[-1]}: set '
                f'{backbone.key.removesuffix("ED")}_SIZE to the size that it was trained on'
            )
        vectors = transforms.read(position).float()
        grid = transforms.resize_grid(vectors[..., 1:, :], math.isqrt(to_position[-2] - 1))
        fitted[backbone.position] = torch.cat((vectors[..., :1, :], grid), -2)
    notes = [
        Note(f'resized {key} {tuple(state[key].shape)} -> {tuple(value.shape)}')
        for key, value in fitted.items()
    ]
    return Result({**state, **fitted}, tuple(notes))
