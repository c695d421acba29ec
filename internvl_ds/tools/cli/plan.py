"""Tell what will fit: memory, largest micro-batch and checkpoint size at each ZeRO stage.

    internvl-ds plan --cfg YAML --gpus 8 --gpu-mem 80GB [--cpu-mem 1TB] [--gpus-per-host 8]
        [--disk-rate 2GB/s] [--host-mtbf HOURS] [--deepspeed_config FILE]
        [--opts KEY VALUE ...] [--json]

Nothing of the model is allocated: it takes seconds, also for 5.9 G parameters on a laptop.
Of a GPU's memory 0.5 GB are left to CUDA, 1 GB to NCCL where there are other ranks, and 5 % of the
rest to fragmentation; of a host's 10 % to the system.

Exit statuses: 0; 1 when nothing fits; 2 wrong usage, or a model that cannot be planned.

With --json one object: ``model``: ``parameters``, ``trained``, ``moments`` (fp32 values of
optimizer state for each trained one); ``precision``; ``micro_batch`` and ``accumulation`` as
configured; ``machine``: ``gpus``, ``gpu_bytes``, ``gpus_per_host``, ``host_bytes`` (null: not
looked at), ``disk_rate``, ``usable`` (bytes of a GPU planned with); ``options``, each: ``stage``,
``offload`` ('none', 'optimizer', 'all'), ``recompute``, ``device`` and ``host`` (bytes of each part
on a GPU, and of one rank in its host's memory, for the configured micro-batch), ``device_bytes``
(the most), ``update_bytes`` (what the optimizer's update takes when the activations are gone),
``host_bytes`` (of all ranks of a host, while the model is built or later, with the copy that
CHECKPOINT.ASYNC saves from), ``largest_micro_batch`` (0: none fits), ``fits_host``,
``micro_batch`` and ``accumulation`` (to train with, at the configured batch),
``checkpoint_bytes``, ``save_seconds``; ``choice``, the index of the option to take, or null;
``advice``; ``failures``, null without --host-mtbf: ``hosts``, ``between`` (seconds from a failure
of any host to the next), ``interval`` (seconds between saves), ``setting`` (that has it so, or ''),
``saving`` and ``lost`` (shares of the time for saves, and of work that is done again).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from internvl_ds.tools.cli.quantities import parse_rate, parse_size, positive, whole
from internvl_ds.tools.text import human_size, json_text, say, table

if TYPE_CHECKING:
    from internvl_ds.tools.plan.options import Option

NOTHING_FITS = 1

_TITLES = (
    'stage', 'offload', 'recompute', 'weights', 'gradients', 'optimizer', 'buffers', 'EMA',
    'activations', 'GPU', 'images', 'host', 'checkpoint', 'save',
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags: the training program's, and what the machine is."""
    parser.epilog = 'exit status: 0; 1 when nothing fits; 2 wrong usage or an error'
    add = parser.add_argument
    add('--cfg', required=True, metavar='FILE', help='YAML file, or the name of one that ships')
    add('--gpus', required=True, type=whole(1), metavar='N', help='ranks, over all hosts')
    add('--gpu-mem', required=True, type=parse_size, metavar='SIZE', help='80GB, or 80GiB')
    add('--cpu-mem', type=parse_size, metavar='SIZE', help='memory of a host; not limited else')
    add('--gpus-per-host', type=whole(1), default=8, metavar='N', help='default: 8')
    text = 'what all ranks together write; default: 1GB/s'
    add('--disk-rate', type=parse_rate, default=parse_rate('1GB/s'), metavar='RATE', help=text)
    text = 'hours between failures of a host, on average: adds what failures cost'
    add('--host-mtbf', type=positive, metavar='HOURS', help=text)
    text = 'DeepSpeed JSON whose other settings are kept: buckets, precision, ...'
    add('--deepspeed_config', '--deepspeed-config', default='', metavar='FILE', help=text)
    add('--opts', nargs='+', metavar='KEY VALUE', help='settings that win over the YAML file')
    add('--json', action='store_true', help='one JSON object instead of the table')


def run(args: argparse.Namespace) -> int:
    """Plans every option, and says which to take."""
    from internvl_ds.config.counts import require_counts
    from internvl_ds.config.ds import resolve as ds
    from internvl_ds.config.ds.load import load_ds_config
    from internvl_ds.config.tree import get_config
    from internvl_ds.tools.plan.advice import advice
    from internvl_ds.tools.plan.failures import failures
    from internvl_ds.tools.plan.memory_planner import MemoryPlanner
    from internvl_ds.tools.plan.options import Machine, choose, options

    config = get_config(argparse.Namespace(cfg=args.cfg, opts=args.opts))
    require_counts(config)
    base = load_ds_config(args.deepspeed_config or None)
    machine = Machine(
        gpus=args.gpus,
        gpu_bytes=args.gpu_mem,
        gpus_per_host=min(args.gpus, args.gpus_per_host),
        host_bytes=args.cpu_mem,
        disk_rate=args.disk_rate,
    )
    resolved = ds.resolve_or_raise(base, config, machine.gpus)
    planner = MemoryPlanner(config)
    ways = options(planner, config, base, machine)
    choice, words = choose(ways), advice(ways, config, base, args.deepspeed_config, machine)
    expected = None
    if choice is not None and args.host_mtbf is not None:
        hosts = math.ceil(machine.gpus / machine.gpus_per_host)
        expected = failures(config, choice.save_seconds, hosts, args.host_mtbf)
    if args.json:
        tree = {
            'model': {k: getattr(planner.sizes, k) for k in ('parameters', 'trained', 'moments')},
            'precision': ds.precision_of(resolved),
            'micro_batch': resolved['train_micro_batch_size_per_gpu'],
            'accumulation': resolved['gradient_accumulation_steps'],
            'machine': {**asdict(machine), 'usable': machine.usable},
            'options': list(map(_tree, ways)),
            'choice': ways.index(choice) if choice else None,
            'advice': words,
            'failures': None if expected is None else asdict(expected),
        }
        say(json_text(tree))
    else:
        millions = f'{planner.sizes.parameters / 1e6:.1f} M parameters'
        say(
            f'{config.MODEL.FACTORY or config.MODEL.NAME}: {millions}, '
            f'{planner.sizes.trained / 1e6:.1f} M of them trained, in {ds.precision_of(resolved)}; '
            f'bytes on each of {machine.gpus} GPUs at {resolved["train_micro_batch_size_per_gpu"]} '
            'images a micro-batch, at the moment when a GPU needs most\n'
        )
        say(f'{_table(ways, choice)}\n\n{words}')
        if expected is not None:
            say(f'\n{expected.words}')
    return 0 if choice else NOTHING_FITS


def _table(ways: Sequence[Option], choice: Option | None) -> str:
    rows = []
    for option in ways:
        sizes = *asdict(option.need.parts).values(), option.need.device
        rows.append(
            [
                f'{option.stage}{" <-" if option is choice else ""}',
                '' if option.offload == 'none' else option.offload,
                'yes' if option.recompute else '',
                *map(human_size, sizes),
                str(option.largest_micro_batch or '-'),
                human_size(option.host_bytes) + ('' if option.fits_host else ' !'),
                human_size(option.checkpoint_bytes),
                f'{option.save_seconds:.3g} s',
            ]
        )
    return table(_TITLES, rows, right=_TITLES[3:])


def _tree(option: Option) -> dict[str, Any]:
    tree = asdict(option)
    need = tree.pop('need')
    tree |= {'device': need['parts'], 'device_bytes': need['device']}
    return tree | {'host': need['host_parts'], 'update_bytes': need['update']}
