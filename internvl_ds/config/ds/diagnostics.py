"""What is found wrong with a ds_config: one record a fault, and the words for it. Pure."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

ERROR, WARNING = 'error', 'warning'

# Where both files may speak of one thing: the key of the ds_config, and that of the yacs config.
_COUNTERPARTS = {
    '/train_batch_size': 'DATA.BATCH_SIZE',
    '/train_micro_batch_size_per_gpu': 'DATA.BATCH_SIZE',
    '/gradient_accumulation_steps': 'TRAIN.ACCUMULATION_STEPS',
    '/gradient_clipping': 'TRAIN.CLIP_GRAD',
    '/optimizer/params/max_grad_norm': 'TRAIN.CLIP_GRAD',
    '/fp16': 'AMP_OPT_LEVEL',
    '/bf16': 'AMP_OPT_LEVEL',
    '/torch_autocast': 'AMP_OPT_LEVEL',
    '/fp16/enabled': 'AMP_OPT_LEVEL',
    '/bf16/enabled': 'AMP_OPT_LEVEL',
    '/torch_autocast/enabled': 'AMP_OPT_LEVEL',
    '/torch_autocast/dtype': 'AMP_TYPE',
    '/optimizer': 'TRAIN.OPTIMIZER',
    '/optimizer/type': 'TRAIN.OPTIMIZER.NAME',
    '/optimizer/params/lr': 'TRAIN.BASE_LR',
    '/optimizer/params/betas': 'TRAIN.OPTIMIZER.BETAS',
    '/optimizer/params/eps': 'TRAIN.OPTIMIZER.EPS',
    '/optimizer/params/momentum': 'TRAIN.OPTIMIZER.MOMENTUM',
    '/optimizer/params/weight_decay': 'TRAIN.WEIGHT_DECAY',
    '/scheduler': 'TRAIN.LR_SCHEDULER',
    '/scheduler/type': 'TRAIN.LR_SCHEDULER.NAME',
}


@dataclass(frozen=True)
class Finding:
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
        """All of it in one line."""
        said = re.search(rf'(?<!\w){re.escape(self.pointer)}(?![\w/])', self.message)
        where = '' if not self.pointer or said else f'{self.pointer}: '
        key = f' [{self.yacs}]' if self.yacs and self.yacs not in self.message else ''
        return f'{where}{self.message}{key}'


def finding(pointer: str, message: str, severity: str = ERROR, yacs: str = '') -> Finding:
    """A `Finding`, with the yacs key that belongs to the pointer where none is given."""
    return Finding(pointer, message, severity, yacs or _COUNTERPARTS.get(pointer, ''))


def pointer_of(path: Iterable[str]) -> str:
    """The JSON pointer (RFC 6901) of a path of keys."""
    return ''.join('/' + str(key).replace('~', '~0').replace('/', '~1') for key in path)


def shown(value: Any) -> str:
    """A value as the JSON has it, cut where it is long."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else f'{text[:57]}...'


def nearest(name: str, known: Iterable[str], least: float) -> str | None:
    """The known name most like one, in any case of letters; None where none is like enough.

    Args:
        least: how like it must be, from 0 to 1.
    """
    by_lower = {key.lower(): key for key in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=least)
    return by_lower[near[0]] if near else None


def value_at(tree: Mapping[str, Any], *path: str, default: Any = None) -> Any:
    """What a nested mapping holds at a path; ``default`` where it holds nothing there."""
    node: Any = tree
    for key in path:
        if not isinstance(node, Mapping) or key not in node:
            return default
        node = node[key]
    return node
