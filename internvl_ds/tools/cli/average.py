"""Write the average of the weights of several checkpoints, of any kinds."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from internvl_ds.errors import CheckpointError, CheckpointMismatch, few
from internvl_ds.files.reading import interpreting
from internvl_ds.tools.cli.diff import checkpoint
from internvl_ds.tools.cli.export import (
    add_writing,
    dtype_of,
    require_target,
    require_undamaged,
    say_files,
)
from internvl_ds.tools.cli.tags import add_pretrained
from internvl_ds.tools.text import json_text, say

if TYPE_CHECKING:
    from internvl_ds.zero.lazy_tensor import Flat


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what ``ckpt average`` takes."""
    text = 'a tag, an OUTPUT, a .pth, a .safetensors or its .index.json; two or more'
    parser.add_argument('sources', type=Path, nargs='+', metavar='CHECKPOINT', help=text)
    text = 'OUT.pth or OUT.safetensors: weights only'
    parser.add_argument('path', type=Path, metavar='OUT', help=text)
    add_writing(parser)
    add_pretrained(parser)


def run(args: argparse.Namespace) -> int:
    """Verifies the tags, writes the average, and says what was taken from the last one."""
    from internvl_ds.checkpoint.formats.compare import weights_of
    from internvl_ds.checkpoint.formats.export import write_weights

    target: Path = args.path
    require_target(target, args.dtype)
    if len(args.sources) < 2:
        raise CheckpointError(f'{target}: an average takes two checkpoints or more, and then OUT')
    if any(path.exists() and target.exists() and path.samefile(target) for path in args.sources):
        raise CheckpointError(
            f'{target}: is a checkpoint of the average, and OUT, which comes last'
        )
    paths = [checkpoint(path) for path in args.sources]
    for path in paths:
        if path.is_dir():
            require_undamaged(path)
    sources = [weights_of(path) for path in paths]
    with interpreting(few(list(map(str, paths))), CheckpointError):
        means, taken = _means(paths, sources)
        largest = int(args.max_shard_gib * 2**30)
        written = write_weights(means, _classes(paths), target, dtype_of(args.dtype), largest)
    if args.json:
        files = [{'path': str(path), 'size': path.stat().st_size} for path in written]
        tree = {'sources': list(map(str, paths)), 'tensors': len(means), 'taken': taken}
        say(json_text({**tree, 'files': files}))
        return 0
    if taken:
        say(f'no floating-point numbers, and not equal: {few(taken)} as in {paths[-1]}')
    say_files(written)
    return 0


def _means(
    paths: Sequence[Path], sources: Sequence[Mapping[str, Flat]]
) -> tuple[dict[str, Flat], list[str]]:
    """The average by name, and the names of other tensors that are not equal in all.

    Raises:
        CheckpointMismatch: for names that only some have, and for unequal shapes.
    """
    from internvl_ds.zero.lazy_tensor import Mean

    first = sources[0]
    if not first:
        raise CheckpointMismatch(f'{paths[0]}: has no weights')
    for path, other in zip(paths[1:], sources[1:], strict=True):
        if odd := sorted(first.keys() ^ other.keys()):
            raise CheckpointMismatch(f'{paths[0]} and {path}: only one of them has {few(odd)}')
        if odd := [name for name in first if first[name].shape != other[name].shape]:
            shapes = [tuple(each[odd[0]].shape) for each in (first, other)]
            raise CheckpointMismatch(
                f'{paths[0]} and {path}: {few(odd)} have other shapes: {odd[0]} {shapes[0]} and '
                f'{shapes[1]}'
            )
    means: dict[str, Flat] = {}
    taken = []
    for name in first:
        flats = [source[name] for source in sources]
        if all(flat.dtype.is_floating_point for flat in flats):
            means[name] = Mean(flats)
            continue
        means[name] = flats[-1]
        whole = flats[-1].whole()
        if not all(whole.equal(flat.whole(whole.dtype)) for flat in flats[:-1]):
            taken.append(name)
    return means, taken


def _classes(paths: Sequence[Path]) -> list[str] | None:
    """The class names, in order, that are kept with the weights; those without say nothing.

    Raises:
        CheckpointMismatch: for two that are not of the same classes.
    """
    from internvl_ds.checkpoint.sources.classes import saved_classes

    found = {path: classes for path in paths if (classes := saved_classes(str(path)))}
    for path, classes in found.items():
        if classes != next(iter(found.values())):
            raise CheckpointMismatch(f'{next(iter(found))} and {path}: trained on other classes')
    return next(iter(found.values()), None)
