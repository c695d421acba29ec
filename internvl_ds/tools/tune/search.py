"""Which labels to try next: Optuna's TPE sampler, asked and told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from internvl_ds.errors import InternvlDsError
from internvl_ds.tools.tune.search_space import Labels, SearchSpace

# The first proposals are drawn at random: the sampler has nothing to go by yet.
_RANDOM = 8


class Search:
    """Proposes labels, and learns from how fast they were; the study is in memory only."""

    def __init__(
        self, space: SearchSpace, seed: int, known: Sequence[tuple[Labels, float]] = ()
    ) -> None:
        """Begins, or goes on.

        Args:
            space: to propose from.
            seed: of what is drawn.
            known: labels and images per second of earlier proposals, 0 for those that failed.

        Raises:
            InternvlDsError: when Optuna is not installed.
        """
        optuna = import_optuna()
        self._space = space
        self._axes = {
            name: optuna.distributions.CategoricalDistribution(list(choices))
            for name, choices in space.axes.items()
        }
        # A sampler that goes on must not draw again what it drew first.
        sampler = optuna.samplers.TPESampler(seed=seed + len(known), n_startup_trials=_RANDOM)
        self._study = optuna.create_study(direction='maximize', sampler=sampler)
        self._failed, self._finished = optuna.trial.TrialState.FAIL, optuna.trial.create_trial
        for labels, speed in known:
            self.learn(labels, speed)

    def propose(self) -> dict[str, str]:
        """Labels to try next; they may have been proposed before."""
        asked = self._study.ask()
        labels: dict[str, str] = {}
        for axis in self._space.axes:
            if self._space.active(axis, labels):
                labels[axis] = asked.suggest_categorical(axis, list(self._space.axes[axis]))
        # What becomes of it is told by `learn`: it may not be tried at all.
        self._study.tell(asked, state=self._failed)
        return labels

    def learn(self, labels: Labels, speed: float) -> None:
        """How fast labels are, in images per second; 0 where they cannot run."""
        used = {axis: self._axes[axis] for axis in labels}
        trial = self._finished(params=dict(labels), distributions=used, value=speed)
        self._study.add_trial(trial)


def import_optuna() -> Any:
    """The package, as quiet as it can be.

    Raises:
        InternvlDsError: when it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise InternvlDsError(
            f'tuning searches with Optuna, which cannot be imported ({error}); install it with: '
            "pip install 'internvl_ds[tune]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
