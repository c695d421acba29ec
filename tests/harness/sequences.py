"""Random sequences of training, freezing, saving and resuming, and what a plain loop says of each.

    sequence = draw(seed=7, number=12, sizes=(1, 2), pythons=1)

A sequence is a list of segments, each with an engine of its own of some layout, in a fresh process,
and what is done with it. While a sequence is drawn, a plain loop does the same; what it saw is in
`Segment.expected`. Sequence ``number`` of a seed is the same however many others are drawn.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from tests.harness.plain_sequence import Output, Plain
from tests.harness.sequence_model import OPTIMIZERS, PARTS


@dataclass
class Segment:
    """An engine, and what is done with it.

    Attributes:
        ranks, stage, zero, precision, accumulation: the layout; ``zero`` is more of ZeRO's JSON.
        python: which of the interpreters runs it; 0 is the one that draws.
        trained: the parts that require a gradient when the engine is made.
        seed: of its first weights.
        keep: SAVE_CKPT_NUM, KEEP_BEST, KEEP_EVERY and KEEP_STEPS.
        background: CHECKPOINT.ASYNC.
        decay, warmup: of the average; there is none where the decay is None.
        begin: what comes before the average is made: [], ['resume', ...] or ['pretrained', tag].
        operations: the rest, a list of words each: see `_do`.
        expected: what the plain loop saw after ``begin`` and after each operation.
    """

    ranks: int
    stage: int
    zero: dict[str, Any]
    precision: str
    accumulation: int
    python: int
    seed: int
    keep: list[int]
    background: bool
    warmup: bool
    decay: float | None = None
    trained: list[str] = field(default_factory=list)
    begin: list[Any] = field(default_factory=list)
    operations: list[list[Any]] = field(default_factory=list)
    expected: list[Seen] = field(default_factory=list, repr=False)

    def orders(self) -> dict[str, Any]:
        """What a rank needs to know, as JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != 'expected'}


@dataclass
class Sequence:
    """Attributes: seed, number: what it was drawn from; kind: of the optimizer; segments."""

    seed: int
    number: int
    kind: str
    segments: list[Segment]

    def text(self) -> str:
        """How to run it alone, and all that it does."""
        alone = (
            f'INTERNVL_DS_SEQUENCE_SEED={self.seed} INTERNVL_DS_SEQUENCE={self.number} '
            f'python -m pytest tests/whole/test_sequences.py'
        )
        return '\n'.join([f'{alone}  # {self.kind}', *(f'  {s}' for s in self.segments)])


@dataclass
class Seen:
    """What there is after an operation.

    Attributes:
        error: the class of the error with which it is refused; None where it is done.
        returned: of a load: max_accuracy, max_accuracy_ema and START_EPOCH.
        source: the tag that a load has taken.
        saved: the tag that a save has written.
        norms: of each update's gradient, before clipping.
        tags, latest: the names in OUTPUT, and what `latest` says.
        state: `Plain.state`, where `shows_state`.
    """

    error: str | None = None
    returned: list[float] = field(default_factory=list)
    source: str | None = None
    saved: str | None = None
    norms: list[float] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    latest: str | None = None
    state: dict[str, Any] = field(default_factory=dict)


def shows_state(words: list[Any], error: str | None, last: bool) -> bool:
    """Whether all state is looked at after an operation, which takes as long as an update."""
    return last or error is not None or words[:1] not in ([], ['train'], ['toggle'])


def draw(seed: int, number: int, sizes: tuple[int, ...] = (1, 2), pythons: int = 1) -> Sequence:
    """Draws a sequence, and has the plain loop do it.

    Args:
        seed, number: what it is drawn from.
        sizes: numbers of ranks to draw from.
        pythons: how many interpreters there are.
    """
    rng = random.Random(f'{seed} {number}')
    sequence = Sequence(seed, number, rng.choice(list(OPTIMIZERS)), [])
    output = Output()
    trained = [part for part in PARTS if part == 'head' or rng.random() < 0.75]
    averages = rng.random() < 0.6
    for index in range(rng.choice((1, 2, 2, 3, 3))):
        segment = _draw_layout(rng, sizes, pythons)
        if averages and rng.random() < 0.9:
            segment.decay = rng.choice((0.5, 0.8, 0.9))
        if any(tag.is_uneven() for tag in output.tags.values()):
            segment.zero.pop('sub_group_size', None)  # `Plain.refusal` knows whole groups only
        if index and output.tags:
            segment.begin, trained = _draw_begin(rng, output, trained)
        segment.trained = trained
        sequence.segments.append(segment)
        _run(rng, segment, sequence.kind, output)
    return sequence


