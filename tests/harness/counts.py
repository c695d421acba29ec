"""How many trials a random test makes: few in continuous integration, many with --soak."""

import os

SOAK = bool(os.environ.get('INTERNVL_DS_SOAK'))


def trials(name: str, ci: int, soak: int) -> int:
    """The number in the environment variable ``name``; else of the tier that runs.

    Args:
        name: such as INTERNVL_DS_KILLS.
        ci: the number in continuous integration.
        soak: the number under ``launch/test.sh --soak``, which sets INTERNVL_DS_SOAK.
    """
    return int(os.environ.get(name) or (soak if SOAK else ci))
