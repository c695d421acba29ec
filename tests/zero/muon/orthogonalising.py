"""What ranks do in test_step.py and test_exchange.py, and a plain loop like it."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path
from typing import Any

import timm.optim
import timm.optim.muon
import torch
from torch import distributed, nn

from internvl_ds import NativeScalerWithGradNormCount, initialize
from internvl_ds.checkpoint.formats.export import write_original
from internvl_ds.dist.rendezvous import rank, world_size
from internvl_ds.engine.registry import register, wrapper_of
from internvl_ds.zero.muon.exchange import Round, shared_out
from internvl_ds.zero.partition import Runs, Slices, owned
from tests.checkpoint.optimizers import Run, small_model
from tests.engine.accumulating import zero_of
from tests.engine.stepping import masters
from tests.harness.calls import message_of, on_rank_0
from tests.harness.model import (
    batch,
    make_config,
    make_model,
    micro_batch,
    module_dtype,
    precision_values,
)
from tests.harness.whole_state import whole_state

UPDATES = 6
# Five steps of them magnify a rounding some eight times, and not five hundred times as the
# defaults do, which are made to be quick.
GENTLE = (1.5, -0.5, 0.0)


def exact() -> None:
    """Makes both classes orthogonalise in float32: a rounding to bfloat16 hides smaller errors."""
    function = timm.optim.muon.zeropower_via_newtonschulz
    defaults = [torch.float32 if d == torch.bfloat16 else d for d in function.__defaults__]
    function.__defaults__ = tuple(defaults)
    if hasattr(torch.optim, 'Muon'):
        module: Any = torch.optim._muon
        source = inspect.getsource(module._zeropower_via_newtonschulz)
        exec(source.replace('grad.bfloat16()', 'grad.clone()'), vars(module))


def make_client(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    """A Muon over one group of all tensors, or over groups as a script may have them.

    'torch' trains matrices alone, and freezes the rest.
    """
    if kind == 'torch':
        for p in model.parameters():
            p.requires_grad_(p.requires_grad and p.dim() == 2)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    params, settings = [p for _, p in trained], {'lr': 0.02, 'weight_decay': 0.1}
    if kind == 'torch':
        return torch.optim.Muon(params, ns_coefficients=GENTLE, **settings)
    if kind == 'defaults':
        return timm.optim.Muon(params, lr=0.02, weight_decay=0.1)
    settings['ns_coefficients'] = GENTLE
    if kind == 'one':
        frozen = [p for p in model.parameters() if not p.requires_grad]
        return timm.optim.Muon([*params, *frozen], **settings)
    assert kind == 'many'
    groups = [
        {'params': [p], 'weight_decay': 0.1 * (p.dim() > 1), 'use_fallback': n == 'head.weight'}
        for n, p in trained
    ]
    more = {'nesterov': True, 'adjust_lr_fn': 'original', 'fallback_lr_scale': 0.5}
    return timm.optim.Muon(groups, **settings, **more)


def plain(kind: str, precision: str, clip: float | None, group: int) -> dict[str, Any]:
    """The original's loop in plain PyTorch, on whole batches, with fp32 masters in bf16."""
    dtype = module_dtype(precision)
    model, low = make_model(), make_model()
    if dtype == torch.float32:
        low = model
    low.to(dtype)
    pairs = list(zip(model.parameters(), low.parameters(), strict=True))
    for master, p in pairs:
        master.data.copy_(p.data)
    optimizer, norms = make_client(kind, model), []
    for master, p in pairs:
        p.requires_grad_(master.requires_grad)
    for step in range(UPDATES * group):
        x, y = batch(step)
        with torch.autocast('cpu', torch.bfloat16, enabled='autocast' in precision):
            logits = low(x.to(dtype))
        (nn.functional.cross_entropy(logits.float(), y) / group).backward()
        if (step + 1) % group:
            continue
        for master, p in pairs:
            master.grad = None if p.grad is None else p.grad.float()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip or float('inf'))))
        optimizer.step()
        low.zero_grad()
        for master, p in pairs:
            p.data.copy_(master.data)
    weights = {n: p.flatten().tolist() for n, p in model.named_parameters() if p.requires_grad}
    return {'norms': norms, 'weights': weights}


