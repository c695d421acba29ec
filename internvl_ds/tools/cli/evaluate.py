"""Evaluate one checkpoint on ImageNet-1K and its variants, through your launcher, as one table.

    internvl-ds evaluate --cfg YAML --resume PATH --data data -- torchrun --nproc-per-node 8

ROOT of --data is laid out as the original's README says: imagenet-1k, imagenetv2, imagenet-a,
imagenet-r, imagenet-sketch. The model is built and loaded once. Without a launcher one process
evaluates. With --json one object, as internvl_ds/tools/evaluate/program.py says.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from internvl_ds.errors import InternvlDsError
from internvl_ds.tools.evaluate.arguments import add_arguments as add_common
from internvl_ds.tools.evaluate.columns import RESULT, as_table, choose_paths
from internvl_ds.tools.text import json_text, say

_PROGRAM = 'internvl_ds.tools.evaluate'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what ``evaluate`` takes."""
    add_common(parser)
    form = parser.add_mutually_exclusive_group()
    form.add_argument('--json', action='store_true', help='print one JSON object')
    form.add_argument('--markdown', action='store_true', help='print the table as Markdown')
    parser.add_argument(
        'launcher', nargs='*', metavar='-- LAUNCHER ...', help='such as: deepspeed --num_gpus 8'
    )


def run(args: argparse.Namespace) -> int:
    """Starts the ranks, waits for them, and prints what rank 0 wrote."""
    from internvl_ds.config.tree import get_config
    from internvl_ds.dist.network import free_port
    from internvl_ds.files.reading import read_json
    from internvl_ds.tools.tune.command import complete

    # What is wrong here is said once, and not by every rank.
    choose_paths(args.data, args.variants)
    get_config(argparse.Namespace(cfg=args.cfg, opts=args.opts))
    launcher, _ = complete(args.launcher or [sys.executable], free_port(), _PROGRAM)
    path = args.output / RESULT
    path.unlink(missing_ok=True)
    # What the ranks print goes where messages go: stdout is for the answer alone.
    ranks = subprocess.run([*launcher, *_words(args)], stdin=subprocess.DEVNULL, stdout=2)
    if ranks.returncode:
        raise InternvlDsError(
            f'the ranks ended with status {ranks.returncode}; the reason stands above'
        )
    try:
        result = read_json(path)
    except (OSError, ValueError) as error:
        raise InternvlDsError(
            f'{path}: cannot be read: {error}. If rank 0 ran on another host, its table stands '
            'above; set --output to a folder that both hosts see'
        ) from error
    say(json_text(result) if args.json else as_table(result, markdown=args.markdown))
    return 0


def _words(args: argparse.Namespace) -> list[str]:
    """The arguments of a rank."""
    words = ['--cfg', args.cfg, '--output', str(args.output)]
    for name in ('resume', 'data', 'name', 'batch_size', 'amp_opt_level', 'deepspeed_config'):
        if (value := getattr(args, name)) is not None:
            words += [f'--{name.replace("_", "-")}', str(value)]
    for name in ('variants', 'opts'):
        if getattr(args, name):
            words += [f'--{name}', *getattr(args, name)]
    return words
