"""Tuning the digits quickstart: is the result as fast as the best ds_config that ships?

    python -m tests.bench.tune --minutes 10 --rounds 5 --output /tmp/tuned

runs `internvl-ds tune` on two ranks for so long, and then measures its result and the fastest of
the ds_configs that ship again, in rounds, each a job of its own, in random order. What is compared
are the seconds of an update in one round.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

from internvl_ds.dist.network import free_port
from internvl_ds.tools.cli.digits import write_digits
from internvl_ds.tools.tune.command import complete, trial_words
from internvl_ds.tools.tune.records import BASE, OK, SHIPPED, Records
from internvl_ds.tools.tune.trial import run_trial
from tests.bench.figures import (
    Pair,
    ratios_report,
    ratios_table,
    seconds_report,
    seconds_table,
)

CFG = 'digits_quickstart'
LAUNCHER = ['deepspeed', '--num_gpus', '2']
RESULT = 'the result'
_UPDATES, _WARMUP = 50, 5
_CONTENDERS = 2  # how many of those that ship
_LIMIT = 300.0


def main() -> None:
    """Tunes, measures, and prints."""
    parser = argparse.ArgumentParser(prog='python -m tests.bench.tune', description=__doc__)
    parser.add_argument('--minutes', type=float, default=10, help='of tuning')
    parser.add_argument('--trials', type=int, default=60)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--output', type=Path, required=True, help='for all that is written')
    parser.add_argument('launcher', nargs='*', default=LAUNCHER, metavar='-- LAUNCHER')
    args = parser.parse_args()
    output = args.output.absolute()
    data = output / 'digits'
    write_digits(data)
    start = time.monotonic()
    subprocess.run(
        [
            sys.executable, '-m', 'internvl_ds.tools.cli', 'tune', '--cfg', CFG,
            '--data-path', str(data),
            '--output', str(output / 'tune'), '--budget', f'{args.minutes:g}',
            '--trials', str(args.trials), '--', *args.launcher,
        ],
        check=True,
    )  # fmt: skip
    print(f'tuning took {(time.monotonic() - start) / 60:.1f} minutes', flush=True)
    seconds = measure_again(output, data, args.rounds, args.launcher)
    print('\n' + seconds_table(seconds_report(seconds)))
    pairs = [Pair(RESULT, name, 1.0) for name in seconds if name != RESULT]
    print('\n' + ratios_table(ratios_report(seconds, pairs)))


def contenders(tuned: Path) -> dict[str, tuple[dict, dict]]:
    """Name -> (ds_config, settings) of the result, and of the fastest others that ship."""
    result = json.loads((tuned / 'result.json').read_text())
    rows = [row for row in Records(tuned).of(SHIPPED, BASE) if row.status == OK]
    rows.sort(key=lambda row: -row.speed)
    names = {row.key: 'zero0' if row.kind == BASE else row.name for row in rows}
    best = {names[row.key]: (row.ds_config, row.opts) for row in rows[:_CONTENDERS]}
    taken = (result['ds_config'], result['opts'])
    others = {name: each for name, each in best.items() if each != taken}
    for name in best.keys() - others.keys():
        print(f'{RESULT} is {name}, which ships')
    return {RESULT: taken, **others}


def measure_again(
    output: Path, data: Path, rounds: int, launcher: list[str]
) -> dict[str, list[float]]:
    """Name -> seconds of an update, in each round that all contenders came through."""
    samples: dict[str, list[float]] = defaultdict(list)
    candidates = contenders(output / 'tune')
    order = random.Random(0)
    for number in range(rounds):
        found = {}
        for name in order.sample(list(candidates), len(candidates)):
            ds_config, opts = candidates[name]
            folder = output / 'again' / f'{number} {name}'
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            (folder / 'ds_config.json').write_text(json.dumps(ds_config))
            bench = {'BENCH.UPDATES': _UPDATES, 'BENCH.WARMUP': _WARMUP}
            words, port = complete(launcher, free_port())
            words += trial_words(CFG, folder, str(data), (), {**opts, **bench})
            outcome = run_trial(words, folder, _LIMIT, port)
            print(f'round {number}: {name}: {outcome.status} {outcome.error}', flush=True)
            if outcome.status == OK:
                found[name] = outcome.bench['seconds_per_update']
        if len(found) == len(candidates):
            for name, lasted in found.items():
                samples[name].append(lasted)
    return dict(samples)


if __name__ == '__main__':
    main()
