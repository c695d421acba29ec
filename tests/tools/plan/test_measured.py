"""What a plan says, beside what 2 real ranks allocate: three timm models at ZeRO stages 0 to 3."""

import pytest
import timm
import torch

from internvl_ds.config.ds import resolve as ds
from internvl_ds.tools.plan.memory_planner import MemoryPlanner
from internvl_ds.tools.plan.static_memory import checkpoint_bytes, snapshot_bytes
from tests.harness.ranks import run_ranks
from tests.tools.plan import measuring
from tests.tools.plan.measuring import make_config

_SHARED = 'MODEL.TYPE timm MODEL.NUM_CLASSES 10 MODEL.DROP_PATH_RATE 0.0'
# Wide and shallow: what Python keeps for each module is not planned.
MODELS = {
    'vit': f'{_SHARED} MODEL.NAME vit_small_patch16_224 MODEL.KWARGS.depth 4 DATA.IMG_SIZE 64 '
    'DATA.BATCH_SIZE 4 AMP_OPT_LEVEL O2 AMP_TYPE bfloat16 TRAIN.DISTILL.TEACHER resnet18',
    'resnet': f'{_SHARED} MODEL.NAME resnet18 DATA.IMG_SIZE 64 DATA.BATCH_SIZE 8 AMP_OPT_LEVEL O0',
    'convnext': f'{_SHARED} MODEL.NAME convnext_nano MODEL.KWARGS.depths [1,1,1,1] '
    'DATA.IMG_SIZE 64 DATA.BATCH_SIZE 8 AMP_OPT_LEVEL O0 TRAIN.ACCUMULATION_STEPS 2 '
    'TRAIN.EMA.ENABLE True',
}
_TINY = f'{_SHARED} MODEL.NAME vit_tiny_patch16_224 MODEL.KWARGS.depth 1 DATA.IMG_SIZE 32'
_SAVED = 'convnext'  # has an average
_RANKS = 2


def ds_config(stage):
    """Buckets that a model fills more than once, and that hold its largest parameter."""
    zero = {'stage': stage, 'reduce_bucket_size': 2_500_000} if stage else {'stage': 0}
    return {'zero_optimization': zero}


@pytest.fixture(scope='module')
def measured(tmp_path_factory):
    """Model and stage -> what each rank found. One launch: most of its time is its start."""
    root = tmp_path_factory.mktemp('measured')
    weights = root / 'teacher.pth'
    torch.save(timm.create_model('resnet18', num_classes=10).state_dict(), weights)
    paths = {'vit': f' TRAIN.DISTILL.PRETRAINED {weights}'}
    # What a process allocates once and keeps, such as buffers and kernels, comes first. oneDNN
    # keeps a kernel for each shape and precision of a product: of bf16 ones half a MiB each, on
    # CPUs that have instructions for it (10.8 MB for the 16 shapes of vit).
    once = [(f'{_TINY} DATA.BATCH_SIZE 2 AMP_OPT_LEVEL O0', 3)]
    once += [(opts + paths.get(model, ''), 0) for model, opts in MODELS.items()]
    keys = [(model, stage) for model in MODELS for stage in range(4)]
    cases = [[opts.split(), ds_config(stage)] for opts, stage in once]
    for model, stage in keys:
        output = ['OUTPUT', f'{root}/{stage}'] if model == _SAVED else []
        opts = MODELS[model] + paths.get(model, '')
        cases.append([[*opts.split(), *output], ds_config(stage)])
    of_ranks = run_ranks(measuring.measure, _RANKS, root, timeout=540, cases=cases)
    of_cases = list(zip(*of_ranks, strict=True))[len(once) :]
    return dict(zip(keys, of_cases, strict=True))


@pytest.mark.ranks
@pytest.mark.slow
def test_states_are_within_5_percent_and_what_comes_and_goes_within_20(measured):
    """Activations by themselves after the forward pass; at the most with gradients and buffers."""
    planners = {m: MemoryPlanner(make_config(o.split()), gpu=False) for m, o in MODELS.items()}
    lines, wrong = ['planned / measured: states, activations, at most, update'], []
    for (model, stage), of_ranks in measured.items():
        resolved = ds.resolve_or_raise(ds_config(stage), make_config(MODELS[model].split()), _RANKS)
        planner = planners[model]
        need, scheme = (
            planner.need(resolved, _RANKS, recompute=False),
            planner.scheme(resolved, _RANKS),
        )
        saved = planner.step_of(scheme, recompute=False).saved
        if stage == 3:  # which has gathered a model of this size by then
            sizes = [n for group in planner.sizes.groups for n in group]
            saved += scheme.weight_bytes * sum(n for n in sizes if n > scheme.persistence)
        most = {key: max(found[key] for found in of_ranks) for key in of_ranks[0]}
        ratios = [
            need.static.total / most['states'],
            saved / most['forward'],
            (need.parts.total - need.static.total) / most['backward'],
            need.update / most['step'],
        ]
        lines.append(f'{model} {stage}: ' + ' '.join(f'{ratio:.3f}' for ratio in ratios))
        if abs(ratios[0] - 1) > 0.05 or any(abs(ratio - 1) > 0.2 for ratio in ratios[1:]):
            wrong.append(lines[-1])
    print(*lines, sep='\n')
    assert not wrong, lines


@pytest.mark.ranks
@pytest.mark.slow
def test_a_tag_is_as_large_as_planned(measured):
    config = make_config(MODELS[_SAVED].split())
    planner = MemoryPlanner(config)
    for stage in range(4):
        scheme = planner.scheme(ds.resolve_or_raise(ds_config(stage), config, _RANKS), _RANKS)
        planned = checkpoint_bytes(planner.sizes, scheme, ema=True)
        assert planned == pytest.approx(measured[_SAVED, stage][0]['tag'], rel=0.02)


@pytest.mark.ranks
@pytest.mark.slow
def test_page_locked_copies_of_background_saves_are_as_large_as_planned(measured):
    config = make_config(MODELS[_SAVED].split())
    planner = MemoryPlanner(config, gpu=True)
    for stage in range(4):
        scheme = planner.scheme(ds.resolve_or_raise(ds_config(stage), config, _RANKS), _RANKS)
        planned = snapshot_bytes(planner.sizes, scheme, ema=True, on_host=_RANKS)
        taken = sum(found['locked'] for found in measured[_SAVED, stage])
        print(stage, planned, taken)
        assert planned == pytest.approx(taken, rel=0.02)
