"""What ranks do in test_elastic.py: a model with all that moves between layouts."""

from __future__ import annotations

import hashlib
import logging
from typing import Any

import deepspeed
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

from internvl_ds import (
    NativeScalerWithGradNormCount,
    initialize,
    load_checkpoint,
    load_ema_checkpoint,
    reduce_tensor,
    save_checkpoint,
)
from internvl_ds.dist.rendezvous import rank, world_size
from internvl_ds.engine.ema import ShardedEma
from internvl_ds.engine.registry import wrapper_of
from internvl_ds.errors import InternvlDsError
from tests.harness.model import (
    CLASSES,
    FEATURES,
    make_config,
    micro_batch,
    module_dtype,
    precision_values,
)
from tests.harness.whole_state import whole_state

logger = logging.getLogger('test')
UPDATES, MORE = 3, 5


class Norm(nn.BatchNorm1d):
    """BatchNorm whose statistics stay: those of a share of the batch depend on the ranks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = (self.running_mean, self.running_var, self.weight, self.bias)
        return nn.functional.batch_norm(x.float(), *(p.float() for p in parts)).to(x.dtype)


class Net(nn.Module):
    """A frozen layer, a tied weight, BatchNorm's buffers, sizes that divide by nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, 13)
        self.norm = Norm(13)
        self.frozen = nn.Linear(13, 13)
        self.tied = nn.Linear(13, 13, bias=False)
        self.again = nn.Linear(13, 13, bias=False)
        self.again.weight = self.tied.weight
        self.head = nn.Linear(13, CLASSES)
        self.scale = nn.Parameter(torch.tensor([0.7]))
        self.frozen.requires_grad_(False)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)
        self.norm.num_batches_tracked.fill_(int(torch.randint(1000, ())))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.norm(self.stem(x)))
        x = self.again(torch.tanh(self.tied(x + self.frozen(x))))
        return self.head(x * self.scale)


def groups_of(model: nn.Module, lr: float, frozen: bool = False) -> list[dict[str, Any]]:
    """Four settings of (lr, weight decay), one group per tensor as the original builds them."""
    groups = []
    for name, p in model.named_parameters():
        if p.requires_grad or frozen:
            decay = 0.0 if p.dim() == 1 else 0.05
            layer_lr = lr * (0.5 if name.startswith(('stem', 'norm')) else 1.0)
            groups.append({'params': [p], 'lr': layer_lr, 'weight_decay': decay, 'name': name})
    return groups


def make_client(model: nn.Module, kind: str, lr: float = 1e-2) -> torch.optim.Optimizer:
    groups = groups_of(model, lr, frozen=kind == 'adamw, frozen in its groups')
    if kind == 'sgd':
        return torch.optim.SGD(groups, lr=lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr=lr)


def make_scheduler(client: torch.optim.Optimizer) -> CosineLRScheduler:
    return CosineLRScheduler(
        client, t_initial=30, warmup_t=2, warmup_lr_init=1e-4, t_in_epochs=False
    )


class Run:
    """An engine of a stage and precision, and how to train, save and load it."""

    def __init__(
        self, stage: int, output: str = '', seed: int = 0, precision: str = 'fp32',
        kind: str = 'adamw', batch_size: int | None = None, **zero: Any,
    ) -> None:  # fmt: skip
        self.config = make_config(
            output, DATA__BATCH_SIZE=batch_size or 16 // world_size(), SAVE_CKPT_NUM=0,
            **precision_values(precision),
        )  # fmt: skip
        self.dtype = module_dtype(precision)
        torch.manual_seed(seed)
        model = Net()
        client = make_client(model, kind)
        self.scheduler = make_scheduler(client)
        if stage == 3:
            zero = {'stage3_param_persistence_threshold': 10, **zero}
        zero['stage'] = stage
        json = {'zero_optimization': zero, 'zero_force_ds_cpu_optimizer': False}
        self.engine, self.optimizer = initialize(
            self.config, model, client, json, lr_scheduler=self.scheduler
        )
        self.scaler = NativeScalerWithGradNormCount()

    def steps(self, first: int, last: int) -> list[float]:
        """Updates first..last-1; returns the mean loss of each over the whole batch."""
        seen = []
        for step in range(first, last):
            x, y = micro_batch(step, 0, 1, rank(), world_size())
            logits = self.engine(x.to(self.dtype)).float()
            loss = nn.functional.cross_entropy(logits, y)
            self.scaler(loss, self.optimizer, 5.0)
            seen.append(float(reduce_tensor(loss)))
        return seen

    def save(self, epoch: int) -> str:
        return save_checkpoint(
            self.config, epoch, self.engine, 50.0, self.optimizer, self.scheduler, self.scaler,
            logger,
        )  # fmt: skip

    def load(self, resume: str) -> float:
        config = self.config.clone()
        config.defrost()
        config.MODEL.RESUME = str(resume)
        self.config = config
        return load_checkpoint(
            config, self.engine, self.optimizer, self.scheduler, self.scaler, logger
        )

    def settings(self) -> dict[str, list[float]]:
        """Parameter -> the lr, weight decay and betas of its group."""
        return {
            name: [group['lr'], group['weight_decay'], *group.get('betas', ())]
            for group in self.engine.basic_optimizer.param_groups
            for name in group['param_names']
        }


