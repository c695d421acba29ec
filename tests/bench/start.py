"""Measures a start: from the beginning of the processes to the first update after a resume.

    python -m tests.bench.start --params 100 --stages 1 3 --rounds 9

Of the training program, and of `tests.bench.plain_start`: torch's DDP with torch.load, and
deepspeed.initialize with engine.load_checkpoint, without a check or a log. Each starts as new
processes, without a launcher, with the same model and images, and goes on from what it saved.
Seconds last until rank 0 says that its first update is done. What the program says of its own parts
is printed too. Files are in the page cache.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from internvl_ds.dist.network import free_port
from tests.bench.figures import Pair, ratios_report, ratios_table, seconds_report, seconds_table
from tests.bench.harness import ROUNDS, Contender, measure
from tests.harness.ranks import ROOT, base_env, remove_shm_buffers
from tests.harness.training import small_config, write_folder

OURS, DDP, DEEPSPEED = 'training program', 'plain DDP', 'plain DeepSpeed'
PAIRS = (Pair(OURS, DEEPSPEED, 1.1), Pair(OURS, DDP))
SAYS = 'the first update came '
_DEPTH, _HEADS, _PIXELS, _PATCH, _CLASSES = 14, 8, 32, 16, 3
_TIMEOUT = 600.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures each stage, prints tables, and writes JSON where asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    parser.add_argument('--params', type=float, default=100, help='in millions')
    parser.add_argument('--stages', type=int, nargs='+', default=[1, 3], help='of ZeRO')
    parser.add_argument('--ranks', type=int, default=2)
    parser.add_argument('--workers', type=int, default=1, help='of the loader, on each rank')
    parser.add_argument('--rounds', type=int, default=ROUNDS, help='counted samples of each')
    parser.add_argument('--json', type=Path, help='where all samples go')
    parser.add_argument('--folder', type=Path, default=Path('/var/tmp'), help='where files go')
    options = parser.parse_args(arguments)
    report = []
    for stage in options.stages:
        with tempfile.TemporaryDirectory(prefix='bench-', dir=options.folder) as folder:
            entry = measure_stage(
                Path(folder), options.params, stage, options.ranks, options.workers, options.rounds
            )
        report.append(entry)
        print(tables(entry), flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + '\n')


def tables(entry: dict[str, Any]) -> str:
    """One stage's report as markdown, with the parts of the program's last start."""
    head = f'### {entry["millions"]:g}M parameters, {entry["ranks"]} ranks, stage {entry["stage"]}'
    texts = [head, seconds_table(entry['seconds']), ratios_table(entry['ratios']), entry['parts']]
    return '\n\n'.join(texts)


def measure_stage(
    root: Path, millions: float, stage: int, ranks: int, workers: int, rounds: int
) -> dict[str, Any]:
    """Has each save once, and then starts them in turns."""
    width = _HEADS * max(1, round(math.sqrt(millions * 1e6 / (12 * _DEPTH)) / _HEADS))
    shape = {
        'img_size': _PIXELS, 'patch_size': _PATCH, 'embed_dim': width, 'depth': _DEPTH,
        'num_heads': _HEADS,
    }  # fmt: skip
    data = write_folder(root / 'images', _CLASSES, train=8 * ranks, val=_CLASSES, side=_PIXELS)
    ds_config = root / 'ds.json'
    ds_config.write_text(json.dumps({'zero_optimization': {'stage': stage}}))
    cfg = root / 'start.yaml'
    cfg.write_text(
        small_config(
            data, MODEL__KWARGS=shape, DATA__IMG_SIZE=_PIXELS, DATA__BATCH_SIZE=2,
            DATA__NUM_WORKERS=workers, TRAIN__EPOCHS=9, TRAIN__SAVE_STEPS=1, SAVE_CKPT_NUM=1,
            TRAIN__WARMUP_EPOCHS=0,
        ).dump()
    )  # fmt: skip
    ours = [
        *('-m', 'internvl_ds.train', '--cfg', str(cfg), '--output', str(root / 'output')),
        *('--deepspeed_config', str(ds_config)),
    ]
    plain = [
        *('-m', 'tests.bench.plain_start', '--data', str(data), '--shape', json.dumps(shape)),
        *('--workers', str(workers), '--stage', str(stage), '--folder'),
    ]
    commands = {
        OURS: [*ours, '--opts', 'BENCH.UPDATES', '2', 'BENCH.WARMUP', '0'],
        DDP: [*plain, str(root / 'ddp'), '--engine', 'ddp'],
        DEEPSPEED: [*plain, str(root / 'deepspeed'), '--engine', 'deepspeed'],
    }
    run([*ours, '--opts', 'TRAIN.EPOCHS', '1'], ranks)
    for name in (DDP, DEEPSPEED):
        run([*commands[name], '--save'], ranks)
    said: dict[str, str] = {}

    def starting(name: str) -> Callable[[], dict[str, float]]:
        def start() -> dict[str, float]:
            seconds, said[name] = run(commands[name], ranks)
            return {name: seconds}

        return start

    samples = measure({name: Contender(starting(name)) for name in commands}, rounds)
    samples = {name.partition(': ')[0]: values for name, values in samples.items()}
    return {
        'millions': millions, 'stage': stage, 'ranks': ranks,
        'seconds': seconds_report(samples), 'ratios': ratios_report(samples, PAIRS),
        'parts': said[OURS][said[OURS].index(SAYS) :],
    }  # fmt: skip


def run(command: list[str], ranks: int) -> tuple[float, str]:
    """Runs a command on ranks; returns the seconds until rank 0 said the words, and its line."""
    port = str(free_port())
    start, seconds, line = time.perf_counter(), math.inf, ''
    processes = []
    for rank in range(ranks):
        env = base_env(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR='127.0.0.1',
            MASTER_PORT=port,
        )  # fmt: skip
        processes.append(
            subprocess.Popen(
                [sys.executable, *command], env=env, cwd=ROOT, text=True,
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                stderr=subprocess.STDOUT,
            )
        )  # fmt: skip
    output = []
    try:
        assert processes[0].stdout is not None
        for text in processes[0].stdout:
            output.append(text)
            if SAYS in text:
                seconds, line = time.perf_counter() - start, text.strip()
        statuses = [process.wait(timeout=_TIMEOUT) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
        remove_shm_buffers(port)
    if any(statuses) or not line:
        raise AssertionError(f'{command}: exit {statuses}\n{"".join(output)}')
    return seconds, line


if __name__ == '__main__':
    main()
