"""Builds the configured model, and freezes its untrained parameters."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import timm
import torch
from timm.models import is_model
from torch import nn
from yacs.config import CfgNode

from internvl_ds.config.factory import failed, load_factory
from internvl_ds.config.tree import get_option
from internvl_ds.errors import ConfigError, InternvlDsError
from internvl_ds.train.models.batch_norm import synchronize
from internvl_ds.train.models.build import BUILDERS

_logger = logging.getLogger(__name__)


def build_model(config: CfgNode) -> nn.Module:
    """Builds the model with random weights, on the CPU, in float32.

    MODEL.FACTORY ('package.module:function', called with the config) wins; else MODEL.TYPE
    'timm' builds MODEL.NAME, and 'intern_vit_6b' and 'clip_vit' the original's own models, with the
    weights of their PRETRAINED: then every rank calls it. The result depends on torch's seed, so
    every rank seeds alike first.

    Returns:
        The module, with frozen parameters (TRAIN.OPTIMIZER.FREEZE_BACKBONE) marked, and with
        activation checkpointing on where TRAIN.USE_CHECKPOINT asks for it.

    Raises:
        ConfigError: for a factory or model that does not exist, or a setting the model lacks.
        PretrainedError: where the PRETRAINED of the original's models is not of their backbone.
    """
    factory = get_option(config, 'MODEL.FACTORY', '')
    reads = _Reads()
    if factory:
        with _watched(config.TRAIN, reads):
            model = load_factory('MODEL.FACTORY', factory)(config)
        if not isinstance(model, nn.Module):
            raise ConfigError(
                f'MODEL.FACTORY {factory!r} returned a {type(model).__name__}, not an nn.Module'
            )
    elif config.MODEL.TYPE == 'timm':
        model = _build_timm_model(config)
    elif config.MODEL.TYPE in BUILDERS:
        model = BUILDERS[config.MODEL.TYPE](config)
    else:
        known = ', '.join(map(repr, [*BUILDERS, 'timm']))
        raise ConfigError(
            f'MODEL.TYPE {config.MODEL.TYPE!r} does not ship with this package, which has {known}: '
            "set MODEL.TYPE 'timm' and MODEL.NAME to a timm model, or MODEL.FACTORY to "
            "'package.module:function', which is called with the config and returns the nn.Module"
        )
    if get_option(config, 'MODEL.SYNC_BN', False):
        _logger.info(
            'MODEL.SYNC_BN: %d batch norms see the images of all ranks', synchronize(model)
        )
    if config.TRAIN.USE_CHECKPOINT:
        _enable_activation_checkpointing(model, by_factory='USE_CHECKPOINT' in reads)
    freeze_parameters(model, config.TRAIN.OPTIMIZER.FREEZE_BACKBONE)
    return model


def freeze_parameters(model: nn.Module, which: bool | Sequence[int] | None) -> None:
    """Turns requires_grad off: True for all but the classifier, [i, ...] for ``levels.{i}``.

    Raises:
        ConfigError: when nothing fits, or when nothing would be left to train.
    """
    setting = f'TRAIN.OPTIMIZER.FREEZE_BACKBONE {which!r}'
    if not which:
        return
    if which is True:
        trained = {id(p) for p in classifier_of(model, setting).parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
    else:
        prefixes = tuple(f'levels.{level}' for level in which)
        pattern = re.compile(rf'(^|\.)({"|".join(map(re.escape, prefixes))})(\.|$)')
        frozen = [p for name, p in model.named_parameters() if pattern.search(name)]
        if not frozen:
            raise ConfigError(f'{setting}: no parameter is named like {", ".join(prefixes)}')
        for parameter in frozen:
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(f'{setting} leaves no parameter to train')


def classifier_of(model: nn.Module, setting: str = 'this') -> nn.Module:
    """Finds the classifier head: timm's ``get_classifier()``, else the attribute ``head``.

    Args:
        model: the bare module, not an engine.
        setting: what asks for the head; the error begins with it.
    """
    getter = getattr(model, 'get_classifier', None)
    head = getter() if callable(getter) else getattr(model, 'head', None)
    if isinstance(head, tuple | list):  # distilled models have two
        head = nn.ModuleList(head)
    if not isinstance(head, nn.Module) or not any(True for _ in head.parameters()):
        raise ConfigError(
            f'{setting} needs a model with a classifier head, and {type(model).__name__} has '
            f'neither a get_classifier() nor an attribute head with parameters'
        )
    return head


def set_train_mode(
    model: nn.Module, module: nn.Module, freeze: bool | Sequence[int] | None
) -> None:
    """Puts an engine or module in training mode, and its wholly frozen backbone in eval mode.

    Dropout and batch statistics of a backbone that does not train would only blur its features.
    """
    model.train()
    if freeze is True:
        module.eval()
        classifier_of(module).train()


def input_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that images must have: an engine's half precision, else that of the weights."""
    for name, dtype in (('bfloat16_enabled', torch.bfloat16), ('fp16_enabled', torch.float16)):
        enabled = getattr(model, name, None)
        if callable(enabled) and enabled():
            return dtype
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _build_timm_model(config: CfgNode) -> nn.Module:
    name = config.MODEL.NAME
    if ':' not in name and not is_model(name):  # with a colon it is a hub address, not a name
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f'; near it: {", ".join(near)}' if near else ''
        raise ConfigError(f'MODEL.NAME {name!r}: timm has no such model{hint}')
    offered = {
        'img_size': ('DATA.IMG_SIZE', config.DATA.IMG_SIZE),
        'drop_rate': ('MODEL.DROP_RATE', config.MODEL.DROP_RATE),
        'drop_path_rate': ('MODEL.DROP_PATH_RATE', config.MODEL.DROP_PATH_RATE),
    }
    settings = dict(config.MODEL.KWARGS)
    for key, ours in (('num_classes', 'MODEL.NUM_CLASSES'), ('pretrained', 'MODEL.PRETRAINED')):
        if key in settings:
            raise ConfigError(f'MODEL.KWARGS {key}={settings[key]!r}: set {ours} in its place')
    while True:
        standard = {key: value for key, (_, value) in offered.items()}
        try:
            kwargs = {'num_classes': config.MODEL.NUM_CLASSES, **standard, **settings}
            return timm.create_model(name, pretrained=False, **kwargs)
        except TypeError as error:
            # Not every family takes every argument, and timm has no list of who takes what.
            match = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            refused = match.group(1) if match else None
            if refused in offered and refused not in settings:
                key, value = offered.pop(refused)
                if value and refused != 'img_size':
                    _logger.warning('%s takes no %s: %s %s is not used', name, refused, key, value)
                continue
            if refused in settings:
                raise ConfigError(
                    f'MODEL.KWARGS {refused}={settings[refused]!r}: {name} takes no such argument'
                ) from error
            raise failed(f'MODEL.NAME {name!r}: timm, with {kwargs},', error) from error
        except InternvlDsError:
            raise
        except Exception as error:  # an assertion of sizes, an unknown tag, a hub that is away, ...
            raise failed(f'MODEL.NAME {name!r}: timm, with {kwargs},', error) from error


