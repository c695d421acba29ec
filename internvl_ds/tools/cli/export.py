"""Write a tag as one file: the original's .pth, or weights as .safetensors."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from internvl_ds.errors import CheckpointError
from internvl_ds.files.reading import interpreting
from internvl_ds.tools.cli.tags import add_pretrained, choose
from internvl_ds.tools.text import human_size, json_text, say

if TYPE_CHECKING:
    import torch

_LARGEST_GIB = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what ``ckpt export`` takes."""
    add = parser.add_argument
    add('path', type=Path, metavar='TAG', help='the path of a tag, or an OUTPUT')
    text = 'OUT.pth: all that the original saves; OUT.safetensors: weights only'
    add('target', type=Path, metavar='OUT', help=text)
    add('--ema', action='store_true', help='the averaged weights (.safetensors)')
    add_writing(parser)
    add_pretrained(parser)


def add_writing(parser: argparse.ArgumentParser) -> None:
    """Adds how weights are written."""
    add = parser.add_argument
    text = 'of the weights in .safetensors'
    add('--dtype', choices=('fp32', 'bf16'), default='fp32', help=text)
    text = 'above this size .safetensors is several files with an index (default: %(default)s)'
    add('--max-shard-gib', type=float, default=_LARGEST_GIB, metavar='GIB', help=text)
    add('--json', action='store_true', help='print one JSON object')


def run(args: argparse.Namespace) -> int:
    """Verifies the tag, writes the file or files, and says which."""
    from internvl_ds.checkpoint.formats.export import write_original, write_safetensors

    tag = choose(args.path, None)[0][0]
    target: Path = args.target
    require_target(target, args.dtype, args.ema)
    verified = require_undamaged(tag)
    paths = [target]
    with interpreting(tag, CheckpointError):
        if target.suffix == '.pth':
            write_original(tag, target)
        else:
            largest = int(args.max_shard_gib * 2**30)
            dtype = dtype_of(args.dtype)
            paths = write_safetensors(tag, target, dtype, ema=args.ema, largest=largest)
    if args.json:
        files = [{'path': str(path), 'size': path.stat().st_size} for path in paths]
        say(json_text({'tag': str(tag), 'verified': verified, 'files': files}))
        return 0
    if not verified:
        say(f'{tag} has no manifest: it could not be verified')
    say_files(paths)
    return 0


def require_target(target: Path, dtype: str, ema: bool = False) -> None:
    """Raises CheckpointError for a name that says no format, and options that are of another."""
    if target.suffix not in ('.pth', '.safetensors'):
        raise CheckpointError(f'{target}: the name must end in .pth or .safetensors')
    if not target.parent.is_dir():
        raise CheckpointError(f'{target.parent}: no such directory')
    if target.suffix == '.pth' and (ema or dtype != 'fp32'):
        raise CheckpointError(
            f'{target}: --ema and --dtype are for .safetensors; a .pth is in fp32, and that of '
            'export holds both averages and weights'
        )


def require_undamaged(tag: Path) -> bool:
    """Whether a tag's checksums could be compared; CheckpointError where they are wrong."""
    from internvl_ds.checkpoint.tag.verify import damage_of_tag

    damage = damage_of_tag(tag)
    if damage:
        raise CheckpointError('; '.join(damage[:3]))
    return damage is not None


def dtype_of(word: str) -> torch.dtype:
    """The dtype that --dtype names."""
    import torch

    return torch.float32 if word == 'fp32' else torch.bfloat16


def say_files(paths: Sequence[Path]) -> None:
    """Prints each file and its size."""
    for path in paths:
        say(f'{path}  {human_size(path.stat().st_size)}')
