"""Tunes: the configuration as given, the ds_configs that ship, a search, and finals."""

from __future__ import annotations

import json
import random
import shutil
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from internvl_ds.config.ds.load import load_ds_config
from internvl_ds.dist.network import free_port
from internvl_ds.errors import ConfigError, InternvlDsError
from internvl_ds.files import write_text
from internvl_ds.tools.plan.sizes import can_recompute
from internvl_ds.tools.tune import records
from internvl_ds.tools.tune.candidates import Candidate, Subject, name_of
from internvl_ds.tools.tune.command import complete, trial_words
from internvl_ds.tools.tune.final_rounds import MOST_FINALISTS, finalists, order_of_round, standings
from internvl_ds.tools.tune.memory_filter import MemoryLimits, PlannerFactory, Plans
from internvl_ds.tools.tune.records import BASE, FINAL, OK, SEARCH, SHIPPED, Records, Row
from internvl_ds.tools.tune.request import Request
from internvl_ds.tools.tune.result import Result, make_result, write_result
from internvl_ds.tools.tune.search import Search, import_optuna
from internvl_ds.tools.tune.search_space import SearchSpace, default_space, parse_space, read_space
from internvl_ds.tools.tune.session import alone, same_settings
from internvl_ds.tools.tune.trial import end, run_trial

_FIRST_LIMIT = 600.0  # seconds for the first trial, which tells how long one takes
_LEAST_LIMIT = 120.0
_LIMIT_FACTOR = 4.0
_TIMED_SECONDS = 3.0
_FEWEST, _MOST = 10, 100  # updates
_FINALS_SHARE = 0.5  # of the budget, at most
_REPEATED = 20  # proposals in a row that are known already, until one is drawn from the others
_TAIL = 15  # lines of a log that an error shows


def tune(request: Request, planner: PlannerFactory | None = None) -> Result:
    """Tunes, or resumes an earlier call in the same directory.

    Writes into the output: trials.jsonl (the truth), trials.csv, trials/NNN/ with each one's log,
    ds_config.tuned.json, result.json and tuned.png.

    Configurations that need too much memory by the ``planner`` are left out.

    Raises:
        ConfigError: for settings that cannot be, or that differ from those of the directory.
        InternvlDsError: when the configuration as given does not run.
    """
    output = request.output.absolute()
    # Errors of these come before anything is made.
    complete(request.launcher, free_port())
    import_optuna()
    with alone(output):
        end(None, output / 'trials')  # of a tuner that was killed
        try:
            return _Tuner(request, output, planner).run()
        finally:
            end(None, output / 'trials')


def updates_for(seconds: float) -> int:
    """How many updates to time when one takes so many seconds. Pure."""
    return min(_MOST, max(_FEWEST, round(_TIMED_SECONDS / seconds)))