def follow(cells: list[list[Any]], rounded: bool = False) -> list[dict[str, Any]]:
    """The same over an engine, in each (layout, kind, precision, clip, micro-batches)."""
    if not rounded:
        exact()
    return [_follow(*cell) for cell in cells]


def _follow(
    layout: str, kind: str, precision: str, clip: float | None, group: int
) -> dict[str, Any]:
    config = make_config(
        DATA__BATCH_SIZE=16 // world_size(), TRAIN__ACCUMULATION_STEPS=group,
        **precision_values(precision),
    )  # fmt: skip
    model, json = make_model(), zero_of(layout)
    if 'parts' in layout:
        json['zero_optimization']['sub_group_size'] = 150
    engine, optimizer = initialize(config, model, make_client(kind, model), json)
    scaler, norms, dtype = NativeScalerWithGradNormCount(), [], module_dtype(precision)
    for step in range(UPDATES * group):
        x, y = micro_batch(step, 0, 1, rank(), world_size())
        loss = nn.functional.cross_entropy(engine(x.to(dtype)).float(), y) / group
        last = (step + 1) % group == 0
        norm = scaler(loss, optimizer, clip, update_grad=last)
        norms += [float(norm)] if last else []
    found = {'norms': norms, 'weights': masters(engine), 'keys': _keys(engine)}
    found['cut'] = _cut(engine) if layout[4] in '12' else 0
    engine.destroy()
    return found


def _keys(engine: Any) -> dict[str, list[str]]:
    """Parameter -> what is kept of it."""
    return {name: sorted(state) for name, state in whole_state(engine)[1].items()}


def _cut(engine: Any) -> int:
    """How many matrices lie on two ranks."""
    layout, _ = wrapper_of(engine).partitioning()
    return sum(
        len(list(layout.places(name))) > 1
        for names in layout.groups for name, shape in names.items() if len(shape) > 1
    )  # fmt: skip


def skip(layouts: list[str]) -> dict[str, list[Any]]:
    """An update with a gradient that is not finite on one rank: what has changed."""
    found = {}
    for layout in layouts:
        run = _run(layout)
        run.steps(2)
        before = _digest(run)
        x, y = micro_batch(0, 0, 1, rank(), world_size())
        loss = nn.functional.cross_entropy(run.engine(x), y)
        if rank() == 1:
            loss.register_hook(lambda gradient: gradient * float('inf'))
        run.scaler(loss, run.optimizer, 5.0)
        found[layout] = [run.scaler.step_was_skipped, _digest(run) == before]
        run.steps(1)
        found[layout].append(_digest(run) != before)
        run.close()
    return found


def _run(layout: str, output: str = '') -> Run:
    """A run whose groups have each a matrix or a vector, or of one group ('mixed')."""
    zero = zero_of(layout)
    stage = zero.pop('zero_optimization')['stage']
    make = _one if 'mixed' in layout else lambda groups: timm.optim.Muon(groups, lr=0.02)
    return Run(make, stage, output, **zero)


