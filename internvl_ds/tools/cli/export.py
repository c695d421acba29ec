"""Write a tag as one file: the original's .pth, or weights as .safetensors."""

from __future__ import annotations

import argparse
from pathlib import Path

from internvl_ds.errors import CheckpointError
from internvl_ds.files.reading import interpreting
from internvl_ds.tools.cli.tags import add_pretrained, choose
from internvl_ds.tools.text import human_size, json_text, say

_LARGEST_GIB = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what ``ckpt export`` takes."""
    add = parser.add_argument
    add('path', type=Path, metavar='TAG', help='the path of a tag, or an OUTPUT')
    text = 'OUT.pth: all that the original saves; OUT.safetensors: weights only'
    add('target', type=Path, metavar='OUT', help=text)
    text = 'of the weights in .safetensors'
    add('--dtype', choices=('fp32', 'bf16'), default='fp32', help=text)
    add('--ema', action='store_true', help='the averaged weights (.safetensors)')
    text = 'above this size .safetensors is several files with an index (default: %(default)s)'
    add('--max-shard-gib', type=float, default=_LARGEST_GIB, metavar='GIB', help=text)
    add('--json', action='store_true', help='print one JSON object')
    add_pretrained(parser)


def run(args: argparse.Namespace) -> int:
    """Verifies the tag, writes the file or files, and says which."""
    import torch

    from internvl_ds.checkpoint.formats.export import write_original, write_safetensors
    from internvl_ds.checkpoint.tag.verify import damage_of_tag

    tag = choose(args.path, None)[0][0]
    target: Path = args.target
    if target.suffix not in ('.pth', '.safetensors'):
        raise CheckpointError(f'{target}: the name must end in .pth or .safetensors')
    if not target.parent.is_dir():
        raise CheckpointError(f'{target.parent}: no such directory')
    if target.suffix == '.pth' and (args.ema or args.dtype != 'fp32'):
        raise CheckpointError(
            f'{target}: --ema and --dtype are for .safetensors; a .pth holds both averages and '
            'weights, in fp32'
        )
    damage = damage_of_tag(tag)
    if damage:
        raise CheckpointError('; '.join(damage[:3]))
    paths = [target]
    with interpreting(tag, CheckpointError):
        if target.suffix == '.pth':
            write_original(tag, target)
        else:
            dtype = torch.float32 if args.dtype == 'fp32' else torch.bfloat16
            largest = int(args.max_shard_gib * 2**30)
            paths = write_safetensors(tag, target, dtype, ema=args.ema, largest=largest)
    files = [{'path': str(path), 'size': path.stat().st_size} for path in paths]
    if args.json:
        say(json_text({'tag': str(tag), 'verified': damage is not None, 'files': files}))
        return 0
    if damage is None:
        say(f'{tag} has no manifest: it could not be verified')
    for path in paths:
        say(f'{path}  {human_size(path.stat().st_size)}')
    return 0