def full_state(engine: Any, keys: tuple[str, ...]) -> dict[str, list[Any]]:
    """Parameter -> digests of its whole master and moments, and its step, on every rank."""
    masters, moments = whole_state(engine)
    found: dict[str, list[Any]] = {}
    for name, p in engine.module.named_parameters():
        if p.requires_grad:
            tensors = [masters[name], *(moments[name][key] for key in keys)]
            digests = [hashlib.sha256(t.numpy().tobytes()).hexdigest() for t in tensors]
            found[name] = [*digests, moments[name].get('step', 0.0) if 'exp_avg' in keys else 0.0]
    return found


ADAM = ('exp_avg', 'exp_avg_sq')


def buffers_of(run: Run) -> dict[str, Any]:
    module = run.engine.module
    norm = module.norm
    frozen = module.frozen.weight
    with _gathered(frozen):
        values = frozen.detach().float().flatten().tolist()
    return {
        'norm': [norm.running_mean.tolist(), norm.running_var.tolist()],
        'batches': int(norm.num_batches_tracked),
        'frozen': values,
        'tied': module.again.weight is module.tied.weight,
    }


def _gathered(parameter: Any) -> Any:
    return deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, 'ds_id'))


def save_layouts(
    root: str, stages: list[int], precision: str = 'fp32', kind: str = 'adamw'
) -> dict[str, Any]:
    """For each stage: three updates, a save, and what the run that does not stop sees next."""
    found = {}
    for stage in stages:
        output = f'{root}/{world_size()}x{stage}{precision}'
        run = Run(stage, output, precision=precision, kind=kind)
        run.steps(0, UPDATES)
        found[str(stage)] = {
            'path': run.save(UPDATES),
            'state': full_state(run.engine, ADAM),
            'settings': run.settings(),
            'fixed': buffers_of(run),
            'losses': run.steps(UPDATES, UPDATES + MORE),
        }
        run.engine.destroy()
    return found


def load_layouts(loads: list[Any], precision: str = 'fp32', kind: str = 'adamw') -> list[Any]:
    """Each of (tag, stage, further ZeRO settings) into a fresh run of other weights."""
    found = []
    for path, stage, zero in loads:
        run = Run(stage, seed=9, precision=precision, kind=kind, **zero)
        said: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record, said=said: said.append(record.getMessage())  # type: ignore[method-assign]
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        accuracy = run.load(path)
        logger.removeHandler(handler)
        found.append(
            {
                'said': [t for t in said if ': from ' in t or 'global batch' in t],
                'accuracy': accuracy,
                'epoch': run.config.TRAIN.START_EPOCH,
                'counts': [run.engine.global_steps, run.engine.skipped_steps],
                'state': full_state(run.engine, ADAM),
                'settings': run.settings(),
                'fixed': buffers_of(run),
                'losses': run.steps(UPDATES, UPDATES + MORE),
            }
        )
        run.engine.destroy()
    return found


