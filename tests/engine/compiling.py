"""What ranks do in test_compiling.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from internvl_ds import initialize
from internvl_ds.checkpoint.formats.export import write_original
from internvl_ds.dist.rendezvous import rank
from internvl_ds.errors import ConfigError
from tests.harness import saving
from tests.harness.model import Net, make_config, make_optimizer, zero_json
from tests.harness.saving import Run

UPDATES = 4


class Dropping(Net):
    """The small model, with dropout."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.dropout(x, 0.2, self.training))


def train(
    output: str, stages: list[int], precision: str = 'fp32', backend: str = 'inductor'
) -> dict[str, Any]:
    """Runs that compile and that do not, and those that resume one of the other kind.

    Returns for each stage what was trained with each, the graphs that were compiled, and the names
    of the tensors of a tag.
    """
    found: dict[str, Any] = {}
    for stage in stages:
        runs, seen, graphs = {}, {}, {}
        for kind in ('', backend):
            torch._dynamo.reset()  # it compiles a forward for so many modules, and no more
            counters = torch._dynamo.utils.counters
            counters.clear()
            run = _run(stage, precision, f'{output}/{stage}{kind}', kind)
            seen[kind] = run.steps(0, UPDATES)
            graphs[kind] = counters['stats']['unique_graphs']
            with run.ema.swapped_in():
                averaged = run.logits()
            path = run.save(0, step=UPDATES)
            seen[f'{kind} later'] = run.steps(UPDATES, UPDATES + 2)
            runs[kind] = path, run.logits(), averaged
            run.close()
        for kind, other in (('', backend), (backend, '')):
            run = _run(stage, precision, f'{output}/{stage}{kind}resumed', kind)
            run.load(runs[other][0])
            seen[f'{other} resumed by {kind}'] = run.steps(UPDATES, UPDATES + 2)
            run.close()
        logits = {kind: [*run[1], *run[2]] for kind, run in runs.items()}
        names = {kind: _names_in(run[0]) for kind, run in runs.items()}
        found[str(stage)] = {'seen': seen, 'graphs': graphs, 'logits': logits, 'names': names}
    return found


def _names_in(tag: str) -> list[str]:
    file = Path(f'{tag}.{rank()}.pth')
    write_original(Path(tag), file)
    return list(torch.load(file, weights_only=False)['model'])


def _run(stage: int, precision: str, output: str, backend: str) -> Run:
    plain = saving.make_model
    saving.make_model = _make
    try:
        return Run(stage, precision, output, TRAIN__COMPILE=backend)
    finally:
        saving.make_model = plain


def _make(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Dropping()


def refused() -> dict[str, str]:
    """What is said of a backend that no rank has, and of one that needs what rank 1 lacks."""
    import torch._inductor.config  # its import takes seconds

    said = {'unknown': _refusal('nonsense')}
    if rank() == 1:
        # As the variable CXX does where it is set before torch is imported.
        torch._inductor.config.cpp.cxx = (None, '/nowhere/c++')
        torch._inductor.config.force_disable_caches = True
    said['no c++'] = _refusal('inductor')
    return said


def _refusal(backend: str) -> str:
    config = make_config(DATA__BATCH_SIZE=8, TRAIN__COMPILE=backend)
    model = _make()
    try:
        initialize(config, model, make_optimizer(model), zero_json(1))
    except ConfigError as error:
        return str(error)
    return ''