def _one(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return timm.optim.Muon([p for group in groups for p in group['params']], lr=0.02)


def save(root: str, layouts: list[str]) -> dict[str, Any]:
    """Layout -> the tag of a run after two updates, its state then, and two updates later."""
    exact()
    found = {}
    for layout in layouts:
        run = _run(layout, f'{root}/{layout}')
        run.steps(2)
        path, then, digest = run.save(2), _digest(run), run.digest()
        later = run.steps(2)
        found[layout] = {
            'path': path, 'then': then, 'digest': digest, 'later': later, 'ended': _digest(run),
            'weights': masters(run.engine),
        }  # fmt: skip
        run.close()
    return found


def load(saved: dict[str, Any], moves: list[list[str]]) -> dict[str, Any]:
    """The same of runs that go on from a tag, by (its layout, the run's)."""
    exact()
    found = {}
    for source, layout in moves:
        run = _run(layout)
        run.steps(1)
        said = run.load(saved[source]['path'])
        then, digest = _digest(run), run.digest()
        later = run.steps(2)
        found[f'{source} -> {layout}'] = {
            'said': said, 'then': then, 'digest': digest, 'later': later, 'ended': _digest(run),
            'weights': masters(run.engine),
        }  # fmt: skip
        run.close()
    return found


def _digest(run: Run) -> dict[str, Any]:
    """Parameter -> digests of all that is kept of it, whole."""
    weights, moments = whole_state(run.engine)
    return {
        name: {
            key: hashlib.sha256(value.numpy().tobytes()).hexdigest()
            if torch.is_tensor(value) else value
            for key, value in {**moments[name], 'weight': weight}.items()
        }
        for name, weight in weights.items()
    }  # fmt: skip


def files(root: str) -> dict[str, Any]:
    """An update after an export of a tag: of the engine, of another from the file, and plain."""
    exact()
    run, path = Run(_one, 2, root), f'{root}/exported.pth'
    run.steps(2)
    tag, step = run.save(2), run.engine.global_steps
    on_rank_0(lambda: write_original(Path(tag), Path(path)))
    run.steps(1)
    found = {'engine': masters(run.engine)}
    run.close()
    run = Run(_one, 3, '')
    found['said'] = run.load(path)
    run.steps(1)
    found['file'] = masters(run.engine)
    run.close()
    saved = torch.load(path, weights_only=False)
    model = small_model()
    client = _one([{'params': list(model.parameters())}])
    model.load_state_dict(saved['model'])
    client.load_state_dict(saved['optimizer'])
    found['groups'] = [sorted(group.keys() & {'use_muon'}) for group in client.param_groups]
    x, y = batch(step)
    nn.functional.cross_entropy(model(x), y).backward()
    client.step()
    found['plain'] = {n: p.flatten().tolist() for n, p in model.named_parameters()}
    return found


def refusals() -> dict[str, str]:
    """What `initialize` and `register` say of what cannot be orthogonalised."""
    found = {}

    def made(stage: int, **settings: Any) -> None:
        model = make_model()
        params = [p for p in model.parameters() if p.requires_grad]
        client = timm.optim.Muon([{'params': params, **settings}], lr=0.02)
        initialize(make_config(DATA__BATCH_SIZE=8), model, client, zero_of(f'zero{stage}'))

    def plain_engine(**settings: Any) -> None:
        import deepspeed

        model = make_model()
        params = [p for p in model.parameters() if p.requires_grad]
        client = timm.optim.Muon([{'params': params, **settings}], lr=0.02)
        json = {'train_batch_size': 16, 'zero_allow_untested_optimizer': True}
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=client, config={**json, **zero_of('zero2')}
        )
        register(engine)

    found['adamuon'] = message_of(lambda: made(2, algo='adamuon'))
    found['vector'] = message_of(lambda: made(3, use_muon=True))
    found['mixed'] = message_of(plain_engine)
    found['fallback'] = message_of(lambda: plain_engine(use_fallback=True))
    return found


def exchange() -> list[bool]:
    """Each parameter whole on one rank, doubled with its first element added, and back again."""
    shapes = [{'a': (4, 3), 'b': (5,), 'c': (2, 2)}, {'d': (3, 3)}]
    found = []
    for layout in (Slices(shapes, world_size()), Runs(shapes, None, [11, 5], world_size())):
        for index, names in enumerate(layout.groups):
            whole = {n: torch.arange(float(torch.Size(s).numel())) + 1 for n, s in names.items()}
            length = max(
                (place.offset + place.stop - place.start
                 for name in names for place in layout.places(name) if place.rank == rank()),
                default=0,
            )  # fmt: skip
            flat = torch.full((length + 1,), -1.0)
            runs = owned(layout, rank())[index]
            for name, place in runs:
                end = place.offset + place.stop - place.start
                flat[place.offset : end] = whole[name][place.start : place.stop]

            def work(name: str, tensor: torch.Tensor, whole: Any = whole) -> None:
                assert torch.equal(tensor, whole[name])
                tensor.mul_(2).add_(tensor[0].clone())

            for owners in shared_out(layout, index, limit=6):
                Round(layout, rank(), owners).replace(flat, work, torch.device('cpu'))
            for name, place in runs:
                end = place.offset + place.stop - place.start
                wanted = (whole[name] * 2 + 2)[place.start : place.stop]
                found.append(bool(torch.equal(flat[place.offset : end], wanted)))
            found.append(float(flat[-1]) == -1.0)
    distributed.barrier()
    return found