def load_errors(root: str, path: str, stage: int) -> dict[str, str]:
    """What cannot go on from a tag, and that nothing has changed then."""
    found = {}

    def attempt(name: str, change: Any, kind: str = 'adamw') -> None:
        torch.manual_seed(3)
        model = Net()
        change(model)
        client = make_client(model, kind)
        config = make_config(root, DATA__BATCH_SIZE=16 // world_size())
        engine, optimizer = initialize(
            config, model, client, {'zero_optimization': {'stage': stage}}
        )
        before = _digest(engine)
        config.defrost()
        config.MODEL.RESUME = path
        try:
            load_checkpoint(config, engine, optimizer, None, None, logger)
            found[name] = 'loaded'
        except InternvlDsError as error:
            found[name] = f'{type(error).__name__}: {error}'
        assert _digest(engine) == before, name
        engine.destroy()

    def another_head(model: Net) -> None:
        model.head = nn.Linear(13, CLASSES + 1)

    def without_scale(model: Net) -> None:
        del model.scale

    def with_more(model: Net) -> None:
        model.more = nn.Linear(3, 3)

    def thawed(model: Net) -> None:
        model.frozen.requires_grad_(True)

    def frozen(model: Net) -> None:
        model.stem.requires_grad_(False)

    attempt('shape', another_head)
    attempt('extra', without_scale)
    attempt('missing', with_more)
    attempt('thawed', thawed)
    attempt('frozen', frozen)
    attempt('optimizer', lambda model: None, 'sgd')
    return found


def _digest(engine: Any) -> str:
    digest = hashlib.sha256()
    for tensor in wrapper_of(engine).masters().values():
        digest.update(tensor.detach().numpy().tobytes())
    digest.update(str(len(engine.basic_optimizer.state)).encode())
    for tensor in engine.module.norm.buffers():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def low_weights_are_rounded_masters(engine: Any, dtype: torch.dtype) -> bool:
    """Whether the module computes with its masters, rounded to nearest."""
    parameters = dict(engine.module.named_parameters())
    for name, master in whole_state(engine)[0].items():
        low = parameters[name]
        with _gathered(low):
            if low.dtype != dtype or not torch.equal(low, master.to(dtype)):
                return False
    return True


def move_precisions(root: str) -> dict[str, Any]:
    """Tags of four precisions, each into engines of other stages and precisions."""
    sources = {}
    for precision, stage in (('fp32', 2), ('bf16', 1), ('fp16', 2), ('autocast_fp16', 3)):
        run = Run(stage, f'{root}/{precision}', precision=precision)
        run.steps(0, UPDATES)
        sources[precision] = [run.save(0), full_state(run.engine, ADAM)]
        run.engine.destroy()
    found: dict[str, Any] = {}
    for source, (path, state) in sources.items():
        for precision, stage, dtype in (
            ('fp32', 1, torch.float32), ('fp32', 0, torch.float32),
            ('bf16', 3, torch.bfloat16), ('bf16', 2, torch.bfloat16),
            ('bf16', 0, torch.bfloat16), ('fp16', 1, torch.float16), ('fp16', 3, torch.float16),
            ('fp16', 0, torch.float16), ('autocast_fp16', 1, torch.float32),
        ):  # fmt: skip
            run = Run(stage, seed=9, precision=precision)
            run.load(path)
            engine = run.engine
            found[f'{source} -> {precision} {stage}'] = [
                full_state(engine, ADAM) == state,
                low_weights_are_rounded_masters(engine, dtype),
            ]
            engine.destroy()
    return found


def move_averages(root: str) -> dict[str, Any]:
    """A sharded EMA of every stage into every other, and into one of other groups."""
    found = {}
    for stage in range(4):
        run = Run(stage, f'{root}/ema{stage}')
        ema = ShardedEma(run.engine, 0.9)
        for step in range(2):
            run.steps(step, step + 1)
            ema.update()
        path = save_checkpoint(
            run.config, 0, run.engine, 50.0, run.optimizer, run.scheduler, run.scaler, logger,
            model_ema=ema, ema_decay=0.9,
        )  # fmt: skip
        with ema.swapped_in():
            was = full_state(run.engine, ())
        run.engine.destroy()
        for target in range(4):
            other = Run(target, seed=9, kind='sgd' if target == stage else 'adamw')
            average = ShardedEma(other.engine, 0.5)
            other.config.defrost()
            other.config.MODEL.RESUME = path
            load_ema_checkpoint(other.config, average, logger)
            with average.swapped_in():
                got = full_state(other.engine, ())
            found[f'{stage} -> {target}'] = [got == was, average.decay, average.num_updates]
            other.engine.destroy()
    return found
