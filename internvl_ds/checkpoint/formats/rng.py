"""The states of this process's random number generators, as text that a tag can keep."""

from __future__ import annotations

import base64
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator

from internvl_ds.errors import CheckpointError
from internvl_ds.files.reading import interpreting


def rng_state() -> dict[str, Any]:
    """Python's, numpy's and torch's global generators, and that of the accelerator in use.

    Returns:
        Nested plain values, as `internvl_ds.checkpoint.formats.state_json.state_text` takes them.
    """
    numpy_state: Any = np.random.get_state(legacy=True)
    kind, keys, position, has_gauss, gauss = numpy_state
    state: dict[str, Any] = {
        'python': random.getstate(),
        'numpy': [kind, _text(keys.astype('<u4').tobytes()), position, has_gauss, gauss],
        'torch': _text(torch.get_rng_state().numpy().tobytes()),
        'accelerator': None,
    }
    accelerator = get_accelerator()
    if accelerator.device_name() != 'cpu':
        state['accelerator'] = {
            'name': accelerator.device_name(),
            'state': _text(accelerator.get_rng_state().cpu().numpy().tobytes()),
        }
    return state


def require_rng_state(state: Any) -> None:
    """Raises whatever `set_rng_state` would for a state, in generators made for this."""
    random.Random().setstate(state['python'])
    np.random.RandomState().set_state(_of_numpy(state))
    torch.Generator().set_state(_tensor(state['torch']))
    if (entry := state['accelerator']) is not None:
        _ = entry['name'].lower(), _tensor(entry['state'])


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Sets what `rng_state` gave; the accelerator's where the tag was saved on one of its kind."""
    with interpreting('no states of random number generators', CheckpointError):
        random.setstate(state['python'])
        np.random.set_state(_of_numpy(state))
        torch.set_rng_state(_tensor(state['torch']))
        entry, accelerator = state['accelerator'], get_accelerator()
        if entry and entry['name'] == accelerator.device_name():
            accelerator.set_rng_state(_tensor(entry['state']))


def _of_numpy(state: Mapping[str, Any]) -> Any:
    kind, keys, position, has_gauss, gauss = state['numpy']
    return kind, np.frombuffer(base64.b64decode(keys), '<u4'), position, has_gauss, gauss


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
