"""The one table of settings that stand in both files: a ds_config key beside its yacs key. Pure.

`resolve` settles and fills values by this table, diagnostics name the other key by it, and
`markdown` prints it for the documentation.
"""

from __future__ import annotations

from dataclasses import dataclass

_WARMUP = 'TRAIN.WARMUP_LR'

# The rules. AGREE: both may state a number, and the numbers must be the same. ARGUMENT: likewise,
# of an optimizer that takes it. AUTO: only 'auto' takes the yacs value. COMPUTED: from several
# keys. NAMED: nothing is filled, and messages name both keys.
AGREE, ARGUMENT, AUTO, COMPUTED, NAMED = 'agree', 'argument', 'auto', 'computed', 'named'


@dataclass(frozen=True)
class Pair:
    """One setting.

    Attributes:
        pointer: JSON pointer of the ds_config's key.
        yacs: the yacs key.
        rule: how the two go together.
        source: where an open value comes from, {} for the images of a batch; '' for the yacs key.
        alike: numbers that mean the same.
    """

    pointer: str
    yacs: str
    rule: str = NAMED
    source: str = ''
    alike: tuple[int, ...] = (0,)

    @property
    def key(self) -> str:
        """The last key of the pointer."""
        return self.pointer.rpartition('/')[2]

    def origin(self, images: object = 'batch') -> str:
        """Where an open value comes from, in words."""
        return (self.source or self.yacs).format(images)


MICRO_BATCH = Pair('/train_micro_batch_size_per_gpu', 'DATA.BATCH_SIZE', AGREE)
ACCUMULATION = Pair('/gradient_accumulation_steps', 'TRAIN.ACCUMULATION_STEPS', AGREE, '', (0, 1))
BATCH = Pair('/train_batch_size', 'DATA.BATCH_SIZE', COMPUTED, 'micro-batch x accumulation x ranks')
CLIPPING = Pair('/gradient_clipping', 'TRAIN.CLIP_GRAD', AGREE)

PAIRS = (
    MICRO_BATCH,
    ACCUMULATION,
    BATCH,
    CLIPPING,
    Pair('/fp16/enabled', 'AMP_OPT_LEVEL', COMPUTED, 'AMP_OPT_LEVEL O2 with AMP_TYPE float16'),
    Pair('/bf16/enabled', 'AMP_OPT_LEVEL', COMPUTED, 'AMP_OPT_LEVEL O2 with AMP_TYPE bfloat16'),
    Pair('/torch_autocast/enabled', 'AMP_OPT_LEVEL', COMPUTED, 'AMP_OPT_LEVEL O1, the default'),
    Pair('/torch_autocast/dtype', 'AMP_TYPE', COMPUTED),
    Pair('/optimizer/params/lr', 'TRAIN.BASE_LR', ARGUMENT, 'TRAIN.BASE_LR x {} / 512'),
    Pair('/optimizer/params/weight_decay', 'TRAIN.WEIGHT_DECAY', ARGUMENT),
    Pair('/optimizer/params/betas', 'TRAIN.OPTIMIZER.BETAS', ARGUMENT),
    Pair('/optimizer/params/eps', 'TRAIN.OPTIMIZER.EPS', ARGUMENT),
    Pair('/optimizer/params/momentum', 'TRAIN.OPTIMIZER.MOMENTUM', ARGUMENT),
    Pair('/scheduler/params/warmup_max_lr', 'TRAIN.BASE_LR', AUTO, 'TRAIN.BASE_LR x {} / 512'),
    Pair('/scheduler/params/warmup_min_lr', _WARMUP, AUTO, f'{_WARMUP} x {{}} / 512'),
    Pair('/scheduler/params/warmup_min_ratio', _WARMUP, AUTO, f'{_WARMUP} / BASE_LR'),
    Pair('/scheduler/params/cos_min_ratio', 'TRAIN.MIN_LR', AUTO, 'TRAIN.MIN_LR / BASE_LR'),
    Pair('/fp16', 'AMP_OPT_LEVEL'),
    Pair('/bf16', 'AMP_OPT_LEVEL'),
    Pair('/torch_autocast', 'AMP_OPT_LEVEL'),
    Pair('/optimizer', 'TRAIN.OPTIMIZER'),
    Pair('/optimizer/type', 'TRAIN.OPTIMIZER.NAME'),
    Pair('/optimizer/params/max_grad_norm', 'TRAIN.CLIP_GRAD'),
    Pair('/scheduler', 'TRAIN.LR_SCHEDULER'),
    Pair('/scheduler/type', 'TRAIN.LR_SCHEDULER.NAME'),
)

# The yacs key that a message names beside a pointer.
COUNTERPARTS = {pair.pointer: pair.yacs for pair in PAIRS if pair.rule != AUTO}

# Open keys of /fp16: the loss scale of torch's GradScaler, in DeepSpeed's words.
GRAD_SCALER = {
    'loss_scale': 0, 'initial_scale_power': 16, 'loss_scale_window': 2000, 'hysteresis': 1,
    'min_loss_scale': 1,
}  # fmt: skip


def markdown() -> str:
    """The table for the documentation: the value that an open field ('auto', or absent) takes."""
    rows = [(pair.pointer, pair.origin()) for pair in PAIRS if pair.rule != NAMED]
    rows += [(f'/fp16/{key}', f"GradScaler's: {value}") for key, value in GRAD_SCALER.items()]
    rows.append(('/zero_optimization/stage', '1 with TRAIN.OPTIMIZER.USE_ZERO, else 0'))
    rows.append(('/zero_optimization/reduce_bucket_size', 'the trained elements, at most 5e8'))
    lines = (f'| `{pointer[1:].replace("/", ".")}` | {origin} |' for pointer, origin in rows)
    return '\n'.join(('| field | from |', '| --- | --- |', *lines))
