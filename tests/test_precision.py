"""The scaler bridge on 2 real ranks, against a plain single-process PyTorch loop."""

import math

import pytest
import torch

from internvl_ds import NativeScalerWithGradNormCount, get_grad_norm
from internvl_ds.errors import EngineNotFound, InternvlDsError
from tests.ranks import run_ranks
from tests.workers.model import OFFLOAD, make_model
from tests.workers.stepping import reference

STAGES = [0, 1, 2, 3, OFFLOAD]
STEPS = 20

# bf16 keeps 8 bits: rounding to nearest is off by at most 2**-9 of the value. A gradient element
# is rounded on its way here and not in the reference, or the other way round, at most eight times:
# in two micro-batches, their sum, the ranks' sum, the mean, and the loss's division by 2, with
# twice that for the activations that went into it.
BF16_NORM_TOLERANCE = 8 * 2.0**-9

# Adam moves an element by about lr whatever its gradient's size, so a rounded gradient turns into
# an error of the same relative size per step for most elements and a whole step for those whose
# gradient is near zero: bounded here as a share of the way that the weights have gone. A dummy
# first step (DeepSpeed's at stage 0) shifts the first update alone by 26 %.
BF16_WEIGHT_TOLERANCE = 16 * 2.0**-9


def _distance(a: dict, b: dict) -> float:
    names = a.keys()
    return math.dist([v for n in names for v in a[n]], [v for n in names for v in b[n]])


@pytest.mark.ranks
@pytest.mark.parametrize(('clip', 'ranks'), [(0.5, 2), (None, 2), (0.5, 4)])
def test_fp32_follows_the_plain_loop_at_every_stage(tmp_path, clip, ranks):
    results = run_ranks(
        'tests.workers.stepping:follow_reference', ranks, tmp_path,
        stages=STAGES, precision='fp32', steps=STEPS, accumulation=2, clip=clip,
    )  # fmt: skip
    expected = reference('fp32', STEPS, clip)
    trained = results[0]['0']['weights'].keys()
    for stage in map(str, STAGES):
        for result in results:
            assert result[stage]['norms'] == pytest.approx(expected['norms'], rel=1e-5)
            assert result[stage]['applied'] == STEPS
            wanted = {n: expected['weights'][n] for n in trained}
            size = _distance(wanted, {n: [0.0] * len(wanted[n]) for n in trained})
            assert _distance(result[stage]['weights'], wanted) <= 1e-5 * size, stage
        assert results[0][stage]['weights'] == results[1][stage]['weights']
    assert min(expected['norms']) < 0.5 < max(expected['norms'])  # clipping binds, and does not


@pytest.mark.ranks
@pytest.mark.parametrize('precision', ['bf16', 'autocast'])
def test_bf16_follows_the_plain_loop_at_every_stage(tmp_path, precision):
    results = run_ranks(
        'tests.workers.stepping:follow_reference', 2, tmp_path,
        stages=STAGES, precision=precision, steps=STEPS, accumulation=2, clip=0.5,
    )  # fmt: skip
    expected = reference(precision, STEPS, 0.5)
    start = {n: p.detach().flatten().tolist() for n, p in make_model().named_parameters()}
    trained = results[0]['0']['weights'].keys()
    wanted = {n: expected['weights'][n] for n in trained}
    way = _distance(wanted, {n: start[n] for n in trained})
    for stage in map(str, STAGES):
        norms = results[0][stage]['norms']
        assert norms == pytest.approx(expected['norms'], rel=BF16_NORM_TOLERANCE), stage
        off = _distance(results[0][stage]['weights'], wanted)
        assert off <= BF16_WEIGHT_TOLERANCE * way, (stage, off / way)
        assert results[0][stage]['norms'] == results[1][stage]['norms']


@pytest.mark.ranks
@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_grad_norm_before_the_step(tmp_path, precision):
    results = run_ranks(
        'tests.workers.stepping:norms_before_step', 2, tmp_path, stages=STAGES, precision=precision
    )
    plain = results[0]['0']
    tolerance = 1e-5 if precision == 'fp32' else BF16_NORM_TOLERANCE
    if precision == 'fp32':
        assert plain['2'] == pytest.approx(reference('fp32', 1, None)['norms'][0], rel=1e-5)
    for stage in map(str, STAGES):
        for result in results:
            for kind in ('1', '2', 'inf', 'head'):
                assert result[stage][kind] == pytest.approx(plain[kind], rel=tolerance), stage
            if stage != '0':
                assert 'between backward and step' in result[stage]['after']


@pytest.mark.ranks
@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_a_nan_on_one_rank_is_skipped_on_all(tmp_path, precision):
    results = run_ranks(
        'tests.workers.stepping:non_finite', 2, tmp_path, stages=STAGES, precision=precision
    )
    for stage in map(str, STAGES):
        for result in results:
            got = result[stage]
            assert not math.isfinite(got['norm']), stage
            assert got['skipped'], stage
            assert got['unchanged'], stage
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
    with pytest.raises(InternvlDsError, match='not the state of a loss scaler'):
        scaler.load_state_dict({'momentum': 1})
