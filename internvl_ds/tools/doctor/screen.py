"""The findings as one screen of text, or as JSON's tree. Pure."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from typing import Any

from internvl_ds.tools.doctor.probe_result import ERROR, WARNING, ProbeResult

_WIDTH = 100
_VERDICT, _TOPIC = 9, 18  # columns, with the space behind them


def screen(findings: Sequence[ProbeResult]) -> str:
    """A line for each finding, with what to do below those that are not as they should be."""
    lines = []
    for finding in findings:
        head = f'{finding.verdict:<{_VERDICT}}{finding.topic:<{_TOPIC}}'
        lines += _wrapped(finding.found, head)
        if finding.advice:
            lines += _wrapped(f'-> {finding.advice}', ' ' * len(head))
    return '\n'.join([*lines, summary(findings)])


def summary(findings: Sequence[ProbeResult]) -> str:
    """The errors, in one sentence."""
    topics = [finding.topic for finding in findings if finding.verdict == ERROR]
    warnings = sum(finding.verdict == WARNING for finding in findings)
    rest = f'{warnings} warning{"" if warnings == 1 else "s"}'
    if not topics:
        return f'no errors ({rest})'
    listed = textwrap.shorten(', '.join(topics), _WIDTH - 40, placeholder=', ...')
    return f'{len(topics)} error{"" if len(topics) == 1 else "s"}: {listed} ({rest})'


def tree(findings: Sequence[ProbeResult], output: str) -> dict[str, Any]:
    """What --json prints."""
    return {
        'output': output,
        'errors': sum(finding.verdict == ERROR for finding in findings),
        'warnings': sum(finding.verdict == WARNING for finding in findings),
        'findings': [dataclasses.asdict(finding) for finding in findings],
    }


def _wrapped(text: str, head: str) -> list[str]:
    indents: dict[str, Any] = {'initial_indent': head, 'subsequent_indent': ' ' * len(head)}
    text = ' '.join(text.split())
    return textwrap.wrap(text, _WIDTH, break_on_hyphens=False, **indents) or [head.rstrip()]
