"""Proposes the labels to try next, by Optuna's TPE sampler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from internvl_ds.errors import InternvlDsError
from internvl_ds.tools.tune.search_space import Labels, SearchSpace

# The first proposals are drawn at random: the sampler has no results yet.
_RANDOM = 8


class Search:
    """Proposes labels, and learns from how fast they were; the study is in memory only."""

    def __init__(
        self, space: SearchSpace, seed: int, known: Sequence[tuple[Labels, float]] = ()
    ) -> None:
        """Starts a study, or resumes one after ``known``: earlier proposals, as `learn` takes them.

        Raises:
            InternvlDsError: when Optuna is not installed.
        """
        self._optuna = optuna = import_optuna()
        self._space = space
        # A resumed sampler must not repeat its first draws.
        sampler = optuna.samplers.TPESampler(seed=seed + len(known), n_startup_trials=_RANDOM)
        self._study = optuna.create_study(direction='maximize', sampler=sampler)
        for labels, speed in known:
            self.learn(labels, speed)

    def propose(self) -> dict[str, str]:
        """Labels to try next; they may have been proposed before."""
        trial = self._study.ask()
        labels: dict[str, str] = {}
        for axis in self._space.axes:
            if self._space.active(axis, labels):
                labels[axis] = trial.suggest_categorical(axis, list(self._space.axes[axis]))
        # `learn` adds what becomes of it, as another trial: it may never run.
        self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
        return labels

    def learn(self, labels: Labels, speed: float) -> None:
        """Records the speed of labels, in images per second; 0 if they cannot run."""
        categorical = self._optuna.distributions.CategoricalDistribution
        axes = {axis: categorical(list(self._space.axes[axis])) for axis in labels}
        create = self._optuna.trial.create_trial
        self._study.add_trial(create(params=dict(labels), distributions=axes, value=speed))


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
