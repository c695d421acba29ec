"""The plain loop beside test_sequences.py: one process, the whole batch, tags kept in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tests.harness.model import micro_batch, module_dtype
from tests.harness.sequence_model import (
    CLIP,
    make_client,
    make_net,
    make_scheduler,
    settings_of,
    toggle,
)

# How far an engine may be off, as a share of the length of each step, of the norm of each gradient
# and of the norm of what an optimizer keeps. In fp32: 170 times the rounding (2**-24) of sums over
# micro-batches and ranks that are made in another order. In bf16 a gradient is rounded (2**-8) on
# its way here and not there, or the other way round, at most eight times: in two micro-batches,
# their sum, the ranks' two, theirs, the mean, and the loss's division; and what is off goes on in
# momentum and weights.
TOLERANCES = {'fp32': 1e-5, 'bf16': 8 * 2.0**-8, 'autocast_bf16': 8 * 2.0**-8}
_LAST_BIT = 2.0**-23  # of a weight in fp32


@dataclass
class Tag:
    """A tag, and what retention and a resume go by."""

    name: str
    epoch: int
    step: int | None
    accuracy: float
    accuracy_ema: float
    best: bool
    state: dict[str, Any]

    @property
    def position(self) -> tuple[int, int, int]:
        """Epochs that are done, and of one that is under way the updates in all, and in it."""
        if self.step is None:
            return self.epoch + 1, 0, 0
        return self.epoch, self.state['counts'][0], self.step

    def is_uneven(self) -> bool:
        """Whether parameters have counted other steps, as after freezing at stage 0."""
        counted = list(map(_counted, self.state['moments'].values()))
        return any(own != counted[0] for own in counted)


class Output:
    """The tags of an output directory, in the order of their saves."""

    def __init__(self) -> None:
        self.tags: dict[str, Tag] = {}
        self.latest: str | None = None
        self.gone: list[str] = []

    def save(self, tag: Tag, keep: Sequence[int], rewound: bool) -> None:
        self.tags.pop(tag.name, None)
        self.tags[tag.name] = tag
        if tag.best:
            return
        self.latest = tag.name
        counted = [t for t in self.tags.values() if not t.best]
        newest, best, every, steps = keep
        kept = _retained(counted, newest, best, every, steps, rewound)
        for name in [t.name for t in counted if t.name not in kept]:
            del self.tags[name]
            self.gone.append(name)

    def chosen(self, how: str, name: str) -> Tag | None:
        """What a resume takes: the newest, but 'rewind' and a best the tag of that name."""
        newest = self.tags[self.latest or next(reversed(self.tags))]
        named = self.tags.get(name)
        if how == 'rewind' or (how == 'tag' and named is not None and named.best):
            return named
        return newest


def _retained(
    tags: list[Tag], newest: int, best: int, every: int, steps: int, rewound: bool
) -> set[str]:
    """The names that stay, of tags of epochs and steps, the oldest save first."""
    epochs = [t for t in tags if t.step is None]
    inside = [t for t in tags if t.step is not None]
    first: dict[float, Tag] = {}
    for tag in epochs:
        first.setdefault(tag.accuracy, tag)
    later = sorted((t for t in tags if t.position > tags[-1].position), key=lambda t: t.position)
    kept = [tags[-1], *epochs[-newest:], *inside[max(0, len(inside) - steps) :]]
    kept += [first[accuracy] for accuracy in sorted(first, reverse=True)[:best]]
    kept += [t for t in epochs if every and t.epoch % every == 0]
    kept += later[-max(1, newest + steps) :] if rewound else later
    return {tag.name for tag in kept}


class Plain:
    """Does what a segment does, in plain PyTorch."""

    def __init__(self, segment: Any, kind: str) -> None:
        """Makes the model; ``kind`` is the optimizer's."""
        self.segment, self.kind = segment, kind
        self.dtype = module_dtype(segment.precision)
        self.autocast = segment.precision == 'autocast_bf16'
        self.net = make_net(segment.seed, segment.trained)
        self.updates = self.epoch = self.done = 0
        self.accuracy, self.rewound = 0.0, False
        self.tolerance, self.drift = TOLERANCES['fp32'], 0.0

    def make_optimizer(self) -> None:
        """As an engine does: low-precision weights, and masters of their values."""
        for p in self.net.parameters():
            p.data = p.data.to(self.dtype)
        self.low = {n: p for n, p in self.net.named_parameters() if p.requires_grad}
        self.masters: dict[str, nn.Parameter] = dict(self.low)
        if self.dtype != torch.float32:
            self.masters = {n: nn.Parameter(p.detach().float()) for n, p in self.low.items()}
        self.optimizer = make_client(self.kind, self.masters)
        self.scheduler = make_scheduler(self.optimizer)

    def make_average(self) -> None:
        self.ema: dict[str, torch.Tensor] | None = None
        self.decay, self.warmup, self.averaged = self.segment.decay, self.segment.warmup, 0
        if self.decay is not None:
            self.ema = {n: t.detach().clone() for n, t in self._averaged().items()}
        self.average_drift = self.drift

    def _averaged(self) -> dict[str, torch.Tensor]:
        return {**self.masters, **dict(self.net.named_buffers())}

    def update(self) -> float:
        """One update; returns the norm."""
        before, accumulation = _flat(self.masters), self.segment.accumulation
        for micro in range(accumulation):
            x, y = micro_batch(self.updates, micro, accumulation, 0, 1)
            with torch.autocast('cpu', torch.bfloat16, enabled=self.autocast):
                logits = self.net(x.to(self.dtype))
            loss = nn.functional.cross_entropy(logits.float(), y)
            (loss / accumulation).backward()
        for name, p in self.low.items():
            if self.masters[name] is not p:
                self.masters[name].grad = None if p.grad is None else p.grad.float()
        norm = float(nn.utils.clip_grad_norm_(self.masters.values(), CLIP))
        self.optimizer.step()
        self.updates, self.done = self.updates + 1, self.done + 1
        self.scheduler.step_update(self.updates)
        for p in (*self.net.parameters(), *self.masters.values()):
            p.grad = None
        self._round_masters()
        self.tolerance = max(self.tolerance, TOLERANCES[self.segment.precision])
        after = _flat(self.masters)
        # A share of the step, and the last bit of each weight.
        self.drift += float(self.tolerance * (after - before).norm() + _LAST_BIT * after.norm())
        self._average()
        return norm

    def _round_masters(self) -> None:
        for name, p in self.low.items():
            p.data.copy_(self.masters[name].data)

    @torch.no_grad()
    def _average(self) -> None:
        if self.ema is None or self.decay is None:
            return
        self.averaged += 1
        rising = 1 - self.averaged ** (-2 / 3) if self.warmup else 1.0  # as timm's
        for name, now in self._averaged().items():
            self.ema[name].lerp_(now.float(), 1 - min(rising, self.decay))
        most = max(self.average_drift, self.drift)
        self.average_drift = most + _LAST_BIT * float(_flat(self.ema).norm())

    def toggle(self, part: str, on: bool) -> None:
        toggle(self.net, part, on)

    def refuses_to_train(self) -> bool:
        """Whether a trained parameter is frozen, and it is not torch that would skip it."""
        skips = self.segment.stage == 0 and self.dtype == torch.float32
        return not skips and not all(p.requires_grad for p in self.low.values())

    def state(self) -> dict[str, Any]:
        """A copy of all state, by name."""
        named = dict(self.net.named_parameters())
        average = None
        if self.ema is not None:
            tensors = {n: t.clone() for n, t in self.ema.items()}
            average = {
                'of': [self.decay, self.averaged, self.warmup],
                'tensors': tensors,
                'off': self.average_drift,
            }
        return {
            'masters': {n: m.detach().clone() for n, m in self.masters.items()},
            'moments': {n: _kept(self.optimizer.state.get(m)) for n, m in self.masters.items()},
            'frozen': {n: p.detach().clone() for n, p in named.items() if n not in self.masters},
            'buffers': {n: b.clone() for n, b in self.net.named_buffers()},
            'requires': {n: p.requires_grad for n, p in named.items()},
            'lrs': {group['name']: group['lr'] for group in self.optimizer.param_groups},
            'ema': average,
            'counts': [self.updates, self.done],
            # of the plain loop alone
            'off': [self.tolerance, self.drift],
            'layout': [self.segment.precision, self.segment.stage],
        }

    def save(self, how: str, accuracy: float) -> Tag:
        """The tag of a save, 'epoch' or 'best', or 'step' where updates were made in the epoch."""
        self.accuracy = max(self.accuracy, accuracy)
        step = self.done if how == 'step' and self.done else None
        done, self.done = self.done, step or 0
        name = f'ckpt_epoch_{"best" if how == "best" else self.epoch}'
        name += f'_step_{step}' if step else ''
        found = self.accuracy
        tag = Tag(name, self.epoch, step, found, found / 2, how == 'best', self.state())
        if how == 'best':
            self.done = done
        elif step is None:
            self.epoch += 1
        return tag

    def refusal(self, tag: Tag) -> str | None:
        """The class of the error with which a tag is not loaded; None where it is."""
        moments, then = tag.state['moments'], tag.state['masters'].keys()
        now = self.masters.keys()
        if now - then or any(moments[name] for name in then - now):
            return 'CheckpointMismatch'  # it trains other parameters
        counted: dict[tuple[bool, bool], Any] = {}
        for name, master in self.masters.items() if self.segment.stage else ():
            # a group is one flat tensor
            own = _counted(moments[name])
            if counted.setdefault(settings_of(name, master), own) != own:
                return 'CheckpointMismatch'
        return None

    @torch.no_grad()
    def restore(self, tag: Tag) -> None:
        saved = tag.state
        values = {**saved['frozen'], **saved['masters']}
        for name, p in self.net.named_parameters():
            self.masters.get(name, p).copy_(values[name])
        self._round_masters()
        self.net.seen.copy_(saved['buffers']['seen'])
        for name, master in self.masters.items():
            self.optimizer.state.pop(master, None)
            if saved['moments'][name]:
                self.optimizer.state[master] = {
                    k: v.clone() if isinstance(v, torch.Tensor) else torch.tensor(v)
                    for k, v in saved['moments'][name].items()
                }
        self.updates = saved['counts'][0]
        self.scheduler.step_update(self.updates)
        self.tolerance, self.drift = saved['off']
        self._add_rounding({n: values[n] for n in saved['masters'] if n not in self.masters})
        self.epoch, self.done = tag.epoch + (tag.step is None), tag.step or 0
        self.accuracy = tag.accuracy

    @torch.no_grad()
    def restore_average(self, tag: Tag) -> None:
        average = tag.state['ema']
        if self.ema is None or average is None:
            return
        self.decay, self.averaged, self.warmup = average['of']
        self.average_drift = average['off']
        for name, own in self.ema.items():
            own.copy_(average['tensors'][name])

    @torch.no_grad()
    def start_from(self, tag: Tag) -> None:
        """As load_pretrained, before there is an optimizer."""
        values = _weights(tag.state)
        for name, p in self.net.named_parameters():
            p.copy_(values[name].float())
        self.net.seen.copy_(tag.state['buffers']['seen'])
        self.tolerance, self.drift = tag.state['off']
        self._add_rounding(values)

    def _add_rounding(self, values: dict[str, torch.Tensor]) -> None:
        """Masters that are a little off may be rounded to neighbours: one in four, at most."""
        dtypes = {self.dtype, *(t.dtype for t in values.values())}
        if values and dtypes != {torch.float32}:
            self.drift += 2.0**-8 * float(_flat(values).norm())


def _kept(state: Any) -> dict[str, Any]:
    """What an optimizer keeps of a parameter: tensors, and numbers."""
    return {
        k: v.detach().clone() if isinstance(v, torch.Tensor) and v.dim() else float(v)
        for k, v in (state or {}).items()
        if v is not None
    }


def _counted(moments: dict[str, Any]) -> Any:
    """Which tensors are kept of a parameter, and what was counted."""
    numbers = {k: v for k, v in moments.items() if not isinstance(v, torch.Tensor)}
    return sorted(moments), numbers


def _weights(saved: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights of a tag: what the module computed with, and at stage 3 the masters."""
    precision, stage = saved['layout']
    dtype = torch.float32 if stage == 3 else module_dtype(precision)
    return {**saved['frozen'], **{n: m.to(dtype) for n, m in saved['masters'].items()}}


def _flat(tensors: dict[str, Any]) -> torch.Tensor:
    return torch.cat([t.detach().double().reshape(-1) for t in tensors.values()])
