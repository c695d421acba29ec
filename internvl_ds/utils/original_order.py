"""save_checkpoint with the last arguments in either order: this package's, or the original's."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from internvl_ds.checkpoint import save
from internvl_ds.errors import ConfigError

# From `config` to `ema_decay` the two orders are the same.
_SHARED = list(inspect.signature(save.save_checkpoint).parameters).index('best')
_NOT_KEPT = ('model_ems', 'max_accuracy_ems', 'ems_model_num')
_ORIGINAL = (*_NOT_KEPT, 'best')


@functools.wraps(save.save_checkpoint)
def save_checkpoint(*args: Any, **kwargs: Any) -> str:
    """See `internvl_ds.checkpoint.save.save_checkpoint`. Collective: every rank calls it.

    The original's positional order is taken too, with ``model_ems, max_accuracy_ems,
    ems_model_num`` between ``ema_decay`` and ``best``. A tag keeps none of the three, so a value
    other than None is refused.

    Raises:
        ConfigError: where it cannot be told which argument is which, or for one of these three.
    """
    last = _last_arguments(args[_SHARED:], kwargs)
    return save.save_checkpoint(*args[:_SHARED], **last)


def _last_arguments(values: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Any]:
    """The arguments from the 12th on, by name.

    Args:
        values: those given by position.
        keywords: those given by name, whichever they are.
    """
    numbers = f'{_SHARED + 1} to {_SHARED + len(values)}'
    if len(values) > len(_ORIGINAL):
        raise ConfigError(
            f'save_checkpoint: {_SHARED + len(values)} arguments by position; it takes '
            f'{_SHARED + 1}, or {_SHARED + len(_ORIGINAL)} in the original order'
        )
    names = _ORIGINAL[: len(values)]
    if values and isinstance(values[0], str):
        if len(values) > 1:
            raise ConfigError(
                f'save_checkpoint: of the arguments {numbers} the first is {values[0]!r}, which is '
                f"`best` in this package's order, and in the original's it would be model_ems: "
                f'pass best={values[0]!r} by name, and the others without it'
            )
        names = ('best',)
    elif len(values) == 1 and values[0] is None and 'best' not in keywords:
        names = ('best',)  # in the original order it is model_ems, None as well
    if duplicates := [name for name in names if name in keywords]:
        raise ConfigError(
            f'save_checkpoint: {duplicates[0]} is given by name, and by position as one of the '
            f'arguments {numbers}, which are {", ".join(names)}: pass it once'
        )
    last = {**keywords, **dict(zip(names, values, strict=True))}
    for name in _NOT_KEPT:
        if (value := last.pop(name, None)) is not None:
            raise ConfigError(
                f'save_checkpoint: {name} is a {type(value).__name__}, and a tag does not keep it: '
                'pass None and save it in a file of its own'
            )
    if not isinstance(best := last.get('best'), str | None):
        raise ConfigError(
            f"save_checkpoint: best is {best!r}; it is a name such as 'best', or None"
        )
    return last
