"""What ranks do in test_guards.py: what a script of plain PyTorch may do to an engine."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from timm.optim import Lamb
from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from internvl_ds import NativeScalerWithGradNormCount, get_grad_norm, initialize, register
from internvl_ds.dist.rendezvous import rank, world_size
from tests.engine.scheduling import caught_warnings
from tests.engine.stepping import make_engine, masters, train_step
from tests.harness.calls import message_of
from tests.harness.model import make_config, make_model, make_sgd, micro_batch, on_device, zero_json


def _loss(model: Any, step: int = 0) -> torch.Tensor:
    x, y = micro_batch(step, 0, 1, rank(), world_size())
    return nn.functional.cross_entropy(model(x), y)


def bare_loops(stages: list[int], accumulations: list[int]) -> dict[str, Any]:
    """The original's O0 branch and its kin on a new engine; then two updates as they should be."""
    return {
        f'{stage} {accumulation}': _bare_loop(stage, accumulation)
        for stage in stages
        for accumulation in accumulations
    }


def _bare_loop(stage: int, accumulation: int) -> dict[str, Any]:
    model = make_model()
    client = make_sgd(model)
    config = make_config(DATA__BATCH_SIZE=8 // accumulation, TRAIN__ACCUMULATION_STEPS=accumulation)
    engine, optimizer = initialize(config, model, client, zero_json(stage))
    before = masters(engine)
    by_hand = torch.amp.GradScaler('cpu')

    def original() -> None:
        (_loss(engine) / accumulation).backward()
        nn.utils.clip_grad_norm_(engine.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()

    def retried() -> None:
        loss = _loss(engine)
        message_of(lambda: loss.backward(retain_graph=True))
        loss.backward()

    def of_inputs() -> None:
        x = on_device(torch.ones(2, 12)).requires_grad_()
        torch.autograd.grad(engine(x).sum(), x)

    def through_the_module() -> None:
        (_loss(engine.module) / accumulation).backward()
        optimizer.step()

    said = {
        'original': message_of(original),
        'retried': message_of(retried),
        'GradScaler': message_of(lambda: by_hand.scale(_loss(engine)).backward()),
        'inputs': message_of(of_inputs),
        'step': message_of(optimizer.step),
        "client's step": message_of(client.step),
    }
    unchanged = masters(engine) == before and engine.global_steps == 0
    scaler = NativeScalerWithGradNormCount()
    norms = [
        float(train_step(engine, optimizer, scaler, step, 0.5, accumulation)[0])
        for step in range(2)
    ]
    found = {'said': said, 'unchanged': unchanged, 'norms': norms, 'weights': masters(engine)}
    # At last: it leaves gradients, as in plain PyTorch.
    said['module'] = message_of(through_the_module)
    found['unchanged'] = unchanged and masters(engine) == found['weights']
    engine.destroy()
    return found


def what_still_works(stages: list[int]) -> dict[str, Any]:
    """A loop of plain DeepSpeed, evaluation, a teacher and a second model without an engine."""
    return {str(stage): _what_still_works(stage) for stage in stages}


def _what_still_works(stage: int) -> dict[str, Any]:
    model = make_model()
    ds_config = {
        'train_micro_batch_size_per_gpu': 8,
        'gradient_clipping': 0.5,
        'zero_allow_untested_optimizer': True,
        **zero_json(stage),
    }
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=make_sgd(model), config=ds_config)
    register(engine)
    teacher, critic = make_model(3).to(engine.device), nn.Linear(5, 1).to(engine.device)
    norms = []
    for step in range(2):
        with torch.no_grad():
            logits = teacher(micro_batch(step, 0, 1, rank(), world_size())[0])
            engine(on_device(torch.ones(2, 12)))
        critic(logits).sum().backward()  # a second model's loop
        nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
        engine.backward(_loss(engine, step))
        norms.append(float(get_grad_norm(engine.parameters())))
        engine.step()
    with caught_warnings() as told:
        for _ in range(2):
            engine.optimizer.consolidate_state_dict(to=0)
            engine.basic_optimizer.consolidate_state_dict()
    found = {
        'norms': norms,
        'weights': masters(engine),
        'critic': float(critic.weight.grad.norm()),
        'told': told,
    }
    engine.destroy()
    return found


def clip_by_hand(stages: list[int]) -> dict[str, Any]:
    """torch's clip_grad_norm_ between engine.backward and engine.step, and after a whole update."""
    found = {}
    for stage in stages:
        engine, optimizer = make_engine(stage, 'fp32', sgd=True)
        engine.backward(_loss(engine))
        between = message_of(lambda e=engine: nn.utils.clip_grad_norm_(e.parameters(), 0.05))
        engine.step()
        train_step(engine, optimizer, NativeScalerWithGradNormCount(), 1)
        # Of ZeRO only one rank owns it.
        flats = [p for group in optimizer.param_groups for p in group['params']]
        if flats:  # at stages 1 and 2 the ranks' own parts, at stage 3 none
            said = message_of(lambda f=flats: nn.utils.clip_grad_norm_(f, 1.0))
            assert said.startswith('ConfigError' if stage else 'no error'), said
        after = message_of(lambda e=engine: nn.utils.clip_grad_norm_(e.module.head.bias, 0.05))
        found[str(stage)] = [between, after, masters(engine)]
        engine.destroy()
        if stage in (1, 2):  # the module is a plain one again
            engine.module(torch.ones(2, 12)).sum().backward()
            assert float(nn.utils.clip_grad_norm_(engine.module.parameters(), 1.0)) > 0
    return found


def two_engines(stages: list[int]) -> dict[str, Any]:
    """One loss through two engines, whose backward is the first one's."""
    found = {}
    for stage in stages:
        engines = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            model = nn.Linear(12 if seed == 0 else 7, 7 if seed == 0 else 5)
            client = torch.optim.SGD(model.parameters(), lr=0.1)
            engines.append(initialize(make_config(DATA__BATCH_SIZE=8), model, client,
                                      zero_json(stage))[0])  # fmt: skip
        first, second = engines
        first.backward(_loss(lambda x: second(first(x))))
        first.step()
        second.step()
        found[str(stage)] = [masters(engine) for engine in engines]
    return found


def foreign_autocast(stages: list[int], cells: list[tuple[str, str]]) -> dict[str, Any]:
    """An engine of a precision inside the script's own autocast of a dtype; '' for none."""
    found = {}
    for stage in stages:
        for precision, dtype in cells:
            engine, optimizer = make_engine(stage, precision, sgd=True)
            scaler = NativeScalerWithGradNormCount()
            inputs = next(engine.module.parameters()).dtype

            def forward(dtype: str, engine: Any = engine, inputs: Any = inputs) -> torch.Tensor:
                x, _ = micro_batch(0, 0, 1, rank(), world_size())
                wanted = getattr(torch, dtype or 'bfloat16')
                with torch.autocast('cpu', wanted, enabled=bool(dtype)):
                    return engine(x.to(inputs))

            def train(
                dtype: str, forward: Any = forward, s: Any = scaler, o: Any = optimizer
            ) -> Any:
                _, y = micro_batch(0, 0, 1, rank(), world_size())
                s(nn.functional.cross_entropy(forward(dtype).float(), y), o, 0.5)

            before = masters(engine)
            said = message_of(lambda t=train, d=dtype: t(d))
            with torch.no_grad():
                evaluated = message_of(lambda f=forward, d=dtype: f(d))
            moved = masters(engine) != before
            if not moved:
                train('')
            found[f'{stage} {precision} {dtype}'] = [said, evaluated, moved, masters(engine)]
            engine.destroy()
    return found


def wrapped(stages: list[int]) -> dict[str, Any]:
    """DistributedDataParallel and DataParallel around a model, and around an engine."""
    return {str(stage): _wrapped(stage) for stage in stages}


def _wrapped(stage: int) -> dict[str, str]:
    def start(wrap: Callable[[nn.Module], nn.Module]) -> None:
        model = wrap(make_model())
        initialize(make_config(DATA__BATCH_SIZE=8), model, make_sgd(model), zero_json(stage))

    def plain() -> None:
        model = DistributedDataParallel(make_model())
        config = {'train_micro_batch_size_per_gpu': 8, 'zero_allow_untested_optimizer': True,
                  **zero_json(stage)}  # fmt: skip
        register(deepspeed.initialize(model=model, optimizer=make_sgd(model), config=config)[0])

    def sharded() -> None:
        model = make_model()
        client = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
        initialize(make_config(DATA__BATCH_SIZE=8), model, client, zero_json(stage))

    engine, _ = make_engine(stage, 'fp32', sgd=True)
    outer = nn.Sequential(engine, nn.Linear(5, 5))
    found = {
        'DDP(model)': message_of(lambda: start(DistributedDataParallel)),
        'inner DDP': message_of(lambda: start(
            lambda m: nn.Sequential(DistributedDataParallel(m), nn.Linear(5, 5))
        )),
        'DataParallel(model)': message_of(lambda: start(DataParallel)),
        'engine of an engine': message_of(lambda: start(lambda _: engine)),
        'register': message_of(plain),
        'DDP(engine)': message_of(lambda: DistributedDataParallel(engine)),
        'replicas': message_of(lambda: engine._replicate_for_data_parallel()),
    }  # fmt: skip
    if stage < 3:  # torch refuses to wrap what is partitioned
        found['DDP around'] = message_of(lambda: DistributedDataParallel(outer)(torch.ones(2, 12)))
    engine.destroy()
    # The original's name for the wrapped model, called on after the port.
    model = make_model()
    before = DistributedDataParallel(model)
    initialize(make_config(DATA__BATCH_SIZE=8), model, make_sgd(model), zero_json(stage))
    found['ZeRO of torch'] = message_of(sharded)
    found['DDP before'] = message_of(lambda: before(torch.ones(2, 12)))
    # A copy is a module of its own, with the ranks to itself.
    if stage < 3:
        copied = DistributedDataParallel(copy.deepcopy(model))
        found['copy'] = message_of(lambda: copied(torch.ones(2, 12)).sum().backward())
    return found


def averages(stages: list[int]) -> dict[str, Any]:
    """timm's three averages and torch's, made of an engine and of its module."""
    return {str(stage): _averages(stage) for stage in stages}


def _averages(stage: int) -> dict[str, Any]:
    engine, optimizer = make_engine(stage, 'fp32', sgd=True)
    scaler = NativeScalerWithGradNormCount()
    kinds: list[Any] = [ModelEma, ModelEmaV2, ModelEmaV3, AveragedModel]
    found: dict[str, Any] = {k.__name__: message_of(lambda k=k: k(engine)) for k in kinds}
    found['deepcopy'] = message_of(lambda: copy.deepcopy(engine))
    if stage == 3:
        found.update({f'{k.__name__} module': message_of(lambda k=k: k(engine.module))
                      for k in kinds})  # fmt: skip
        found['update'] = message_of(lambda: ModelEma(make_model()).update(engine))
        return found
    own = [ModelEma(engine.module, 0.5), ModelEmaV2(engine.module, 0.5),
           ModelEmaV3(engine.module, 0.5)]  # fmt: skip
    mean = torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    swa = AveragedModel(engine.module, multi_avg_fn=mean)
    swa.update_parameters(engine.module)  # torch's first one copies
    weights = [masters(engine)]
    for step in range(2):
        train_step(engine, optimizer, scaler, step)
        weights.append(masters(engine))
        for average in own:
            average.update(engine.module)
        swa.update_parameters(engine.module)
    modules = [own[0].ema, own[1].module, own[2].module, swa.module]
    found['averages'] = [
        {n: p.flatten().tolist() for n, p in m.named_parameters() if n in weights[0]}
        for m in modules
    ]
    found['weights'] = weights
    # A copy is a module by itself, which trains and forgets without the engine.
    copied = copy.deepcopy(modules[1]).requires_grad_(True)
    copied(torch.ones(2, 12)).sum().backward()
    graded = copied.head.weight.grad is not None
    copied.zero_grad()
    found['copy'] = [graded, copied.head.weight.grad is None]
    engine.destroy()
    return found


def whole_tensors() -> dict[str, str]:
    """Optimizers that ZeRO cannot give pieces, by all ways to an engine."""
    config, told = make_config(DATA__BATCH_SIZE=8), {}

    def lamb(model: nn.Module) -> Any:
        return Lamb([p for p in model.parameters() if p.requires_grad], lr=0.01)

    for stage in range(4):
        model = make_model()
        told[f'initialize {stage}'] = message_of(
            lambda m=model, s=stage: initialize(config, m, lamb(m), zero_json(s))
        )
    model = make_model()
    engine = deepspeed.initialize(
        model=model, optimizer=lamb(model),
        config={
            **zero_json(1), 'train_micro_batch_size_per_gpu': 8,
            'zero_allow_untested_optimizer': True,
        },
    )[0]  # fmt: skip
    told['register'] = message_of(lambda: register(engine))
    return told
