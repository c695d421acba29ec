"""What a gradient of zero does to a parameter, beside none. Imports nothing of DeepSpeed."""

from __future__ import annotations

from typing import NamedTuple


class ZeroEffect(NamedTuple):
    """Whether an optimizer does with gradients of zero what it does without a gradient.

    Attributes:
        never: for a parameter that never has another gradient.
        late: for one that has another in each update from some on.
        at_times: for one that has another in some updates.
    """

    never: bool
    late: bool
    at_times: bool
