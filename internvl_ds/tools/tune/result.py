"""The result of tuning: ds_config.tuned.json, result.json, the plot, and the words to use it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl_ds.files import write_text
from internvl_ds.tools.tune.candidates import Candidate
from internvl_ds.tools.tune.command import opt_words
from internvl_ds.tools.tune.final_rounds import Standing
from internvl_ds.tools.tune.plot import plot_trials
from internvl_ds.tools.tune.records import FINAL, Row

TUNED_FILE = 'ds_config.tuned.json'


@dataclass(frozen=True)
class Result:
    """The result of tuning."""

    winner: Row  # the row, of before the finals, of the configuration to take
    ds_config: Mapping[str, Any]  # of the winner, as a file's content
    words: Sequence[str]  # arguments of the training program that take it
    standings: Sequence[Standing]  # the finalists, best first
    reference: str  # key of the finalist that the others' ratios are against
    names: Mapping[str, str]  # key -> name of each configuration
    shipped: Sequence[str]  # keys of the shipped configurations
    rows: Sequence[Row]  # of all trials


def make_result(
    rows: Sequence[Row],
    order: Sequence[Standing],
    reference: str,
    shipped: Mapping[str, str],
    candidate: Candidate,
    output: Path,
    user_opts: Sequence[str],
    opts: Mapping[str, Any],
) -> Result:
    """Puts a result together.

    Args:
        rows, order, reference: as in `Result`; ``order`` are its standings.
        shipped: key -> name of the ds_configs that ship.
        candidate: the best one's configuration.
        output: where ds_config.tuned.json will be, as it is to be shown.
        user_opts, opts: the user's KEY VALUE words, and what the candidate needs beyond them.
    """
    measured = {row.key: row for row in rows if row.kind != FINAL}
    names = {key: row.name for key, row in measured.items()}
    for key, name in shipped.items():
        if names.get(key, name) != name:  # the given configuration is a shipped one
            names[key] = f'{name}, {names[key]}'
    words = ['--deepspeed_config', str(output / TUNED_FILE)]
    if user_opts or opts:
        words += ['--opts', *user_opts, *opt_words(opts)]
    winner, ships = measured[order[0].key], list(shipped)
    return Result(winner, candidate.ds_config, words, order, reference, names, ships, list(rows))


def write_result(result: Result, output: Path) -> None:
    """Writes the files of the result into ``output``, each in one step."""
    write_text(output / TUNED_FILE, json.dumps(result.ds_config, indent=2) + '\n')
    write_text(output / 'result.json', json.dumps(as_json(result), indent=2) + '\n')
    plot_trials(result.rows, result.names, result.shipped, result.winner.key, output / 'tuned.png')


def as_json(result: Result) -> dict[str, Any]:
    """The result as JSON values; the keys stay."""
    winner = result.winner
    finals = [
        {'name': result.names[s.key], 'images_per_s': s.speed, 'ratio': s.median,
         'ratios': list(s.ratios)}
        for s in result.standings
    ]  # fmt: skip
    return {
        'winner': result.names[winner.key],
        'labels': winner.labels,
        'ds_config': result.ds_config,
        'opts': winner.opts,
        'words': list(result.words),
        'reference': result.names[result.reference],
        'finals': finals,
        'trials': dict(Counter(row.status for row in result.rows)),
        'seconds': sum(row.seconds for row in result.rows),
    }


def table_rows(result: Result) -> list[tuple[str, ...]]:
    """The finalists as cells: name, images per second, ratio and its range, memory in GB."""
    measured = {row.key: row for row in result.rows if row.kind != FINAL}
    cells: list[tuple[str, ...]] = []
    for standing in result.standings:
        ratios = standing.ratios or (0.0,)
        memory = f'{measured[standing.key].bench["peak_bytes"] / 1e9:.2f}'
        ratio = f'{standing.median:.2f}', f'{min(ratios):.2f}-{max(ratios):.2f}'
        cells.append((result.names[standing.key], f'{standing.speed:.1f}', *ratio, memory))
    return cells
