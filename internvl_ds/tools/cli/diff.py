"""Compare two checkpoints of any kind, tensor by tensor."""

from __future__ import annotations

import argparse
from pathlib import Path

from internvl_ds.errors import CheckpointError, CheckpointNotFound
from internvl_ds.files.reading import interpreting
from internvl_ds.tools.cli.tags import add_pretrained, choose
from internvl_ds.tools.text import json_text, say, table

SAME, DIFFERENT = 0, 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what ``ckpt diff`` takes."""
    text = 'a tag, an OUTPUT, a .pth, a .safetensors or its .index.json'
    parser.add_argument('path', type=Path, metavar='A', help=text)
    parser.add_argument('other', type=Path, metavar='B', help=text)
    parser.add_argument('--json', action='store_true', help='print one JSON object')
    add_pretrained(parser)


def run(args: argparse.Namespace) -> int:
    """Says what differs; the exit status is 1 when anything does."""
    from internvl_ds.checkpoint.formats.compare import contents_of, differences

    paths = [checkpoint(args.path), checkpoint(args.other)]
    one, other = map(contents_of, paths)
    with interpreting(f'{paths[0]} or {paths[1]}', CheckpointError):
        rows = list(differences(one, other))
    counts = [len(one.tensors), len(other.tensors)]
    if args.json:
        trees = [{'name': d.name, 'what': d.what, 'largest': d.largest} for d in rows]
        say(json_text({'a': str(paths[0]), 'b': str(paths[1]), 'tensors': counts, 'found': trees}))
    elif rows:
        say(table(('what differs (A, B)', 'how'), [(d.name, d.what) for d in rows]))
        say(f'{len(rows)} differ; A has {counts[0]} tensors, B {counts[1]}')
    else:
        say(f'the same: {counts[0]} tensors')
    return DIFFERENT if rows else SAME


def checkpoint(path: Path) -> Path:
    """The file, or the tag that the path of a tag or an OUTPUT means."""
    if path.is_file():
        return path
    if not path.exists():
        raise CheckpointNotFound(f'{path}: no such checkpoint')
    return choose(path, None)[0][0]
