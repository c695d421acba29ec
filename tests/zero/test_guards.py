"""What a script of plain PyTorch does to an engine: right, or an error that says what to write."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from internvl_ds.errors import ConfigError
from internvl_ds.zero.guards import _watch_outputs
from tests.harness.model import OLD_DEEPSPEED, batch, make_model, make_sgd
from tests.harness.plain_loop import reference
from tests.harness.ranks import run_ranks
from tests.zero import guarding

STAGES = [0, 1, 2, 3]

# fp32: sums in another order, over two updates.
ROUNDING = 1e-5

INSTEAD = 'write grad_norm = loss_scaler(loss, optimizer, clip_grad=config.TRAIN.CLIP_GRAD'


def near(weights):
    return {name: pytest.approx(values, rel=ROUNDING, abs=1e-6) for name, values in weights.items()}


def trained(weights):
    return {n: weights[n] for n, p in make_model().named_parameters() if p.requires_grad}


@pytest.mark.first
@pytest.mark.ranks
def test_a_loop_of_plain_pytorch_is_refused_before_it_changes_anything(tmp_path):
    wanted = reference('fp32', 2, 0.5, sgd=True)
    results = run_ranks(guarding.bare_loops, 2, tmp_path, stages=STAGES, accumulations=[1, 2])
    assert results[0] == results[1]  # the same words on every rank
    for cell, got in results[0].items():
        for what in ('original', 'retried', 'GradScaler', 'inputs'):
            message = got['said'][what]
            assert message.startswith('ConfigError: loss.backward() through an engine'), (
                cell,
                what,
            )
            assert INSTEAD in message, cell
            assert 'or engine.backward(loss) and engine.step()' in message, cell
        for what in ('step', "client's step", 'module'):
            message = got['said'][what]
            assert message.startswith('ConfigError: optimizer.step() of an engine'), (cell, what)
            assert INSTEAD in message, cell
        assert got['unchanged'], cell
        assert got['norms'] == pytest.approx(wanted['norms'], rel=ROUNDING), cell
        assert got['weights'] == near(trained(wanted['weights'])), cell


@pytest.mark.ranks
def test_loops_of_plain_deepspeed_and_of_other_models_go_on(tmp_path):
    wanted = reference('fp32', 2, 0.5, sgd=True)
    results = run_ranks(guarding.what_still_works, 2, tmp_path, stages=STAGES)
    said, *others = ([text for got in r.values() for text in got['told']] for r in results)
    assert (len(said), others) == (1, [[]])  # once for all engines, by rank 0
    assert said[0].startswith('optimizer.consolidate_state_dict(to=0) does nothing over an engine')
    for result in results:
        for stage, got in result.items():
            assert got['norms'] == pytest.approx(wanted['norms'], rel=ROUNDING), stage
            assert got['weights'] == near(trained(wanted['weights'])), stage
            assert got['critic'] > 0, stage


@pytest.mark.ranks
def test_clipping_by_hand_is_right_at_stage_0_and_refused_where_it_would_do_nothing(tmp_path):
    model = make_model()
    optimizer = make_sgd(model)
    for step, clip in ((0, 0.05), (1, math.inf)):
        x, y = batch(step)
        nn.functional.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    clipped = {n: p.flatten().tolist() for n, p in model.named_parameters()}
    for result in run_ranks(guarding.clip_by_hand, 2, tmp_path, stages=STAGES):
        between, after, weights = result['0']
        assert (between, after) == ('no error', 'no error')
        assert weights == near(trained(clipped))
        for stage in ('1', '2', '3'):
            for message in result[stage][:2]:
                assert message.startswith('ConfigError: clip_grad_norm_ of parameters of a ZeRO')
                assert 'Pass clip_grad= to loss_scaler(loss, optimizer, ...)' in message


@pytest.mark.skipif(OLD_DEEPSPEED, reason='0.17 knows of no other engine: a bare one, and refused')
@pytest.mark.ranks
def test_one_backward_through_two_engines_is_not_taken_for_a_bare_one(tmp_path):
    models = []
    for seed, shape in ((0, (12, 7)), (1, (7, 5))):
        torch.manual_seed(seed)
        models.append(nn.Linear(*shape))
    x, y = batch(0)
    nn.functional.cross_entropy(models[1](models[0](x)), y).backward()
    wanted = [
        near({n: (p - 0.1 * p.grad).flatten().tolist() for n, p in m.named_parameters()})
        for m in models
    ]
    for result in run_ranks(guarding.two_engines, 2, tmp_path, stages=[1, 2, 3]):
        assert result == dict.fromkeys('123', wanted)


def test_outputs_that_are_leaves_stay_as_they_are():
    """Before DeepSpeed 0.18 the outputs are watched; a parameter would be for all its life."""
    wrapper = SimpleNamespace(in_backward=False)
    leaf = torch.ones(1, requires_grad=True)
    made = leaf * 2
    _watch_outputs(lambda: wrapper, None, None, {'a': leaf, 'b': [made, torch.ones(1), 'text']})
    leaf.sum().backward()
    with pytest.raises(ConfigError, match='loss.backward'):
        made.sum().backward()
    wrapper.in_backward = True
    (leaf * 3).sum().backward()


CELLS = [
    ('fp32', 'bfloat16'),
    ('fp32', 'float16'),
    ('bf16', 'bfloat16'),
    ('bf16', 'float16'),
    ('autocast_bf16', 'float16'),
    ('autocast_fp16', 'bfloat16'),
]
SAME = [('autocast_bf16', 'bfloat16'), ('autocast_fp16', 'float16')]


@pytest.mark.ranks
def test_an_autocast_of_the_script_is_the_engines_or_an_error(tmp_path):
    without = [(precision, '') for precision in ('fp32', 'bf16', 'autocast_bf16', 'autocast_fp16')]
    for result in run_ranks(
        guarding.foreign_autocast, 2, tmp_path, stages=STAGES,
        cells=[*without, *CELLS, *SAME],
    ):  # fmt: skip
        for stage, (precision, dtype) in itertools.product(STAGES, [*CELLS, *SAME]):
            said, evaluated, moved, weights = result[f'{stage} {precision} {dtype}']
            wanted = result[f'{stage} {precision} '][-1]
            cell = stage, precision, dtype
            assert weights == wanted, cell  # bit for bit, at once or after the error
            if (precision, dtype) in SAME:
                assert (said, evaluated, moved) == ('no error', 'no error', True), cell
                continue
            assert not moved, cell
            assert said == evaluated, cell
            assert f'ConfigError: engine(...) inside torch.autocast(torch.{dtype})' in said, cell
            own = {'fp32': 'in torch.float32', 'bf16': 'in torch.bfloat16'}
            assert own.get(precision, 'in autocast torch.') in said, cell
            assert f'set AMP_OPT_LEVEL O1 and AMP_TYPE {dtype}' in said, cell


@pytest.mark.ranks
def test_wrappers_that_average_gradients_too_are_refused(tmp_path):
    names = {
        'DDP(model)': 'DistributedDataParallel: ',
        'inner DDP': 'DistributedDataParallel (0 of it)',
        'register': 'DistributedDataParallel: ',
        'DataParallel(model)': 'DataParallel: ',
        'engine of an engine': 'DeepSpeedEngine: ',
    }
    for result in run_ranks(guarding.wrapped, 2, tmp_path, stages=STAGES):
        for stage, said in result.items():
            for what, name in names.items():
                assert said[what].startswith(f'ConfigError: the model is a {name}'), (stage, what)
            assert 'DistributedDataParallel(engine)' in said['DDP(engine)'], stage
            assert 'DataParallel(engine)' in said['replicas'], stage
            if stage != '3':
                assert said.pop('copy') == 'no error', stage
            for what in ('DDP before', *(['DDP around'] if stage != '3' else [])):
                assert "an engine's module inside a DistributedDataParallel" in said[what], stage
            assert 'a ZeroRedundancyOptimizer around SGD: give i' in said.pop('ZeRO of torch')
            for what, message in said.items():
                assert 'give initialize the bare module' in message, (stage, what)


@pytest.mark.ranks
def test_averages_of_an_engine_are_refused_and_of_its_module_right_where_it_has_values(tmp_path):
    kinds = ('ModelEma', 'ModelEmaV2', 'ModelEmaV3', 'AveragedModel')
    for result in run_ranks(guarding.averages, 2, tmp_path, stages=STAGES):
        for stage, got in result.items():
            for kind in (*kinds, 'deepcopy'):
                assert 'ShardedEma(engine, decay)' in got[kind], stage
                assert got[kind].startswith('ConfigError: an engine has no copies'), stage
        for stage in '012':
            for name, first in result[stage]['weights'][0].items():
                if name == 'tied.weight':  # timm moves it once for each of its names
                    continue
                second, third = (weights[name] for weights in result[stage]['weights'][1:])
                parts = zip(first, second, third, strict=True)
                wanted = [0.25 * a + 0.25 * b + 0.5 * c for a, b, c in parts]
                for average in result[stage]['averages']:
                    assert average[name] == pytest.approx(wanted, rel=1e-6, abs=1e-7), stage
            assert result[stage]['copy'] == [True, True], stage
        for kind in kinds:
            message = result['3'][f'{kind} module']
            assert message.startswith('ConfigError: a copy of a module of ZeRO stage 3'), kind
            assert 'ShardedEma(engine, decay)' in message, kind
        assert 'engine.state_dict() at ZeRO stage 3 holds no values' in result['3']['update']
