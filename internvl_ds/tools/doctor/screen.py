"""The results of probes as one screen of text, or as JSON's tree. Pure."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from typing import Any

from internvl_ds.tools.doctor.probe_result import ERROR, WARNING, ProbeResult

_WIDTH = 100
_VERDICT, _TOPIC = 9, 18  # columns, with the space behind them


def screen(results: Sequence[ProbeResult]) -> str:
    """A line for each result, with its advice below."""
    lines = []
    for result in results:
        head = f'{result.verdict:<{_VERDICT}}{result.topic:<{_TOPIC}}'
        lines += _wrapped(result.found, head)
        if result.advice:
            lines += _wrapped(f'-> {result.advice}', ' ' * len(head))
    return '\n'.join([*lines, summary(results)])


def summary(results: Sequence[ProbeResult]) -> str:
    """The errors, in one sentence."""
    topics = [result.topic for result in results if result.verdict == ERROR]
    warnings = sum(result.verdict == WARNING for result in results)
    rest = f'{warnings} warning{"" if warnings == 1 else "s"}'
    if not topics:
        return f'no errors ({rest})'
    listed = textwrap.shorten(', '.join(topics), _WIDTH - 40, placeholder=', ...')
    return f'{len(topics)} error{"" if len(topics) == 1 else "s"}: {listed} ({rest})'


def tree(results: Sequence[ProbeResult], output: str) -> dict[str, Any]:
    """The object that --json prints."""
    return {
        'output': output,
        'errors': sum(result.verdict == ERROR for result in results),
        'warnings': sum(result.verdict == WARNING for result in results),
        'findings': [dataclasses.asdict(result) for result in results],
    }


def _wrapped(text: str, head: str) -> list[str]:
    indents: dict[str, Any] = {'initial_indent': head, 'subsequent_indent': ' ' * len(head)}
    text = ' '.join(text.split())
    return textwrap.wrap(text, _WIDTH, break_on_hyphens=False, **indents) or [head.rstrip()]
