"""The loss scale: when it falls and when it grows. Pure; one rule for every precision and stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from internvl_ds.errors import InternvlDsError


@dataclass
class LossScale:
    """The factor of fp16 losses before the backward; moves as torch's GradScaler.

    An overflow multiplies the scale by ``backoff_factor``, and ``growth_interval`` applied updates
    in a row by ``growth_factor``. DeepSpeed's settings go beyond that: ``hysteresis`` overflows it
    takes to lower the scale (with 1, each does), and ``min_scale`` below which it does not fall.

    Attributes:
        scale: the present factor.
        dynamic: False for a static scale, which never moves.
        growth_tracker: applied updates in a row since the last overflow or growth.
        hysteresis_left: overflows until the scale falls.
        consecutive_hysteresis: whether an applied update restores ``hysteresis_left``; otherwise
            only a growth does.
    """

    scale: float = 2.0**16
    dynamic: bool = True
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    growth_tracker: int = 0
    hysteresis: int = 1
    hysteresis_left: int = 1
    consecutive_hysteresis: bool = False
    min_scale: float = 1.0

    @property
    def exhausted(self) -> bool:
        """Whether the next overflow would find the scale at its minimum."""
        return self.dynamic and self.hysteresis_left <= 1 and self.scale <= self.min_scale

    def update(self, skipped: bool) -> None:
        """Moves the scale after an update, which may be ``skipped`` for a non-finite gradient."""
        if not self.dynamic:
            return
        if skipped:
            self.growth_tracker = 0
            if self.hysteresis_left > 1:
                self.hysteresis_left -= 1
            else:
                self.scale = max(self.scale * self.backoff_factor, self.min_scale)
            return
        self.growth_tracker += 1
        if self.consecutive_hysteresis:
            self.hysteresis_left = self.hysteresis
        if self.growth_tracker >= self.growth_interval:
            self.growth_tracker = 0
            self.hysteresis_left = self.hysteresis
            # as in torch: a scale that float32 cannot hold is not taken
            if self.scale * self.growth_factor < 2.0**128:
                self.scale *= self.growth_factor

    def state_dict(self) -> dict[str, Any]:
        """A GradScaler's state (torch's loads it), and the hysteresis."""
        return {
            'scale': self.scale,
            'growth_factor': self.growth_factor,
            'backoff_factor': self.backoff_factor,
            'growth_interval': self.growth_interval,
            '_growth_tracker': self.growth_tracker,
            'hysteresis_left': self.hysteresis_left,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over scale, growth counter and hysteresis; settings stay those of this run.

        Args:
            state: `state_dict`'s result or a GradScaler's. ``{'scale': 1.0}`` alone is of a run
                without a loss scale, and changes nothing; nor does anything a static scale. What is
                neither raises InternvlDsError.
        """
        require_scaler_state(state)
        if not self.dynamic or ('_growth_tracker' not in state and state.get('scale', 1.0) == 1.0):
            return
        self.scale = max(float(state['scale']), self.min_scale)
        self.growth_tracker = int(state.get('_growth_tracker', 0))
        count = int(state.get('hysteresis_left', self.hysteresis))
        self.hysteresis_left = min(max(count, 1), self.hysteresis)


def require_scaler_state(state: Mapping[str, Any]) -> None:
    """Raises InternvlDsError unless this is the state of a loss scaler, or empty."""
    if state and 'scale' not in state:
        raise InternvlDsError(f'not the state of a loss scaler: no scale among {sorted(state)[:5]}')
    scale = state.get('scale', 1.0)
    if not 0.0 < float(scale) < float('inf'):
        raise InternvlDsError(f'not the state of a loss scaler: its scale is {scale}')
