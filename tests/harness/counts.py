"""How many trials a random test makes: few in continuous integration, many with --soak."""

import os
from collections.abc import Iterable
from typing import TypeVar

_T = TypeVar('_T')

SOAK = bool(os.environ.get('INTERNVL_DS_SOAK'))


def trials(name: str, ci: int, soak: int) -> int:
    """The number in the environment variable ``name``; else of the tier that runs.

    Args:
        name: such as INTERNVL_DS_KILLS.
        ci: the number in continuous integration.
        soak: the number under ``launch/test.sh --soak``, which sets INTERNVL_DS_SOAK.
    """
    return int(os.environ.get(name) or (soak if SOAK else ci))


def share(cells: Iterable[_T], one_of: int) -> list[_T]:
    """Each ``one_of``-th cell of a table, so that each row and column is met; all with --soak."""
    return list(cells)[:: 1 if SOAK else one_of]
