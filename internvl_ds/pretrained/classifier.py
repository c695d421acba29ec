"""The classifier of a model: the layers whose rows are its classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn


def classifier_layers(model: nn.Module) -> tuple[str, ...]:
    """Names of the layers that give the logits; () for a model without any.

    A timm model says them in its ``pretrained_cfg`` (several for one that was distilled), or by
    ``get_classifier()``; of any other model it is the attribute ``head``. What is named may be made
    of several layers, such as a norm and a Linear: each is in the result.
    """
    modules = dict(model.named_modules())
    for names in (_from_settings(model), _from_method(model, modules), ('head',)):
        layers = [layer for name in names for layer in _layers(name, modules.get(name))]
        if layers:
            return tuple(dict.fromkeys(layers))
    return ()


def _from_settings(model: nn.Module) -> Sequence[str]:
    settings = getattr(model, 'pretrained_cfg', None)
    names = settings.get('classifier') if isinstance(settings, Mapping) else None
    return (names,) if isinstance(names, str) else tuple(names or ())


def _from_method(model: nn.Module, modules: Mapping[str, nn.Module]) -> Sequence[str]:
    method = getattr(model, 'get_classifier', None)
    found = method() if callable(method) else ()
    parts = {id(part) for part in (found if isinstance(found, tuple | list) else (found,))}
    return [name for name, module in modules.items() if id(module) in parts]


def _layers(name: str, module: nn.Module | None) -> Iterator[str]:
    """The outermost modules within one that have parameters of their own."""
    if module is None:
        return
    if next(module.parameters(recurse=False), None) is not None:
        yield name
        return
    for child, part in module.named_children():
        yield from _layers(f'{name}.{child}', part)
