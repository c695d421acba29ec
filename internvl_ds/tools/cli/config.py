"""Check ds_configs, and show what they resolve to.

    internvl-ds config check FILE... --cfg YAML --world-size N [--opts KEY VALUE ...]
        [--optimizer-in-json] [--show] [--json]

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

    from internvl_ds.config.ds.diagnostics import Diagnostic

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
    check = actions.add_parser(
        'check',
        help=text,
        description=text,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument(
        'files', nargs='+', metavar='FILE', help='a path, or the name of one that ships (zero2)'
    )
    check.add_argument('--cfg', required=True, metavar='YAML', help='the yacs configuration')
    check.add_argument(
        '--world-size', required=True, type=whole(1), metavar='N', help='the number of ranks'
    )
    check.add_argument(
        '--opts', nargs='+', default=[], metavar='KEY VALUE', help='changes to the configuration'
    )
    check.add_argument(
        '--optimizer-in-json',
        action='store_true',
        help='no optimizer and no scheduler are made in code (the training program makes both)',
    )
    check.add_argument('--show', action='store_true', help='print what each FILE resolves to')
    check.add_argument('--json', action='store_true', help='print one JSON object')
    check.set_defaults(act=_check)


def run(args: argparse.Namespace) -> int:
    """Runs the action."""
    status: int = args.act(args)
    return status


def _check(args: argparse.Namespace) -> int:
    from internvl_ds.config.ds.diagnostics import ERROR
    from internvl_ds.config.tree import get_config

    config = get_config(argparse.Namespace(cfg=args.cfg, opts=args.opts))
    found = [_check_file(name, config, args) for name in args.files]
    if args.json:
        say(json_text({'files': found}))
    else:
        for tree in found:
            _say(tree)
    severities = [finding['severity'] for tree in found for finding in tree['findings']]
    return ERRORS if ERROR in severities else OK


def _check_file(name: str, config: CfgNode, args: argparse.Namespace) -> dict[str, Any]:
    from internvl_ds.config.ds.check import examine  # DeepSpeed with it, which takes seconds
    from internvl_ds.config.ds.diagnostics import Diagnostic, errors_of
    from internvl_ds.config.ds.load import load_ds_config
    from internvl_ds.config.ds.resolve import Resolution

    in_code = not args.optimizer_in_json
    try:
        stated = load_ds_config(name)
    except ConfigError as error:
        if not Path(name).is_file():
            raise
        resolution = Resolution({}, {}, [Diagnostic('', str(error))])
    else:
        resolution = examine(
            stated, config, args.world_size, optimizer_in_code=in_code, scheduler_in_code=in_code
        )
    tree: dict[str, Any] = {'file': name, 'findings': list(map(asdict, resolution.findings))}
    if args.show and errors_of(resolution.findings):
        tree |= {'resolved': None, 'origins': None}
    elif args.show:
        tree |= {'resolved': resolution.tree, 'origins': resolution.origins}
    return tree


def _say(tree: Mapping[str, Any]) -> None:
    from internvl_ds.config.ds.diagnostics import ERROR, Diagnostic

    findings = [Diagnostic(**fields) for fields in tree['findings']]
    say(f'{tree["file"]}: {_count(findings)}')
    for finding in findings:
        say(f'  {finding.severity.ljust(len("warning"))}  {finding}')
    if 'resolved' not in tree:
        return
    if tree['resolved'] is None:
        say(f'  with an {ERROR} there is nothing to show')
    else:
        say(annotated(tree['resolved'], tree['origins']))


def _count(findings: list[Diagnostic]) -> str:
    counted = []
    for severity in ('error', 'warning'):
        number = sum(finding.severity == severity for finding in findings)
        if number:
            counted.append(f'{number} {severity}{"s" if number > 1 else ""}')
    return ', '.join(counted) or 'no errors'


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
