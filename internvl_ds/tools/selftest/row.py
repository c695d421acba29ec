"""A line of the self-test's table: what was tried, and how it went."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from internvl_ds.tools.text import table

OK, SLOW, WRONG, ABSENT = 'ok', 'slow', 'wrong', 'absent'


@dataclass(frozen=True)
class Row:
    """The result of one trial."""

    name: str
    # `OK`; `WRONG` for other numbers than plain PyTorch's, or an error; `SLOW` for right but not as
    # fast as it should be; `ABSENT` where this machine has nothing to try it on
    verdict: str
    found: str  # what was measured, with what was allowed
    figures: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


def judged(name: str, faults: Sequence[str], found: str, **figures: float) -> Row:
    """A row that is wrong where there are faults, which it names, and else ok."""
    verdict = WRONG if faults else OK
    return Row(name, verdict, '; '.join(faults) if faults else found, figures)


def screen(rows: Sequence[Row]) -> str:
    """The rows as a table, with a last line that counts them."""
    cells = [[row.verdict, row.name, f'{row.seconds:.1f}', row.found] for row in rows]
    bad = [row.name for row in rows if row.verdict in (WRONG, SLOW)]
    last = f'not ok: {", ".join(bad)}' if bad else 'all that could be tried is ok'
    return '\n'.join([table(('', 'trial', 's', 'found'), cells, right=('s',)), last])


def tree(rows: Sequence[Row], ranks: int, device: str) -> dict[str, Any]:
    """The object that --json prints."""
    return {'ranks': ranks, 'device': device, 'rows': [dataclasses.asdict(row) for row in rows]}
