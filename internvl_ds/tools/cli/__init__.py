"""The ``internvl-ds`` command: one small module per subcommand, found through ``_COMMANDS``.

A subcommand is a module in this package with a docstring (whose first line is its help), a function
``add_arguments(parser)`` and a function ``run(args)`` that returns the exit status. It imports
torch, DeepSpeed or scikit-learn inside ``run`` only, so that ``internvl-ds --help`` stays quick.
"""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
from collections.abc import Sequence

from internvl_ds.dist.signals import INTERRUPTED
from internvl_ds.errors import InternvlDsError
from internvl_ds.tools.cli import (
    ckpt,
    config,
    data,
    digits,
    doctor,
    evaluate,
    plan,
    selftest,
    tune,
    version,
)
from internvl_ds.tools.text import stdout_for_answers

# The subcommands, in the order in which --help lists them; each is named as its module.
_COMMANDS = (ckpt, config, data, digits, doctor, evaluate, plan, selftest, tune, version)

USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Args:
        argv: the words after the program's name; those of the command line when None.

    Returns:
        The exit status: 0; 2 for an error of the user's, told in one line on stderr (after its
        traceback where this package logs at DEBUG); 130 after Ctrl-C.
    """
    args = build_parser().parse_args(argv)
    try:
        with stdout_for_answers():
            status: int = args.run(args)
    except KeyboardInterrupt:
        print(f'internvl-ds {args.command}: interrupted', file=sys.stderr)
        return INTERRUPTED
    except InternvlDsError as error:  # whose text is printable
        if logging.getLogger('internvl_ds').isEnabledFor(logging.DEBUG):
            traceback.print_exc()
        print(f'internvl-ds {args.command}: error: {error}', file=sys.stderr)
        return USER_ERROR
    return status


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser with every subcommand in it."""
    parser = argparse.ArgumentParser(
        prog='internvl-ds', description='Tools beside the internvl_ds training program.'
    )
    text = 'print the versions of internvl_ds and of what it stands on'
    suppress = argparse.SUPPRESS
    parser.add_argument(
        '--version', action=version.VersionAction, nargs=0, dest=suppress, help=text
    )
    commands = parser.add_subparsers(dest='command', metavar='COMMAND', required=True)
    for module in _COMMANDS:
        name = module.__name__.rpartition('.')[2]
        summary = (module.__doc__ or '').strip().partition('\n')[0]
        command = commands.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser
