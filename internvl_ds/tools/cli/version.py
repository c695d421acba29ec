"""Print the versions of internvl_ds, PyTorch, DeepSpeed and timm."""

from __future__ import annotations

import argparse
from typing import Any

from internvl_ds.tools.text import say

_DISTRIBUTIONS = ('internvl_ds', 'torch', 'torchvision', 'deepspeed', 'timm')


class VersionAction(argparse.Action):
    """``--version``: looks the versions up only when it is given, prints them and exits."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Prints the versions and ends the program with status 0."""
        print(describe_versions())
        parser.exit()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds nothing: the subcommand takes no argument."""


def run(args: argparse.Namespace) -> int:
    """Prints the versions."""
    say(describe_versions())
    return 0


def describe_versions() -> str:
    """One line ``name version`` per package, read from metadata: none of them is imported."""
    from internvl_ds.tools.doctor.versions import installed

    return '\n'.join(f'{name} {installed(name) or "not installed"}' for name in _DISTRIBUTIONS)
