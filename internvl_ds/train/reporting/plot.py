"""curves.png: loss and accuracy over the epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl_ds.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Key in metrics.jsonl -> legend; the colours are the Okabe-Ito ones, told apart by every eye.
_LOSSES = {'train_loss': ('training', '#0072B2'), 'val_loss': ('validation', '#D55E00')}
_ACCURACIES = {
    'acc1': ('top-1', '#0072B2'),
    'acc5': ('top-5', '#009E73'),
    'ema_acc1': ('top-1, EMA', '#D55E00'),
    'mAP': ('mAP', '#0072B2'),
    'ema_mAP': ('mAP, EMA', '#D55E00'),
}


def plot_curves(records: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Draws the records of metrics.jsonl to a PNG, replacing it in one step.

    The figure has its own Agg canvas: pyplot's global state and any display are left alone.

    Args:
        records: one mapping per epoch; a value that is missing or None leaves a gap.
        path: where the PNG goes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second, of one rank only
    from matplotlib.figure import Figure

    path = Path(path)
    figure = Figure(figsize=(10, 4), dpi=110, layout='constrained')
    FigureCanvasAgg(figure)
    loss, accuracy = figure.subplots(1, 2)
    _draw(loss, records, _LOSSES, 'cross-entropy (nats)')
    _draw(accuracy, records, _ACCURACIES, 'validation accuracy (%)')
    best = max((r['acc1'] for r in records if r.get('acc1') is not None), default=None)
    if best is not None:
        accuracy.set_title(f'best top-1 {best:.2f} %', fontsize=10)
    with replacing(path) as file:
        figure.savefig(file, format='png')
    return path


def _draw(
    axes: Axes,
    records: Sequence[Mapping[str, Any]],
    series: Mapping[str, tuple[str, str]],
    label: str,
) -> None:
    for key, (name, colour) in series.items():
        points = [(r['epoch'], r[key]) for r in records if r.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker='.', color=colour, label=name)
    axes.set_xlabel('epoch')
    axes.set_ylabel(label)
    axes.locator_params('x', integer=True)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