class _Tuner:
    def __init__(self, request: Request, output: Path, planner: PlannerFactory | None) -> None:
        self._request, self._output = request, output
        self._planner = planner
        self._plans: Plans | None = None
        ds_config = load_ds_config(request.ds_config)
        self._subject = Subject(request.cfg, request.data_path, request.opts, ds_config, 0)
        self._space_file = read_space(request.space) if request.space else None
        settings = request.settings(self._subject.configured(), ds_config, self._space_file)
        if request.space:
            self._space_of_file(None)
        same_settings(output, settings)
        self._records = Records(output)
        self._updates, self._limit = request.updates, request.limit
        self._bar: tqdm | None = None

    def run(self) -> Result:
        """Runs all trials and finals, and writes the result."""
        with self._progress('trials', self._request.trials):
            base = self._run_base()
            self._space = self._make_space(base)
            for candidate in self._subject.shipped:
                if self._may_try():
                    self._settle(candidate)
            self._search()
        measured = self._records.measured()
        keys = finalists(list(measured.values()), self._shipped_keys(), base.key)
        finals = self._finals(keys)
        order = standings(finals or list(measured.values()), keys)
        winner = self._candidate(measured[order[0].key])
        request = self._request
        result = make_result(
            self._records.rows, order, keys[0], self._shipped_keys(), winner, request.output,
            request.opts, self._subject.differing(winner),
        )  # fmt: skip
        write_result(result, self._output)
        return result

    def _run_base(self) -> Row:
        """The first trial, which must succeed: it shows ranks, memory and the length of a trial."""
        request = self._request
        earlier = next(self._records.of(BASE), None)
        self._updates = request.updates or _FEWEST
        limit = request.limit or _FIRST_LIMIT
        row = earlier or self._run(self._subject.base, BASE, limit)
        if earlier is None and row.status != OK:
            self._explain(row)
        ranks = row.bench['ranks']
        if request.ranks not in (0, ranks):
            raise ConfigError(
                f'--ranks is {request.ranks}, and the launcher starts {ranks}; change one of them'
            )
        self._subject = replace(self._subject, ranks=ranks)
        if earlier is None:
            row = self._add(replace(row, key=self._subject.base.key))
        self._updates = request.updates or updates_for(row.bench['seconds_per_update'])
        self._limit = request.limit or max(_LEAST_LIMIT, _LIMIT_FACTOR * row.seconds)
        self._memory = MemoryLimits.of(row.bench)
        if self._planner is not None:
            self._plans = Plans(self._planner, gpu=not self._memory.on_cpu)
        return row

    def _explain(self, row: Row) -> None:
        log = self._folder(row.trial) / 'log.txt'
        lines = log.read_text(encoding='utf-8', errors='replace').splitlines()[-_TAIL:]
        raise InternvlDsError(
            f'the configuration as given does not run ({row.status}: {row.error}), and tuning '
            'starts from it; --deepspeed_config and --opts can change it. The last lines of '
            f'{log}:\n' + '\n'.join(f'    {line}' for line in lines)
        )

    def _make_space(self, base: Row) -> SearchSpace:
        config, images = self._subject.configured(), self._subject.images()
        if self._request.space is None:
            mixes = config.AUG.MIXUP > 0 or config.AUG.CUTMIX > 0 or config.AUG.CUTMIX_MINMAX
            return default_space(
                images, self._subject.ranks, even=bool(mixes),
                offload=base.bench['device'] != 'cpu', recompute=can_recompute(config),
            )  # fmt: skip
        return self._space_of_file(images)

    def _space_of_file(self, images: int | None) -> SearchSpace:
        """The file's space, with every setting in it tried on the configuration."""
        where = ''
        try:
            space = parse_space(self._space_file, images)
            for axis, choices in space.axes.items():
                for label, choice in choices.items():
                    where = f'/axes/{axis}/{label}: '
                    self._subject.configured(choice.opts)
        except ConfigError as error:
            raise ConfigError(f'--space {self._request.space}: {where}{error}') from None
        return space

    def _settle(self, candidate: Candidate) -> Row:
        """Runs a candidate, unless it has a row already or needs too much memory."""
        row = self._records.measured().get(candidate.key)
        if row is not None:
            return row
        if lacks := self._lacks(candidate):
            return self._add(_row_of(candidate, status=records.NO_ROOM, error=lacks))
        return self._add(self._run(candidate, candidate.kind, self._limit))

    def _search(self) -> None:
        """Proposes and runs until the trials, the time or the space are used up."""
        trials = [(row.labels, row.speed) for row in self._records.of(SEARCH)]
        search = Search(self._space, self._request.seed, trials)
        history = [labels for labels, _ in trials]
        while self._may_try():
            labels = self._next_labels(search, history)
            if labels is None:
                _tell('every configuration of the space has been tried')
                return
            history.append(labels)
            try:
                row = self._settle(self._subject.proposal(self._space, labels))
            except ConfigError as error:
                name, reason = name_of(labels), str(error)  # the name is the key too
                refusal = Row(-1, SEARCH, name, name, labels, {}, {}, records.REFUSED, error=reason)
                row = self._add(refusal)
            search.learn(labels, row.speed)

    def _next_labels(self, search: Search, history: list[dict[str, str]]) -> dict[str, str] | None:
        for _ in range(_REPEATED):
            labels = search.propose()
            if labels not in history:
                return labels
        rest = [labels for labels in self._space.combinations() if labels not in history]
        return random.Random(f'{self._request.seed} {len(rest)}').choice(rest) if rest else None

    def _may_try(self) -> bool:
        """Whether another trial is due, and would leave the finals their time."""
        finals = self._request.confirm * MOST_FINALISTS * self._typical()
        reserve = min(finals, _FINALS_SHARE * self._request.budget)
        return len(self._trials()) < self._request.trials and self._in_time(1, reserve)

    def _in_time(self, trials: int, reserve: float = 0.0) -> bool:
        rest = self._request.budget - self._records.spent() - reserve
        return trials * self._typical() <= rest

    def _typical(self) -> float:
        """Seconds of a trial that ends well."""
        return statistics.median(row.seconds for row in self._records.rows if row.status == OK)

    def _trials(self) -> list[Row]:
        """The trials that count: not refused, dropped, or of the finals."""
        return [row for row in self._records.of(BASE, SHIPPED, SEARCH) if row.started]

    def _finals(self, keys: Sequence[str]) -> list[Row]:
        """Measures the finalists again, in as many whole rounds as request and time allow."""
        rounds = self._request.confirm if len(keys) > 1 else 0
        after = len(self._trials())
        rows: list[Row] = []
        with self._progress('finals', rounds * len(keys)):
            for number in range(rounds):
                finals = (row for row in self._records.of(FINAL) if row.after == after)
                of_round = {row.key: row for row in finals if row.round == number}
                order = order_of_round(keys, self._request.seed, number)
                rest = [key for key in order if key not in of_round]
                if rest and not self._in_time(len(rest)):
                    _tell(f'the time is up after {number} of {rounds} rounds')
                    break
                for key in rest:
                    candidate = self._candidate(self._records.measured()[key])
                    row = self._run(candidate, FINAL, self._limit)
                    of_round[key] = self._add(replace(row, round=number, after=after))
                rows += of_round.values()
        return rows

    def _shipped_keys(self) -> dict[str, str]:
        return {candidate.key: candidate.name for candidate in self._subject.shipped}

    def _candidate(self, row: Row) -> Candidate:
        """The configuration of a row."""
        if row.labels:
            return self._subject.proposal(self._space, row.labels)
        every = [self._subject.base, *self._subject.shipped]
        return next(candidate for candidate in every if candidate.key == row.key)

    def _lacks(self, candidate: Candidate) -> str:
        """Why a candidate needs too much memory; '' where it may run."""
        if self._plans is None:
            return ''
        recompute = candidate.config.TRAIN.USE_CHECKPOINT
        try:
            planner = self._plans.of(candidate.config)
            need = planner.need(candidate.resolved, self._subject.ranks, recompute=recompute)
        except Exception as error:  # a model of the user's own can fail there in any way
            _tell(f'not planned, and so not left out: {candidate.name}: {error}')
            return ''
        return self._memory.lacks(need)

    def _run(self, candidate: Candidate, kind: str, limit: float) -> Row:
        number = 1 + max((row.trial for row in self._records.rows), default=-1)
        folder = self._folder(number)
        shutil.rmtree(folder, ignore_errors=True)  # of a trial that was interrupted
        folder.mkdir(parents=True)
        write_text(folder / 'ds_config.json', json.dumps(candidate.ds_config, indent=2) + '\n')
        launcher, port = complete(self._request.launcher, free_port())
        opts = {
            **candidate.opts,
            'BENCH.UPDATES': self._updates,
            'BENCH.WARMUP': self._request.warmup,
            'TRAIN.AUTO_RESUME': False,
            'MODEL.RESUME': '',
            'MODEL.PRETRAINED': '',  # any weights are as fast
        }
        request = self._request
        words = trial_words(request.cfg, folder, request.data_path, request.opts, opts)
        outcome = run_trial([*launcher, *words], folder, limit, port)
        row = _row_of(candidate, outcome.status, outcome.error)
        return replace(row, trial=number, kind=kind, seconds=outcome.seconds, bench=outcome.bench)

    def _add(self, row: Row) -> Row:
        self._records.append(row)
        speed = f'{row.speed:.1f} img/s' if row.status == OK else f'{row.status}: {row.error}'
        _tell(f'{row.trial:3d} {row.kind:7} {row.name}: {speed}')
        if self._bar is not None and row.started:
            self._bar.update()
        return row

    @contextmanager
    def _progress(self, what: str, total: int) -> Iterator[None]:
        """A progress bar, which counts the rows of `_add` and the trials before."""
        before = len(self._trials()) if what == 'trials' else 0
        with tqdm(total=total, initial=before, desc=what, file=sys.stderr, disable=None) as bar:
            self._bar = bar
            yield
        self._bar = None

    def _folder(self, number: int) -> Path:
        return self._output / 'trials' / f'{number:03d}'


def _row_of(candidate: Candidate, status: str, error: str) -> Row:
    what = dict(candidate.labels), dict(candidate.ds_config), dict(candidate.opts)
    return Row(-1, candidate.kind, candidate.name, candidate.key, *what, status, error=error)


def _tell(text: str) -> None:
    tqdm.write(text, file=sys.stderr)
