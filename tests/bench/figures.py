"""What samples say: medians, ranges and paired ratios, and their tables. Pure functions."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

Samples = Mapping[str, Sequence[float]]


class Summary(NamedTuple):
    """Of one set of samples.

    The median is what to quote; the range says how far it may be trusted.
    """

    median: float
    min: float
    max: float


class Pair(NamedTuple):
    """Two contenders to compare, round by round.

    Attributes:
        a, b: names of samples; the ratio is a / b.
        target: the most that the median ratio should be; None where there is no target.
    """

    a: str
    b: str
    target: float | None = None


def summary(samples: Sequence[float]) -> Summary:
    """Median and range.

    Raises:
        ValueError: when there is no sample.
    """
    if not samples:
        raise ValueError('no samples')
    return Summary(statistics.median(samples), min(samples), max(samples))


def paired_ratios(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """a / b of each round: what slowed both in a round down cancels out.

    Raises:
        ValueError: when they are not of the same rounds.
    """
    if len(a) != len(b):
        raise ValueError(f'{len(a)} and {len(b)} samples are no pairs')
    return [x / y for x, y in zip(a, b, strict=True)]


def verdict(value: float, target: float | None) -> str:
    """'met', 'missed', or nothing where there is no target."""
    if target is None:
        return ''
    return 'met' if value <= target else 'missed'


def seconds_report(samples: Samples) -> dict[str, Any]:
    """Contender -> its summary and samples, for JSON."""
    return {
        name: {**summary(values)._asdict(), 'samples': list(values)}
        for name, values in samples.items()
    }


def ratios_report(samples: Samples, pairs: Iterable[Pair]) -> list[dict[str, Any]]:
    """The summaries of paired ratios, with their targets, for JSON.

    Raises:
        KeyError: for a pair of which one was not measured.
    """
    found = []
    for pair in pairs:
        values = summary(paired_ratios(samples[pair.a], samples[pair.b]))
        judged = {'target': pair.target, 'verdict': verdict(values.median, pair.target)}
        found.append({'a': pair.a, 'b': pair.b, **values._asdict(), **judged})
    return found


def seconds_table(report: Mapping[str, Mapping[str, Any]]) -> str:
    """What `seconds_report` made, as markdown."""
    rows = [
        (name, *(f'{entry[key]:.3f}' for key in Summary._fields)) for name, entry in report.items()
    ]
    return table(('seconds', *Summary._fields), rows)


def ratios_table(report: Iterable[Mapping[str, Any]]) -> str:
    """What `ratios_report` made, as markdown."""
    rows = []
    for entry in report:
        target = '' if entry['target'] is None else f'<= {entry["target"]:g}'
        numbers = (f'{entry[key]:.2f}' for key in Summary._fields)
        rows.append((f'{entry["a"]} / {entry["b"]}', *numbers, target, entry['verdict']))
    return table(('paired ratio', *Summary._fields, 'target', ''), rows)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table: the first column to the left, the others to the right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(head))]
    rule = ['-' * widths[0], *('-' * (width - 1) + ':' for width in widths[1:])]
    texts = []
    for line in (lines[0], rule, *lines[1:]):
        first, *others = line
        aligned = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        texts.append('| ' + ' | '.join([first.ljust(widths[0]), *aligned]) + ' |')
    return '\n'.join(texts)
