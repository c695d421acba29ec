"""Check ds_configs, and show what they resolve to; print the tables of all keys.

    internvl-ds config check FILE... --cfg YAML --world-size N [--opts KEY VALUE ...]
        [--optimizer-in-json] [--show] [--json]
    internvl-ds config keys
    internvl-ds config ds-keys

FILE is a path, or the name of a ds_config that ships (zero2). No GPU is needed and no rank starts.
What is found is printed a line each: error or warning, the JSON pointer, what is wrong and what to
do, and the yacs key that speaks of the same. FILE is never changed.

--show prints the ds_config that a run would train with, with the origin of every value; what is
left to DeepSpeed's defaults is not in it. With errors there is no such ds_config.

Exit statuses: 0 no errors (warnings do not count); 1 errors in a FILE; 2 wrong usage, or no FILE.

With --json one object: ``files``, each with ``file``; ``findings``, each with ``severity``
('error' or 'warning'), ``pointer``, ``yacs`` ('' where there is none) and ``message``; with --show
``resolved``, the ds_config, and ``origins``, from JSON pointers to words (null with errors).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl_ds.errors import ConfigError
from internvl_ds.tools.cli.quantities import whole
from internvl_ds.tools.text import json_text, say

if TYPE_CHECKING:
    from yacs.config import CfgNode

    from internvl_ds.config.ds.resolve import Resolution

OK, ERRORS = 0, 1

_EPILOG = """exit status:
  0  no errors (warnings do not count)
  1  errors in a FILE
  2  wrong usage, or no such FILE
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the actions."""
    parser.epilog, parser.formatter_class = _EPILOG, argparse.RawDescriptionHelpFormatter
    actions = parser.add_subparsers(dest='action', metavar='ACTION', required=True)
    text = 'find every typo, wrong type and contradiction of ds_configs'
    shape: Any = {'epilog': _EPILOG, 'formatter_class': parser.formatter_class}
    check = actions.add_parser('check', help=text, description=text, **shape)
    add = check.add_argument
    add('files', nargs='+', metavar='FILE', help='a path, or the name of one that ships (zero2)')
    add('--cfg', required=True, metavar='YAML', help='the yacs configuration')
    add('--world-size', required=True, type=whole(1), metavar='N', help='the number of ranks')
    add('--opts', nargs='+', default=[], metavar='KEY VALUE', help='changes to the configuration')
    text = 'no optimizer and no scheduler are made in code (the training program makes both)'
    add('--optimizer-in-json', action='store_true', help=text)
    add('--show', action='store_true', help='print what each FILE resolves to')
    add('--json', action='store_true', help='print one JSON object')
    check.set_defaults(act=_check)
    text = 'print all keys of the yacs configuration with their effect, as Markdown'
    actions.add_parser('keys', help=text, description=text).set_defaults(act=_keys)
    text = 'print all keys of a ds_config with what becomes of each, as Markdown'
    actions.add_parser('ds-keys', help=text, description=text).set_defaults(act=_ds_keys)


def run(args: argparse.Namespace) -> int:
    """Runs the action."""
    status: int = args.act(args)
    return status


def _keys(args: argparse.Namespace) -> int:
    from internvl_ds.config.key_table import as_markdown

    say(as_markdown().rstrip('\n'))
    return OK


def _ds_keys(args: argparse.Namespace) -> int:
    import deepspeed

    from internvl_ds.config.ds import fates, schema

    say(fates.as_markdown(schema.installed(), deepspeed.__version__).rstrip('\n'))
    return OK


def _check(args: argparse.Namespace) -> int:
    from internvl_ds.config.ds.diagnostics import errors_of
    from internvl_ds.config.tree import get_config

    config = get_config(argparse.Namespace(cfg=args.cfg, opts=args.opts))
    files = [(name, _examine(name, config, args)) for name in args.files]
    if args.json:
        say(json_text({'files': [_tree(name, resolution, args) for name, resolution in files]}))
    else:
        for name, resolution in files:
            _say(name, resolution, args)
    return ERRORS if any(errors_of(resolution.findings) for _, resolution in files) else OK


def _examine(name: str, config: CfgNode, args: argparse.Namespace) -> Resolution:
    # DeepSpeed and timm with it, which take seconds.
    from deepspeed.accelerator import get_accelerator

    from internvl_ds.config.ds.diagnostics import WARNING, Diagnostic, errors_of
    from internvl_ds.config.ds.load import load_ds_config
    from internvl_ds.config.ds.resolve import Resolution, precision_of
    from internvl_ds.dist.device import slow_bf16
    from internvl_ds.train.optimizer_check import examine_training

    try:
        tree = load_ds_config(name)
    except ConfigError as error:
        if not Path(name).is_file():
            raise
        return Resolution({}, {}, [Diagnostic('', str(error))])
    found = examine_training(tree, config, args.world_size, in_code=not args.optimizer_in_json)
    if not errors_of(found.findings):
        device = get_accelerator().device_name()
        if text := slow_bf16(precision_of(found.tree), device):
            found.findings.append(Diagnostic('', text, WARNING, 'AMP_TYPE'))
    return found


def _tree(name: str, resolution: Resolution, args: argparse.Namespace) -> dict[str, Any]:
    from internvl_ds.config.ds.diagnostics import errors_of

    tree: dict[str, Any] = {'file': name, 'findings': list(map(asdict, resolution.findings))}
    if args.show:
        right = not errors_of(resolution.findings)
        tree['resolved'] = resolution.tree if right else None
        tree['origins'] = resolution.origins if right else None
    return tree


def _say(name: str, resolution: Resolution, args: argparse.Namespace) -> None:
    from internvl_ds.config.ds.diagnostics import ERROR, WARNING

    severities = [finding.severity for finding in resolution.findings]
    numbers = [(severities.count(severity), severity) for severity in (ERROR, WARNING)]
    counts = [f'{number} {what}{"s" if number > 1 else ""}' for number, what in numbers if number]
    say(f'{name}: {", ".join(counts) or "no errors"}')
    for finding in resolution.findings:
        say(f'  {finding.severity.ljust(len(WARNING))}  {finding}')
    if args.show and ERROR in severities:
        say(f'  with an {ERROR} there is nothing to show')
    elif args.show:
        say(annotated(resolution.tree, resolution.origins))


def annotated(resolved: Mapping[str, Any], origins: Mapping[str, str]) -> str:
    """A ds_config as JSON for people, with where each value comes from at the end of its line."""
    lines = list(_lines(resolved, origins, '', 1))
    width = max((len(line) for line, origin in lines if origin), default=0)
    text = [f'{line.ljust(width)}  // {origin}' if origin else line for line, origin in lines]
    return '\n'.join(['{', *text, '}'])


def _lines(
    node: Mapping[str, Any], origins: Mapping[str, str], pointer: str, depth: int
) -> Iterator[tuple[str, str]]:
    from internvl_ds.config.ds.diagnostics import pointer_of

    for number, (key, value) in enumerate(node.items(), 1):
        here, comma = pointer + pointer_of([key]), ',' if number < len(node) else ''
        name = '  ' * depth + json.dumps(key)
        if isinstance(value, Mapping) and value:
            yield f'{name}: {{', ''
            yield from _lines(value, origins, here, depth + 1)
            yield '  ' * depth + '}' + comma, ''
        else:
            yield f'{name}: {json.dumps(value)}{comma}', origins.get(here, '')
