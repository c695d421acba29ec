"""List, verify, show, prune, export, compare and average checkpoints.

    internvl-ds ckpt list OUTPUT [--verify]
    internvl-ds ckpt verify OUTPUT [TAG] [--all] [--pretrained FILE]   (or the path of a tag)
    internvl-ds ckpt show OUTPUT [TAG] [--config]     (or the path of a tag)
    internvl-ds ckpt prune OUTPUT --keep N [--keep-steps N] [--keep-best N] [--keep-every K]
        [--drop-later] [--dry-run]
    internvl-ds ckpt export TAG OUT.pth
    internvl-ds ckpt export TAG OUT.safetensors [--dtype bf16] [--ema] [--max-shard-gib GIB]
    internvl-ds ckpt diff A B      (tags, .pth, .safetensors or its index)
    internvl-ds ckpt average A B [C ...] OUT      (the same; OUT.pth or OUT.safetensors)

``diff`` returns 1 when something differs, the others as --help says. ``prune`` never removes what
``latest`` names or auto resume takes, nor a tag that is neither an epoch's nor a step's, nor,
without --drop-later, one of later training than the tag saved last, which a rewound run left.

With --json each prints one object. A key is always there; where nothing is known it is null.

list: ``output``; ``latest``, the tag that the file of that name names; ``resume``, the tag that
    auto resume would take, and ``warning``, what it would say to that; ``stagings`` and ``trash``,
    the names of saves under way or dead, and of tags half removed; ``tags``, newest save first,
    each with the keys of a tag.
verify: ``output``; ``warning``; ``tags``, each with the keys of a tag.
a tag: ``tag``, ``path``, ``size`` (bytes), ``epoch``, ``max_accuracy``, ``sequence``, ``saved_at``,
    ``zero_stage``, ``world_size``, ``precision``, ``global_steps``, ``versions``, ``step``;
    ``frozen``, where frozen parameters are that the tag shares with others (see
    CHECKPOINT.FROZEN): ``kept`` and ``output``; or an empty object; ``linked``, the earlier saves
    that wrote files of it, and their tags;
    ``verified``, one of 'sizes', 'checksums', 'no manifest', 'no source', 'damaged';
    ``problems``, a list of sentences.
show: the keys of a tag; ``format`` of the manifest; ``files``, each with ``name``, ``size`` and
    ``xxh3_128``; ``state``: ``epoch``, ``max_accuracy``, ``max_accuracy_ema``, ``ema_decay``, the
    names that ``lr_scheduler`` and ``scaler`` hold, and ``classes``, how many class names it keeps;
    with --config ``config``, YAML.
prune: ``output``; ``dry_run``; ``pruned``, each with ``tag`` and ``size``, what it frees by itself;
    ``size``, what they free together; ``kept`` and ``failed``, names of epoch and step tags.
export: ``tag``; ``verified``, whether its checksums could be compared; ``files``, each with
    ``path`` and ``size``.
diff: ``a`` and ``b``, paths; ``tensors``, how many each has; ``found``, each with ``name``,
    ``what`` and ``largest``, the largest absolute difference of an element.
average: ``sources``, paths; ``tensors``; ``taken``, names of tensors that are no floating-point
    numbers and differ, of which the last source's are written; ``files``, as of export.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from internvl_ds.checkpoint.tag import commit, discovery, retention
from internvl_ds.checkpoint.tag.manifest import STATE_FILE
from internvl_ds.checkpoint.tag.shared import counted_again, freed_by
from internvl_ds.checkpoint.tag.sweep import STAGING
from internvl_ds.checkpoint.tag.trash import TRASH
from internvl_ds.errors import CheckpointError, CheckpointNotFound, few, shown
from internvl_ds.tools.cli import average, diff, export
from internvl_ds.tools.cli.quantities import whole
from internvl_ds.tools.cli.tags import (
    Examined,
    add_pretrained,
    examine_all,
    examine_chosen,
    find_tags,
    tree_of,
)
from internvl_ds.tools.text import human_age, human_size, json_text, say, table

OK, DAMAGED, UNVERIFIED = 0, 1, 3
_FAILED = 2
_NO_SOURCE = 'no source'

_EPILOG = """exit status:
  0  all is well
  1  something is damaged
  2  wrong usage, or nothing there (prune: or something could not be removed)
  3  nothing is damaged, but something could not be verified: it has no manifest, or the weights
     that it omits are not where they were (see --pretrained)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the actions."""
    parser.epilog, parser.formatter_class = _EPILOG, argparse.RawDescriptionHelpFormatter
    actions = parser.add_subparsers(dest='action', metavar='ACTION', required=True)

    def add(name: str, act: Any, text: str, what: str) -> argparse.ArgumentParser:
        shape: dict[str, Any] = {'epilog': _EPILOG, 'formatter_class': parser.formatter_class}
        action = actions.add_parser(name, help=text, description=text, **shape)
        action.add_argument('path', type=Path, metavar='OUTPUT', help=what)
        action.add_argument('--json', action='store_true', help='print one JSON object')
        action.set_defaults(act=act)
        return action

    output, either = 'the output directory', 'the output directory, or the path of a tag'
    action = add('list', _list, 'one line per tag, newest save first', output)
    action.add_argument('--verify', action='store_true', help='read all files, compare checksums')
    action = add('verify', _verify, 'read every file and compare its checksum', either)
    which = action.add_mutually_exclusive_group()
    which.add_argument('tag', nargs='?', metavar='TAG', help='default: what auto resume takes')
    which.add_argument('--all', action='store_true', help='every tag')
    add_pretrained(action)
    action = add('show', _show, 'what a tag is, its files and its state', either)
    action.add_argument('tag', nargs='?', metavar='TAG', help='default: what auto resume takes')
    action.add_argument('--config', action='store_true', help='print the saved config (YAML) only')
    action = add('prune', _prune, 'remove tags that no option keeps nor auto resume takes', output)
    option = action.add_argument
    for flag, metavar, least, text in (
        ('--keep', 'N', 1, 'keep the N epoch tags saved last'),
        ('--keep-steps', 'N', 0, 'keep the N tags saved last inside an epoch too'),
        ('--keep-best', 'N', 0, 'keep the N tags with the highest accuracy too'),
        ('--keep-every', 'K', 0, 'keep the tags whose epoch is a multiple of K too'),
    ):
        option(flag, type=whole(least), metavar=metavar, default=0, required=bool(least), help=text)
    text = 'remove tags of later training than the one saved last, too (of a run that was rewound)'
    option('--drop-later', action='store_true', help=text)
    option('--dry-run', action='store_true', help='remove nothing, say what would go')
    for name, module in (('export', export), ('diff', diff), ('average', average)):
        text = (module.__doc__ or '').strip()
        action = actions.add_parser(name, help=text, description=text)
        module.add_arguments(action)
        action.set_defaults(act=module.run)


def run(args: argparse.Namespace) -> int:
    """Runs the action; an error of the file system becomes a `CheckpointError`."""
    with discovery.reading(args.path), contextlib.ExitStack() as stack:
        if getattr(args, 'pretrained', None):
            # imports torch, which the other actions can do without
            from internvl_ds.checkpoint.frozen.sources import looking_in
            from internvl_ds.config.tree import default_config

            stack.enter_context(looking_in(args.pretrained, default_config()))
        status: int = args.act(args)
    return status


def _list(args: argparse.Namespace) -> int:
    output: Path = args.path
    entries = examine_all(output, args.verify)
    latest = discovery.read_latest(output) or None
    damage = {entry.path.name: entry.problems[0] for entry in entries if entry.problems}
    try:
        resume = discovery.newest(output, damage)
        name, warning = (resume.path.name, resume.warning) if resume else (None, None)
    except CheckpointNotFound as error:
        name, warning = None, str(error)
    stagings = sorted(path.name for path in output.glob(f'{STAGING}*'))
    trash = sorted(path.name for path in output.glob(f'{TRASH}*'))
    if args.json:
        tree = {'output': str(output), 'latest': latest, 'resume': name, 'warning': warning}
        rest = {'stagings': stagings, 'trash': trash, 'tags': list(map(tree_of, entries))}
        say(json_text({**tree, **rest}))
        return _status(entries)
    titles = ('tag', 'epoch', 'accuracy', 'size', 'age', 'stage x ranks', 'precision', 'verified')
    say(table(titles, [_row(entry, latest) for entry in entries], right=titles[1:5]))
    if again := counted_again(entry.path for entry in entries):
        say(f'{human_size(again)} of these sizes are of files that tags share, there once')
    if stagings:
        say(f'{len(stagings)} save(s) under way, or left by a run that died (.staging-*)')
    if trash:
        say(f'{len(trash)} tag(s) half removed (.trash-*); the next save removes the rest')
    if warning:
        say(f'auto resume: {warning}')
    return _status(entries)


def _row(examined: Examined, latest: str | None) -> tuple[str, ...]:
    mark = ' (latest)' if examined.name == latest else ''
    size, age = human_size(examined.size), human_age(time.time() - examined.time_of_save)
    verified = examined.verified
    if examined.problems:
        # The path is in the line already, and only the first of several reasons is wanted.
        reason = examined.problems[0].removeprefix(str(examined.path)).lstrip(':/ ')
        word = 'NO SOURCE' if verified == _NO_SOURCE else 'DAMAGED'
        verified = f'{word}: {reason.partition("; ")[0]}'
    header = examined.header
    if header is None:
        cells = ('-', '-', size, age, '-', '-')
    else:
        epoch = '-' if header.epoch is None else str(header.epoch)
        ranks = f'{header.zero_stage} x {header.world_size}'
        cells = (epoch, f'{header.max_accuracy:.2f}', size, age, ranks, header.precision)
    return (examined.name + mark, *cells, verified)


def _verify(args: argparse.Namespace) -> int:
    warning = None
    if args.all:
        entries = examine_all(args.path, contents=True)
    else:
        entries, warning = examine_chosen(args.path, args.tag, contents=True)
    if args.json:
        tags = list(map(tree_of, entries))
        say(json_text({'output': str(args.path), 'warning': warning, 'tags': tags}))
        return _status(entries)
    if warning:
        say(f'auto resume: {warning}')
    for examined in entries:
        verdict = {'checksums': 'all files are as written', 'damaged': 'DAMAGED'}
        verdict[_NO_SOURCE] = 'all files are as written, and what it omits is not found'
        no_manifest = 'no manifest, so nothing can be said of its files'
        size = human_size(examined.size)
        say(f'{shown(examined.path)}: {verdict.get(examined.verified, no_manifest)} ({size})')
        for problem in examined.problems:
            say(f'  {shown(problem)}')
    return _status(entries)


def _show(args: argparse.Namespace) -> int:
    examined = examine_chosen(args.path, args.tag, contents=False)[0][0]
    path = examined.path
    state: dict[str, Any] | None = None
    try:
        state = _state_of(path, examined)
    except CheckpointError as error:
        problems = [*examined.problems, str(error)]
        examined = replace(examined, verified='damaged', problems=problems)
    config = (state or {}).get('config')
    if args.config and not isinstance(config, str):
        raise CheckpointNotFound(f'{path}: keeps no config')
    if args.config and not args.json:
        say(str(config).rstrip())
        return _status([examined])
    digests: dict[str, str] = {}
    sizes: dict[str, int] = {}
    with contextlib.suppress(CheckpointError):  # it is among the problems
        manifest = discovery.read_manifest(path)
        digests = {n: e.digest for n, e in manifest.files.items()} if manifest else {}
    with contextlib.suppress(OSError):
        sizes = discovery.sizes_of(path, digests)
    files = [{'name': n, 'size': s, 'xxh3_128': digests.get(n)} for n, s in sorted(sizes.items())]
    tree = tree_of(examined) | {'format': examined.header and examined.header.format}
    tree |= {'files': files, 'state': _summary(state)}
    if args.json:
        say(json_text(tree | ({'config': config} if args.config else {})))
    else:
        _say_tree(tree)
    return _status([examined])


def _state_of(path: Path, examined: Examined) -> dict[str, Any] | None:
    """The state that a tag keeps beside its tensors."""
    from internvl_ds.checkpoint.formats.state_json import read_state

    if os.path.lexists(path / STATE_FILE):
        return read_state(path / STATE_FILE)
    if examined.verified != 'no manifest':
        return None
    # They import DeepSpeed, which other tags can do without.
    from internvl_ds.checkpoint.formats.client_state import saved_state
    from internvl_ds.checkpoint.formats.zero_shards import TagShards

    return saved_state(TagShards(path))


def _summary(state: dict[str, Any] | None) -> dict[str, Any] | None:
    if state is None:
        return None
    inner = {key: state.get(key) for key in ('lr_scheduler', 'scaler')}
    names = state.get('class_names')
    return {
        **{k: state.get(k) for k in ('epoch', 'max_accuracy', 'max_accuracy_ema', 'ema_decay')},
        **{k: sorted(map(str, v)) if isinstance(v, dict) else None for k, v in inner.items()},
        'classes': None if names is None else len(names),
    }


def _say_tree(tree: dict[str, Any]) -> None:
    lines = {key: tree[key] for key in tree if key not in ('files', 'state', 'versions')}
    lines['size'] = f'{tree["size"]} ({human_size(tree["size"])})'
    for key in ('versions', 'frozen'):
        lines[key] = ', '.join(f'{n} {v}' for n, v in (tree[key] or {}).items()) or None
    lines['problems'] = '; '.join(tree['problems']) or None
    for key, value in (tree['state'] or {}).items():
        lines[f'state: {key}'] = ', '.join(value) if isinstance(value, list) else value
    width = max(map(len, lines))
    for key, value in lines.items():
        say(f'{key.ljust(width)}  {"-" if value is None else shown(value)}')
    rows = [(file['name'], str(file['size']), human_size(file['size'])) for file in tree['files']]
    say('\n' + table(('file', 'bytes', ''), rows, right=('bytes', '')))


def _prune(args: argparse.Namespace) -> int:
    output: Path = args.path
    find_tags(output)
    try:
        resume = discovery.newest(output)
    except CheckpointNotFound as error:
        raise CheckpointNotFound(f'nothing was removed: {error}') from error
    if resume is None or resume.path.is_file():
        raise CheckpointNotFound(f'{output}: no checkpoint tag in it')
    policies: list[retention.Policy] = [
        retention.KeepNewest(args.keep),
        retention.KeepSteps(args.keep_steps),
        retention.KeepBest(args.keep_best),
        retention.KeepEvery(args.keep_every),
        retention.KeepLater(0 if args.drop_later else None),
    ]
    tags = discovery.removable_tags(output)
    # a newest save that is damaged must not be all that stays
    resumable = {resume.path.name, discovery.read_latest(output)}
    victims = [n for n in retention.tags_to_prune(tags, policies) if n not in resumable]
    sizes = {}
    for name in victims:
        with contextlib.suppress(FileNotFoundError):  # a run that saves meanwhile has pruned it
            sizes[name] = freed_by([output / name])
    total = freed_by(path for name in sizes if (path := output / name).is_dir())
    removals, failures = list(sizes), list[str]()
    if not args.dry_run:
        removals, failures = commit.remove(output, [tag for tag in tags if tag.name in sizes])
    rest = [tag.name for tag in tags if tag.name not in victims]
    pruned = [{'tag': name, 'size': sizes.get(name, 0)} for name in removals]
    total = sum(sizes.get(name, 0) for name in removals) if failures else total
    status = _FAILED if failures else OK
    if args.json:
        tree = {'output': str(output), 'dry_run': args.dry_run, 'pruned': pruned, 'size': total}
        say(json_text({**tree, 'kept': rest, 'failed': failures}))
        return status
    verb, went = ('would remove', 'would go') if args.dry_run else ('removed', 'went')
    for name in removals:
        say(f'{verb} {shown(name)}  {human_size(sizes.get(name, 0))}')
    say(f'{len(removals)} tag(s) {went}, {human_size(total)}; {len(rest)} stay')
    later = [tag.name for tag in retention.later_tags(tags) if tag.name in rest]
    if later and not args.drop_later:
        say(f'of later training than {tags[-1].name}: {few(later)} (--drop-later removes them too)')
    for name in failures:
        say(f'could not remove {shown(name)}')
    return status


def _status(entries: Sequence[Examined]) -> int:
    found = {entry.verified for entry in entries}
    if 'damaged' in found:
        return DAMAGED
    return UNVERIFIED if found & {'no manifest', _NO_SOURCE} else OK
