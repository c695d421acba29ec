"""The scaler bridge on 2 real ranks, against a plain single-process PyTorch loop."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from internvl_ds import NativeScalerWithGradNormCount, get_grad_norm
from internvl_ds.engine import grad_norm, grad_scaler
from internvl_ds.errors import EngineNotFound, InternvlDsError
from internvl_ds.zero.loss_scale import LossScale
from tests.engine import scaling, stepping
from tests.harness.counts import share
from tests.harness.model import OFFLOAD, OLD_DEEPSPEED, make_model, trained
from tests.harness.plain_loop import reference
from tests.harness.ranks import run_ranks

STAGES = trained([0, 1, 2, 3, OFFLOAD])
ACCUMULATING = [('fp16', [2, 3] if OLD_DEEPSPEED else [1, 2, 3]), ('bf16', [2, 3])]
STEPS = 20
PRECISIONS = ['fp32', 'fp16', 'bf16', 'autocast_fp16', 'autocast_bf16']

# Half the distance of two neighbours, as a share of the smaller: how far rounding may be off.
ROUNDING = {'fp16': 2.0**-11, 'bf16': 2.0**-8}


ADAM_STEP = 1e-2  # its lr


def tolerances(precision: str) -> tuple[float, float]:
    """How far norms, and the way that the weights have gone, may be off the plain loop's.

    In fp32 1e-5: sums in another order. Else a gradient element is rounded on its way here and not
    in the reference, or the other way round, at most eight times: in four micro-batches, their sum,
    the ranks' sum, the mean, and the loss's division. Half of these err upwards and half downwards,
    so the norm over all elements is off by less than half of it.

    Adam moves an element by about lr whatever its gradient's size, so a rounded gradient turns into
    an error of the same relative size per step for most elements, and a whole step for those whose
    gradient is near zero: bounded as a share of the way that the weights have gone, at twice the
    norm's, and one element by a step. A dummy first step (DeepSpeed's at stage 0) shifts the first
    update alone by 26 %.
    """
    if precision == 'fp32':
        return 1e-5, 1e-5
    rounding = ROUNDING[precision[-4:]]
    return 4 * rounding, 8 * rounding


def _distance(a: dict, b: dict) -> float:
    names = a.keys()
    return math.dist([v for n in names for v in a[n]], [v for n in names for v in b[n]])


def _start() -> dict:
    return {n: p.detach().flatten().tolist() for n, p in make_model().named_parameters()}


def _require_weights(
    precision: str, got: dict, reference_weights: dict, where: object, step: float = 0.0
) -> None:
    wanted = {n: reference_weights[n] for n in got}
    way = _distance(wanted, {n: _start()[n] for n in got})
    off = _distance(got, wanted)
    assert off <= tolerances(precision)[1] * way + step, (where, off / way)


@pytest.mark.parametrize('skipped', [True, False])
def test_a_skipped_update_moves_the_loss_scale_and_is_told_to_the_schedule(monkeypatch, skipped):
    """The order of one update, without an engine."""
    calls, scale = [], LossScale(scale=64.0, growth_interval=1)
    engine = SimpleNamespace(
        was_step_applied=lambda: not skipped, gradient_accumulation_steps=lambda: 1
    )
    accumulation = SimpleNamespace(finish=lambda count: [torch.zeros(())])
    wrapper = SimpleNamespace(
        scale=scale,
        step=lambda clip: torch.tensor(scale.scale),
        push_scale=lambda: calls.append(('push', scale.scale)),
    )
    registration = SimpleNamespace(wrapper=wrapper, overflow_limit=0, accumulation=accumulation)
    for name, stand_in in {
        'registration_of': lambda engine: registration,
        'step_scheduler': lambda engine, was_skipped: calls.append(('schedule', was_skipped)),
    }.items():
        monkeypatch.setattr(grad_scaler, name, stand_in)
    scaler = NativeScalerWithGradNormCount()
    assert scaler._update(engine, 0.0) == 64.0  # the scale of this update, not of the next
    assert calls == [('push', 32.0 if skipped else 128.0), ('schedule', skipped)]
    assert scaler.step_was_skipped is skipped
    assert scaler._watch.in_a_row == skipped
    assert [scale for _, _, scale in scaler._watch._updates] == [64.0]  # the error would show it


@pytest.mark.ranks
@pytest.mark.parametrize('precision', PRECISIONS)
def test_every_stage_follows_the_plain_loop(tmp_path, precision):
    accumulations, clips = [1, 4], [None, 0.5]
    results = run_ranks(
        stepping.follow_reference, 2, tmp_path,
        stages=STAGES, precision=precision, steps=STEPS, accumulations=accumulations, clips=clips,
        one_of=3,
    )  # fmt: skip
    expected = {clip: reference(precision, STEPS, clip) for clip in clips}
    assert min(expected[0.5]['norms']) < 0.5 < max(expected[0.5]['norms'])  # binds, and does not
    for cell in share(itertools.product(STAGES, accumulations, clips), 3):
        name, wanted = ' '.join(map(str, cell)), expected[cell[2]]
        got = [result[name] for result in results]
        for result in got:
            norms = pytest.approx(wanted['norms'], rel=tolerances(precision)[0])
            assert result['norms'] == norms, name
            assert result['applied'] == STEPS, name
            if 'fp16' in precision:
                assert result['scales'] == wanted['scales'], name
        assert got[0]['norms'] == got[1]['norms'], name
        assert got[0]['weights'] == got[1]['weights'], name
        step = 0.0 if precision == 'fp32' else ADAM_STEP
        _require_weights(precision, got[0]['weights'], wanted['weights'], name, step)


@pytest.mark.ranks
def test_four_ranks_follow_the_plain_loop(tmp_path):
    results = run_ranks(
        stepping.follow_reference, 4, tmp_path,
        stages=STAGES, precision='fp32', steps=STEPS, accumulations=[2], clips=[0.5],
    )  # fmt: skip
    expected = reference('fp32', STEPS, 0.5)
    for stage in STAGES:
        for result in results:
            got = result[f'{stage} 2 0.5']
            assert got['norms'] == pytest.approx(expected['norms'], rel=1e-5)
        _require_weights('fp32', got['weights'], expected['weights'], stage)


@pytest.mark.ranks
@pytest.mark.parametrize('precision', PRECISIONS)
def test_a_layer_that_is_frozen_later_stays_or_the_update_is_refused(tmp_path, precision):
    results = run_ranks(stepping.freeze_in_between, 2, tmp_path, stages=STAGES, precision=precision)
    expected = reference(precision, 4, 0.5)['weights']
    for result, stage in itertools.product(results, STAGES):
        got = result[str(stage)]
        if stage == 0 and (precision == 'fp32' or 'autocast' in precision):
            # torch's optimizer skips what has no gradient, as in plain PyTorch
            assert got['said'] is None
            assert got['moved'] == sorted(n for n in got['weights'] if not n.startswith('body'))
        else:
            assert '2 parameters were frozen after' in got['said'], stage
            assert 'body.weight, body.bias' in got['said'], stage
            assert got['moved'] == [], stage
            step = 0.0 if precision == 'fp32' else ADAM_STEP
            _require_weights(precision, got['weights'], expected, stage, step)


@pytest.mark.first
@pytest.mark.ranks
@pytest.mark.parametrize(('precision', 'stages'), ACCUMULATING)
def test_accumulation_in_fp32_follows_the_plain_loop(tmp_path, precision, stages):
    results = run_ranks(scaling.accumulate_in_fp32, 2, tmp_path, precision=precision, stages=stages)
    norms = pytest.approx(reference(precision, 6, 0.5)['norms'], rel=tolerances(precision)[0])
    assert results == [{str(stage): norms for stage in stages}] * 2


@pytest.mark.ranks
@pytest.mark.parametrize('precision', ['fp16', 'autocast_fp16'])
def test_a_first_scale_that_overflows_falls_until_it_does_not(tmp_path, precision):
    power = 24
    results = run_ranks(
        stepping.follow_reference, 2, tmp_path, stages=STAGES, precision=precision,
        steps=STEPS, accumulations=[1, 4], clips=[0.5], fp16={'initial_scale_power': power},
        one_of=3,
    )  # fmt: skip
    plain = reference(precision, STEPS, 0.5, scale=2.0**power)
    for stage, accumulation in share(itertools.product(STAGES, [1, 4]), 3):
        name = f'{stage} {accumulation} 0.5'
        for result in results:
            got = result[name]
            skips = sum(got['skipped'])
            # The first updates, and no other; each halves the scale.
            assert got['skipped'] == [True] * skips + [False] * (STEPS - skips), name
            assert got['scales'][:skips] == [2.0 ** (power - 1 - i) for i in range(skips)], name
            assert got['scales'][skips:] == [2.0 ** (power - skips)] * (STEPS - skips), name
            assert not any(map(math.isfinite, got['norms'][:skips])), name
            assert got['applied'] == STEPS - skips, name
            # Plain PyTorch's gradient of the whole batch overflows at another scale than those of
            # its parts: ranks add theirs up in float16 before they divide.
            assert skips == pytest.approx(sum(not math.isfinite(n) for n in plain['norms']), abs=3)
            assert skips > 0
            wanted = reference(precision, STEPS - skips, 0.5, 2.0 ** (power - skips), first=skips)
            norms = pytest.approx(wanted['norms'], rel=tolerances(precision)[0])
            assert got['norms'][skips:] == norms, name
            _require_weights(precision, got['weights'], wanted['weights'], name, ADAM_STEP)


@pytest.mark.ranks
@pytest.mark.parametrize('precision', PRECISIONS)
def test_gradients_are_applied_at_their_size(tmp_path, precision):
    results = run_ranks(
        stepping.follow_reference, 2, tmp_path, stages=STAGES, precision=precision,
        steps=4, accumulations=[2], clips=[None, 0.05], sgd=True,
    )  # fmt: skip
    for stage, clip in itertools.product(STAGES, [None, 0.05]):
        wanted = reference(precision, 4, clip, sgd=True)
        got = results[0][f'{stage} 2 {clip}']
        assert got['norms'] == pytest.approx(wanted['norms'], rel=tolerances(precision)[0]), stage
        _require_weights(precision, got['weights'], wanted['weights'], (stage, clip))


@pytest.mark.ranks
@pytest.mark.parametrize('precision', ['fp16', 'autocast_fp16'])
def test_the_update_on_which_the_scale_grows_is_applied_and_reported_whole(tmp_path, precision):
    results = run_ranks(
        stepping.follow_reference, 2, tmp_path, stages=STAGES, precision=precision,
        steps=8, accumulations=[1], clips=[None],
        fp16={'initial_scale_power': 4, 'loss_scale_window': 3}, sgd=True,
    )  # fmt: skip
    wanted = reference(precision, 8, None, scale=16.0, growth=3, sgd=True)
    assert wanted['scales'] == [16.0, 16.0, 32.0, 32.0, 32.0, 64.0, 64.0, 64.0]
    for stage in STAGES:
        got = results[0][f'{stage} 1 None']
        assert got['scales'] == wanted['scales'], stage
        assert got['norms'] == pytest.approx(wanted['norms'], rel=tolerances(precision)[0]), stage
        _require_weights(precision, got['weights'], wanted['weights'], stage)


@pytest.mark.ranks
@pytest.mark.parametrize('precision', ['fp16', 'autocast_fp16'])
def test_a_static_scale_stays(tmp_path, precision):
    results = run_ranks(
        stepping.follow_reference, 2, tmp_path, stages=STAGES, precision=precision,
        steps=4, accumulations=[1], clips=[0.5], fp16={'loss_scale': 64, 'loss_scale_window': 1},
        sgd=True,
    )  # fmt: skip
    wanted = reference(precision, 4, 0.5, scale=64.0, sgd=True)
    for stage in STAGES:
        got = results[0][f'{stage} 1 0.5']
        assert got['scales'] == [64.0] * 4, stage
        assert got['norms'] == pytest.approx(wanted['norms'], rel=tolerances(precision)[0]), stage
        _require_weights(precision, got['weights'], wanted['weights'], stage)


@pytest.mark.ranks
@pytest.mark.parametrize('precision', PRECISIONS)
def test_grad_norm_before_the_step(tmp_path, precision):
    results = run_ranks(stepping.norms_before_step, 2, tmp_path, stages=STAGES, precision=precision)
    plain = results[0]['0']
    tolerance = tolerances(precision)[0]
    assert plain['2'] == pytest.approx(reference(precision, 1, None)['norms'][0], rel=tolerance)
    for stage in map(str, STAGES):
        for result in results:
            after = result[stage].pop('after')
            assert result[stage] == pytest.approx(
                {k: v for k, v in plain.items() if k != 'after'}, rel=tolerance
            ), stage
            if stage != '0':
                assert 'between backward and step' in after


@pytest.mark.ranks
def test_what_was_unfrozen_later_is_not_in_the_norm(tmp_path):
    for result in run_ranks(stepping.norms_with_an_unfrozen_layer, 2, tmp_path, stages=[1, 2, 3]):
        for stage, pairs in result.items():
            for norm, wanted in pairs:
                assert norm == pytest.approx(wanted, rel=1e-5), stage


@pytest.mark.ranks
@pytest.mark.parametrize(
    ('precision', 'value'),
    [
        *((precision, 'nan') for precision in PRECISIONS),
        # Where nothing is scaled the same check of the norm finds both.
        *(
            pytest.param(p, 'inf', marks=[] if p.endswith('fp16') else pytest.mark.soak_only)
            for p in PRECISIONS
        ),
    ],
)
def test_a_bad_gradient_on_one_rank_is_skipped_on_all(tmp_path, precision, value):
    results = run_ranks(
        stepping.non_finite, 2, tmp_path,
        stages=STAGES, precision=precision, value=value,
    )  # fmt: skip
    scales = [16.0, 8.0, 8.0] if 'fp16' in precision else [1.0] * 3  # as GradScaler halves it
    for stage in map(str, STAGES):
        for result in results:
            got = result[stage]
            assert not math.isfinite(got['norm']), stage
            assert got['skipped'], stage
            assert got['unchanged'], stage
            assert got['scales'] == scales, stage
            assert math.isfinite(got['next_norm']), stage
            assert not got['next_skipped'], stage
            assert got['moved'], stage
            assert got['counts'] == [3, 1], stage


def test_grad_norm_of_plain_parameters():
    model = make_model()
    model(torch.ones(2, 12)).sum().backward()
    grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    for norm_type in (1, 2, 3, math.inf):
        expected = torch.linalg.vector_norm(grads, norm_type)
        assert torch.allclose(get_grad_norm(model.parameters(), norm_type), expected, rtol=1e-6)
    weight = model.head.weight
    assert get_grad_norm(weight).item() == pytest.approx(weight.grad.norm().item(), rel=1e-6)
    assert get_grad_norm([torch.zeros(3)]).item() == 0.0


@pytest.mark.parametrize('norm_type', [0, -1, math.nan])
def test_what_is_no_norm_is_refused(norm_type):
    with pytest.raises(InternvlDsError, match='any p > 0, or inf'):
        get_grad_norm(torch.zeros(3), norm_type)


def test_the_loss_scale_of_an_engine_is_divided_out(monkeypatch):
    weight = torch.ones(4, requires_grad=True)
    weight.grad = torch.full((4,), 8.0)
    wrapper = SimpleNamespace(partitioned=False, scale=LossScale(scale=4.0))
    monkeypatch.setattr(grad_norm, 'wrapper_of_parameter', lambda parameter: wrapper)
    assert get_grad_norm(weight) == 4.0
    wrapper.scale = None
    assert get_grad_norm(weight) == 16.0
    monkeypatch.setattr(grad_norm, 'wrapper_of_parameter', lambda parameter: None)
    assert get_grad_norm(weight) == 16.0


def test_an_optimizer_without_an_engine_is_an_error_that_says_how_to_register():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(torch.ones(2, 12)).sum()
    with pytest.raises(EngineNotFound, match=r'SGD belongs to no known .* internvl_ds.register'):
        NativeScalerWithGradNormCount()(loss, optimizer)


def test_scaler_state():
    scaler = NativeScalerWithGradNormCount()
    assert scaler.state_dict_key == 'amp_scaler'
    assert scaler.state_dict() == {'scale': 1.0}
    scaler.load_state_dict({'scale': 65536.0, 'growth_factor': 2.0})
    assert scaler.state_dict() == {'scale': 65536.0, 'growth_factor': 2.0}
    assert scaler.loss_scale == 65536.0
    with pytest.raises(InternvlDsError, match='not the state of a loss scaler'):
        scaler.load_state_dict({'momentum': 1})
