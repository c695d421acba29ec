"""MODEL.PRETRAINED 'timm': the address of the weights that timm has for a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from internvl_ds.errors import PretrainedError

NAME = 'timm'  # of MODEL.PRETRAINED


def address_of(model: nn.Module) -> str:
    """The address of the weights of the tag that a model of timm was built with.

    Returns:
        Of the Hugging Face Hub, where timm has them there, as for nearly all; else an URL.

    Raises:
        PretrainedError: for a model that is none of timm's, or of which timm has no weights.
    """
    settings = getattr(model, 'pretrained_cfg', None)
    if not isinstance(settings, Mapping) or not settings.get('architecture'):
        raise PretrainedError(
            f"MODEL.PRETRAINED is 'timm', and {type(model).__name__} is no model of timm: name a "
            'file or an address'
        )
    name = _name_of(settings)
    repository, file = settings.get('hf_hub_id'), settings.get('hf_hub_filename')
    if repository and not file:
        return f'hf-hub:{repository}'
    if settings.get('custom_load') and (repository or settings.get('url')):
        raise PretrainedError(
            f"MODEL.PRETRAINED is 'timm', and the weights of {name} are in a format of their own: "
            'have timm load them and save the state dict'
        )
    if repository:
        return f'hf-hub:{repository}:{file}'
    if url := settings.get('url'):
        return str(url)
    from timm import list_pretrained

    others = list_pretrained(f'{settings["architecture"]}.*')
    hint = f'MODEL.NAME may be one of {", ".join(others)}' if others else 'name a file or address'
    raise PretrainedError(f"MODEL.PRETRAINED is 'timm', which has no weights of {name}: {hint}")


def _name_of(settings: Mapping[str, Any]) -> str:
    tag = settings.get('tag')
    return f'{settings["architecture"]}.{tag}' if tag else str(settings['architecture'])