def _enable_activation_checkpointing(model: nn.Module, by_factory: bool) -> None:
    setter = getattr(model, 'set_grad_checkpointing', None)
    if not callable(setter):
        if by_factory:
            _logger.info('TRAIN.USE_CHECKPOINT True: MODEL.FACTORY reads it and takes care of it')
            return
        raise ConfigError(
            f'TRAIN.USE_CHECKPOINT True: {type(model).__name__} has no set_grad_checkpointing(), '
            'and no MODEL.FACTORY has read TRAIN.USE_CHECKPOINT to build it so'
        )
    try:
        setter(True)
    except AssertionError as error:  # timm's way to say that a model has none
        raise ConfigError(f'TRAIN.USE_CHECKPOINT True: {type(model).__name__}: {error}') from error


class _Reads(set[str]):
    """Keys of a section; copies of the section add to the same."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Reads:
        return self


class _Watched(CfgNode):
    """A section of the configuration that notes the keys that are read from it."""

    def __getitem__(self, key: str) -> Any:
        self.__dict__['reads'].add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.__dict__['reads'].add(key)
        return super().get(key, default)


@contextmanager
def _watched(section: CfgNode, reads: _Reads) -> Iterator[None]:
    """Adds to ``reads`` the keys that are read from a section meanwhile."""
    section.__dict__['reads'] = reads
    object.__setattr__(section, '__class__', _Watched)  # a CfgNode takes attributes for keys
    try:
        yield
    finally:
        object.__setattr__(section, '__class__', CfgNode)
        del section.__dict__['reads']
