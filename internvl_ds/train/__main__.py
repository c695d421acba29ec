"""Entry point of the training program: parse, join the other ranks, run, leave in order."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from internvl_ds.dist.launchers import detect
from internvl_ds.dist.signals import end_at_interrupt
from internvl_ds.errors import ConfigError, Preempted, RankError

# Seconds within which ranks meet for one of them to tell what is wrong with the configuration.
_JOIN_LIMIT = 20


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line. A flag that is not given is None, so that the YAML's value holds."""
    parser = argparse.ArgumentParser(
        prog='internvl_ds.train',
        description='Train or evaluate an image classifier with DeepSpeed.',
        allow_abbrev=False,
    )
    add = parser.add_argument
    add('--cfg', required=True, metavar='FILE', help='YAML file, or the name of one that ships')
    add('--opts', nargs='+', metavar='KEY VALUE', help='settings that win over the YAML file')
    add('--batch-size', type=int, help='images per rank and micro-batch')
    add('--dataset', help="'imagenet' (any image folder), 'tar', 'csv' ...: see DATA.DATASET")
    add('--data-path', metavar='DIR', help='holds train/<class>/ and val/<class>/')
    add('--zip', **_switch('read train.zip and val.zip'))
    add('--cache-mode', choices=('no', 'full', 'part'), help='of zipped data')
    add('--pretrained', metavar='FILE', help='weights to start from')
    add('--resume', metavar='PATH', help='checkpoint to go on from')
    add('--accumulation-steps', type=int, help='micro-batches per update')
    add('--use-checkpoint', **_switch('recompute activations to save memory'))
    add('--amp-opt-level', choices=('O0', 'O1', 'O2'), help='O0 fp32, O1 autocast, O2 half')
    add('--output', metavar='DIR', help='results go to DIR/<YAML stem>[/<tag>]')
    add('--tag', help='name of this experiment')
    add('--eval', **_switch('evaluate only'))
    add('--throughput', **_switch('time forward passes only'))
    add('--save-ckpt-num', type=int, help='how many epoch checkpoints to keep')
    add('--use-zero', **_switch('ZeRO stage 1, where the ds_config states none'))
    add('--local-rank', '--local_rank', type=int, help='of a launcher that sets no LOCAL_RANK')
    launchers = ('pytorch', 'slurm')
    add('--launcher', choices=launchers, help='found out; slurm: take rank and size from srun')
    add('--deepspeed', **_switch('accepted; DeepSpeed is always used'))
    add('--deepspeed_config', '--deepspeed-config', metavar='FILE', help='DeepSpeed JSON')
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; an exception on this rank ends it with a non-zero exit code.

    Returns:
        The exit status: 0, or TRAIN.PREEMPT_EXIT_CODE where a signal had it save and stop.
    """
    args = parse_args(argv)
    # Not above, for these take long: torch and DeepSpeed seconds, in which Ctrl-C is to end this in
    # one line, and for which nobody is to wait who has mistyped a setting.
    from internvl_ds.config.counts import require_counts
    from internvl_ds.config.ds.load import load_ds_config
    from internvl_ds.config.tree import get_config
    from internvl_ds.train.reporting.start import StartClock

    start = StartClock()
    try:
        config = get_config(args)
        require_counts(config)
        ds_config = load_ds_config(args.deepspeed_config)
    except ConfigError:
        _join_to_fail(args)
        raise
    from internvl_ds.dist.process_group import init_distributed, shutdown
    from internvl_ds.dist.rendezvous import rank
    from internvl_ds.files import write_text
    from internvl_ds.train.loop import run

    start.passed('imports')
    init_distributed(config, launcher=args.launcher, local_rank=args.local_rank)
    start.passed('process group')
    status, result = 0, 'finished'
    try:
        run(config, ds_config, start)
    except Preempted:
        status = config.TRAIN.PREEMPT_EXIT_CODE
        result = f'preempted {status}'
    first = rank() == 0
    # Not after an exception: leaving the process group may wait for ranks that are still in a
    # collective, where an exit at once lets the launcher end them.
    shutdown()
    if first and os.environ.get('INTERNVL_DS_RESULT'):
        # The launch scripts tell a finished job by this, whatever their launcher returns.
        write_text(Path(os.environ['INTERNVL_DS_RESULT']), f'{result}\n')
    return status


def _join_to_fail(args: argparse.Namespace) -> None:
    """Meets the other ranks, which have the same error: only one of them prints it.

    Where there are none, the error is not to wait for torch either.
    """
    from internvl_ds.config.tree import default_config
    from internvl_ds.dist.excepthook import speak_on_exceptions

    speak_on_exceptions(None)
    launch = detect(os.environ, args.launcher, args.local_rank)
    if launch.world_size == 1:
        speak_on_exceptions(launch.rank)
        return
    from internvl_ds.dist.process_group import init_distributed

    config = default_config()
    config.COMM.INIT_TIMEOUT = _JOIN_LIMIT
    with contextlib.suppress(RankError):
        init_distributed(config, launcher=args.launcher, local_rank=args.local_rank)


def _switch(text: str) -> dict[str, Any]:
    return {'action': 'store_true', 'default': None, 'help': text}


if __name__ == '__main__':
    end_at_interrupt()
    status = main()
    from internvl_ds.dist.process_group import leave

    leave(status)
