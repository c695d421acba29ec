"""The arguments of ``internvl-ds evaluate`` and of its ranks."""

from __future__ import annotations

import argparse
from pathlib import Path

from internvl_ds.tools.evaluate.columns import COLUMNS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command and its ranks take alike."""
    add = parser.add_argument
    add('--cfg', required=True, metavar='YAML', help='as for the training program')
    add('--resume', metavar='PATH', help='the checkpoint; or MODEL.PRETRAINED of the YAML is taken')
    add('--data', metavar='ROOT', help="a folder laid out as the original's data/")
    add(
        '--variants', nargs='+', default=[], metavar='DATASET=PATH',
        help=f'data sets elsewhere: {", ".join(COLUMNS)}',
    )  # fmt: skip
    add('--name', help="of the model in the table (default: the YAML's file name)")
    add('--batch-size', type=int, metavar='N', help='images per rank and micro-batch')
    add('--amp-opt-level', choices=('O0', 'O1', 'O2'), help='O0 fp32, O1 autocast, O2 half')
    add('--opts', nargs='+', default=[], metavar='KEY VALUE', help='as for the training program')
    add(
        '--deepspeed_config', '--deepspeed-config', metavar='FILE',
        help='of the stage that the model is evaluated at (default: none)',
    )  # fmt: skip
    add(
        '--output', type=Path, default=Path('evaluate'), metavar='DIR',
        help='for logs and result.json; default: ./evaluate',
    )  # fmt: skip
