"""tuned.png: throughput against memory, with the frontier."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from internvl_ds.files import replacing
from internvl_ds.tools.tune.final_rounds import frontier
from internvl_ds.tools.tune.records import FINAL, OK, Row

# The Okabe-Ito colours, told apart by every eye.
_TRIED, _SHIPPED, _WINNER, _FRONTIER = '#56B4E9', '#0072B2', '#D55E00', '#009E73'


def plot_trials(
    rows: Sequence[Row], names: Mapping[str, str], shipped: Collection[str], winner: str, path: Path
) -> Path:
    """Draws every configuration that ran to a PNG, replacing it in one step.

    Names are by key; ``shipped`` and ``winner`` are keys.
    """
    points = _points(rows)
    figure = Figure(figsize=(9, 5), dpi=100, layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    front = [points[key] for key in frontier(points)]
    # A ring marks each point of it: there may be one only.
    axes.plot(*zip(*front, strict=True), drawstyle='steps-post', color=_FRONTIER, zorder=1,
              marker='o', markersize=20, fillstyle='none',
              label='frontier: none is faster with less memory')  # fmt: skip
    groups = (
        ('tried', _TRIED, 'o', 30, [k for k in points if k not in shipped and k != winner]),
        ('ships', _SHIPPED, 's', 45, [k for k in points if k in shipped and k != winner]),
        ('the result', _WINNER, '*', 220, [k for k in points if k == winner]),
    )
    for label, colour, marker, size, keys in groups:
        if keys:
            x, y = zip(*(points[key] for key in keys), strict=True)
            axes.scatter(x, y, s=size, c=colour, marker=marker, label=label, zorder=2)
    for key in points:
        if key in shipped:  # other names are too long to stand beside a point
            _name(axes, names[key], points[key])
    axes.set_xlabel('peak memory of a rank (GB)')
    axes.set_ylabel('images per second, all ranks')
    axes.margins(0.12)
    axes.grid(alpha=0.3)
    figure.legend(loc='outside lower center', ncols=4, fontsize=9, frameon=False, markerscale=0.5)
    axes.set_title(f'the result: {names[winner]}\n{_counts(rows)}', fontsize=10)
    with replacing(path) as file:
        figure.savefig(file, format='png')
    return path


def _points(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """Key -> GB and images per second: the medians of all trials of a configuration."""
    good: dict[str, list[Row]] = {}
    for row in rows:
        if row.status == OK:
            good.setdefault(row.key, []).append(row)
    median = statistics.median
    return {
        key: (median(r.bench['peak_bytes'] / 1e9 for r in rows), median(r.speed for r in rows))
        for key, rows in good.items()
    }


def _counts(rows: Sequence[Row]) -> str:
    counts = Counter(row.status for row in rows if row.kind != FINAL)
    failed = [f'{count} {status}' for status, count in counts.items() if status != OK]
    return f'{counts[OK]} configurations measured' + ''.join(f', {each}' for each in failed)


def _name(axes: Axes, name: str, point: tuple[float, float]) -> None:
    text = axes.annotate(
        name, point, xytext=(0, -15), textcoords='offset points', ha='center', fontsize=9
    )
    text.set_in_layout(False)  # the axes keep their width
