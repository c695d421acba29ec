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


def _last_arguments(given: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """The arguments from the 12th on, by name.

    Args:
        given: those given by position.
        named: those given by name, whichever they are.
    """
    numbers = f'{_SHARED + 1} to {_SHARED + len(given)}'
    if len(given) > len(_ORIGINAL):
        raise ConfigError(
            f'save_checkpoint: {_SHARED + len(given)} arguments by position; it takes '
            f'{_SHARED + 1}, or {_SHARED + len(_ORIGINAL)} in the original order'
        )
    names = _ORIGINAL[: len(given)]
    if given and isinstance(given[0], str):
        if len(given) > 1:
            raise ConfigError(
                f'save_checkpoint: of the arguments {numbers} the first is {given[0]!r}, which is '
                f"`best` in this package's order, and in the original's it would be model_ems: "
                f'pass best={given[0]!r} by name, and the others without it'
            )
        names = ('best',)
    elif len(given) == 1 and given[0] is None and 'best' not in named:
        names = ('best',)  # in the original order it is model_ems, None as well
    if twice := [name for name in names if name in named]:
        raise ConfigError(
            f'save_checkpoint: {twice[0]} is given by name, and by position as one of the '
            f'arguments {numbers}, which are {", ".join(names)}: pass it once'
        )
    last = {**named, **dict(zip(names, given, strict=True))}
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
