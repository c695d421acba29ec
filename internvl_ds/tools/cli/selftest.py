"""Try on this machine, under this launcher, that training, saves and failures go right.

Every rank runs it, as the training program: ``deepspeed --module internvl_ds.tools.selftest``,
``mpirun -n 4 internvl-ds selftest``, torchrun, srun; alone it tries one rank. Each line has a
verdict: ``ok``; ``slow``; ``wrong``, with the difference and what was allowed; or ``absent`` for
what this machine has not. The exit status is 0 where none is slow or wrong, else 1.

``--json`` prints one object: ``ranks``, ``device``, and ``rows``, a list of objects with ``name``,
``verdict``, ``found``, ``figures`` and ``seconds``.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path

from internvl_ds.tools.text import json_text, say

_NOT_OK = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --output, --quick and --json."""
    text = 'a directory that all ranks see (default: output); what is written there is removed'
    parser.add_argument('--output', type=Path, default=Path('output'), metavar='DIR', help=text)
    parser.add_argument('--quick', action='store_true', help='stages 1 and 3, fp32 and bfloat16')
    # Of the deepspeed launcher.
    parser.add_argument('--local_rank', '--local-rank', type=int, help=argparse.SUPPRESS)
    parser.add_argument('--json', action='store_true', help='print one JSON object')


def run(args: argparse.Namespace) -> int:
    """Runs the trials; rank 0 prints the table. Returns the exit status."""
    from deepspeed.accelerator import get_accelerator

    from internvl_ds.dist.process_group import leave
    from internvl_ds.dist.rendezvous import rank, world_size
    from internvl_ds.tools.selftest.program import selftest
    from internvl_ds.tools.selftest.row import SLOW, WRONG, screen, tree

    warnings.simplefilter('ignore', FutureWarning)  # torch's, of names that DeepSpeed calls
    logging.getLogger('DeepSpeed').setLevel(logging.ERROR)
    rows = selftest(args.output, args.quick, args.local_rank)
    status = _NOT_OK if any(row.verdict in (SLOW, WRONG) for row in rows) else 0
    if rank() == 0:
        device = get_accelerator().device_name()
        say(json_text(tree(rows, world_size(), device)) if args.json else screen(rows))
    leave(status)