def _draw_layout(rng: random.Random, sizes: tuple[int, ...], pythons: int) -> Segment:
    stage, zero = rng.randrange(4), {}
    if stage == 3:
        zero['stage3_param_persistence_threshold'] = rng.choice((0, 10, 1000))
        if rng.random() < 0.3:
            zero['sub_group_size'] = 60
        if rng.random() < 0.2:
            zero['offload_param'] = {'device': 'cpu'}
    if stage and rng.random() < 0.2:
        zero['offload_optimizer'] = {'device': 'cpu'}
    return Segment(
        ranks=sizes[int(rng.random() * len(sizes))],
        stage=stage,
        zero=zero,
        precision=rng.choice(('fp32', 'fp32', 'fp32', 'fp32', 'bf16', 'autocast_bf16')),
        accumulation=rng.choice((1, 1, 2)),
        python=_other_python(rng.random(), pythons),
        seed=rng.randrange(1000),
        keep=[rng.randint(1, 3), rng.choice((0, 0, 1)), rng.choice((0, 0, 2)), rng.randint(0, 2)],
        background=rng.random() < 0.3,
        warmup=rng.random() < 0.5,
    )


def _other_python(drawn: float, pythons: int) -> int:
    """Mostly the one that runs; each other one's first job takes seconds."""
    return 1 + int(drawn / 0.3 * (pythons - 1)) if pythons > 1 and drawn < 0.3 else 0


def _draw_begin(
    rng: random.Random, output: Output, trained: list[str]
) -> tuple[list[Any], list[str]]:
    """How a segment goes on from what is there, and the parts that it trains."""
    if rng.random() < 0.25:  # a part is frozen or unfrozen, with the engine made anew
        part = rng.choice(PARTS[:-1])
        other = [p for p in PARTS if (p in trained) != (p == part)]
        if rng.random() < 0.7:
            return ['pretrained', rng.choice(list(output.tags))], other
        return _draw_resume(rng, output), other  # refused
    return _draw_resume(rng, output), trained


def _draw_resume(rng: random.Random, output: Output) -> list[Any]:
    if output.gone and rng.random() < 0.05:
        return ['resume', 'rewind', rng.choice(output.gone)]
    how = rng.choice(('auto', 'auto', 'output', 'tag', 'rewind', 'rewind'))
    return ['resume', how, rng.choice(list(output.tags)) if how in ('tag', 'rewind') else '']


def _draw_operations(rng: random.Random, output: Output) -> Iterator[list[Any]]:
    for _ in range(rng.randint(2, 4)):
        what = rng.choice(('train', 'train', 'train', 'save', 'save', 'toggle', 'resume'))
        if what == 'train':
            yield ['train', rng.randint(1, 2)]
        elif what == 'save':
            how = rng.choice(('epoch', 'epoch', 'epoch', 'step', 'best'))
            yield ['save', how, float(rng.randint(1, 20))]
        elif what == 'toggle':
            yield ['toggle', rng.choice(PARTS[:-1]), rng.random() < 0.6]
        elif output.tags:
            yield _draw_resume(rng, output)
    if rng.random() < 0.8:
        yield ['save', 'epoch', float(rng.randint(1, 20))]


def _run(rng: random.Random, segment: Segment, kind: str, output: Output) -> None:
    """Draws what a segment does, and does it."""
    begin, plain = segment.begin, Plain(segment, kind)
    if begin[:1] == ['pretrained']:
        plain.start_from(output.tags[begin[1]])
    plain.make_optimizer()
    seen = _resume(begin, plain, output) if begin[:1] == ['resume'] else Seen()
    plain.make_average()
    _finish(seen, plain, output, begin)
    segment.expected.append(seen)
    for words in _draw_operations(rng, output):
        segment.operations.append(words)
        segment.expected.append(_do(words, plain, output))
    if segment.operations:
        segment.expected[-1].state = plain.state()


def _do(words: list[Any], plain: Plain, output: Output) -> Seen:
    """['train', updates], ['toggle', part, on], ['save', how, accuracy] or ['resume', how, tag]."""
    seen = Seen()
    if words[0] == 'train' and plain.refuses_to_train():
        plain.net.seen += 1  # of the forward before
        seen.error = 'ConfigError'
    elif words[0] == 'train':
        seen.norms = [plain.update() for _ in range(words[1])]
    elif words[0] == 'toggle':
        plain.toggle(words[1], words[2])
    elif words[0] == 'save':
        tag = plain.save(words[1], words[2])
        output.save(tag, plain.segment.keep, plain.rewound)
        seen.saved = tag.name
    else:
        seen = _resume(words, plain, output)
    return _finish(seen, plain, output, words)


def _resume(words: list[Any], plain: Plain, output: Output) -> Seen:
    tag = output.chosen(words[1], words[2])
    plain.rewound = words[1] == 'rewind'
    if tag is None:
        return Seen(error='CheckpointNotFound')
    refused = plain.refusal(tag)
    if refused is not None:
        return Seen(error=refused)
    plain.restore(tag)
    averages = plain.segment.decay is not None
    returned = [tag.accuracy, tag.accuracy_ema if averages else 0.0, plain.epoch]
    return Seen(source=tag.name, returned=returned)


def _finish(seen: Seen, plain: Plain, output: Output, words: list[Any]) -> Seen:
    if seen.source is not None:
        plain.restore_average(output.tags[seen.source])
    seen.tags, seen.latest = sorted(output.tags), output.latest
    if shows_state(words, seen.error, last=False):
        seen.state = plain.state()
    return seen
