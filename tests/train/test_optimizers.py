"""Every optimizer of timm and torch at every ZeRO stage: plain PyTorch's numbers, or refused."""

import pytest

from internvl_ds.errors import ConfigError
from internvl_ds.train.optimizer_check import examine_training
from internvl_ds.zero.fast_adam import chosen_adam
from tests.harness.model import make_config
from tests.harness.ranks import run_ranks
from tests.train import optimizing

OFFLOAD = {'zero_optimization': {'stage': 2, 'offload_optimizer': {'device': 'cpu'}}}


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.first
@pytest.mark.timeout(1200)
def test_each_is_right_or_refused_at_each_stage(tmp_path):
    fates, others = run_ranks(optimizing.fates, 2, tmp_path, timeout=1200)
    assert fates == others
    made = {name: fate for name, fate in fates.items() if fate}
    wrong = {
        (name, stage): fate
        for name, of_stages in made.items()
        for stage, fate in enumerate(of_stages)
        if not (f' at ZeRO stage {stage}: ' in fate if isinstance(fate, str) else fate <= 1e-5)
    }
    assert not wrong
    right = {name for name, fate in made.items() if not any(isinstance(f, str) for f in fate)}
    assert right >= {
        'timm adamw', 'timm lion', 'timm adan', 'timm adopt', 'timm nadamw', 'timm lookahead_adan',
        'timm muon', 'timm nmuon', 'torch SGD', 'torch RAdam', 'cpu', 'fused',
    }  # fmt: skip
    needs_whole = {name for name, fate in made.items() if isinstance(fate[0], float)} - right
    assert needs_whole >= {
        'timm lamb',
        'timm adamuon',
        'timm cadamw',
        'timm adafactor',
        'timm lars',
    }
    assert {'timm adahessian', 'torch SparseAdam', 'torch LBFGS'} <= made.keys() - right


@pytest.mark.slow
@pytest.mark.ranks
def test_adams_go_on_from_each_other_s_state_to_the_bit(tmp_path):
    for told in run_ranks(optimizing.go_on, 2, tmp_path, timeout=600, root=str(tmp_path)):
        assert all(each['taken'] for each in told)
        assert [each['steps'] for each in told] == [2, 4, 6, 8, 10, 12]


@pytest.mark.slow
@pytest.mark.ranks
def test_what_one_rank_cannot_compile_none_uses(tmp_path):
    for told in run_ranks(optimizing.choices, 2, tmp_path, timeout=600, root=str(tmp_path)):
        assert (told['built'], told['not built']) == ('DeepSpeedCPUAdam', 'AdamW')
        assert 'DeepSpeedCPUAdam cannot be compiled on rank 1 (no compiler)' in told['forced']


@pytest.mark.parametrize(
    ('asked', 'tree', 'device', 'name'),
    [
        ('auto', {}, 'cpu', 'torch'),
        ('auto', {}, 'cuda', 'torch'),  # at stage 0
        ('auto', {'zero_optimization': {'stage': 1}}, 'cuda', 'fused'),
        ('auto', OFFLOAD, 'cuda', 'cpu'),
        ('torch', OFFLOAD, 'cuda', 'torch'),
        ('cpu', {}, 'cpu', 'cpu'),
    ],
)
def test_adamw_is_what_suits_the_device(asked, tree, device, name):
    config = make_config(TRAIN__OPTIMIZER__ADAM=asked)
    assert chosen_adam(config, tree, device)[0] == name


@pytest.mark.parametrize(
    ('asked', 'tree', 'words'),
    [
        ('cpu', {}, 'steps on the host, and the weights are on the cuda device'),
        ('fused', OFFLOAD, 'the ds_config offloads the optimizer to the host'),
        ('fused', {}, 'does not go with ZeRO stage 0'),
        ('fast', {}, "is 'fast'; it can be 'auto', 'cpu', 'fused', 'torch'"),
    ],
)
def test_one_that_does_not_suit_is_an_error(asked, tree, words):
    with pytest.raises(ConfigError, match=words):
        chosen_adam(make_config(TRAIN__OPTIMIZER__ADAM=asked), tree, 'cuda')


def found(tree, in_code=True, **values):
    config = make_config(**values)
    return [str(each) for each in examine_training(tree, config, 2, in_code=in_code).findings]


def zero(stage, **more):
    return {'zero_optimization': {'stage': stage}, **more}


def test_the_configured_optimizer_is_tried_before_a_run_starts():
    assert found(zero(0), TRAIN__OPTIMIZER__NAME='lamb') == []
    (error,) = found(zero(2), TRAIN__OPTIMIZER__NAME='lamb')
    assert error.startswith("TRAIN.OPTIMIZER.NAME 'lamb' (Lamb) at ZeRO stage 2: its update of an ")
    assert 'use stage 0, or an optimizer such as AdamW' in error
    for stage in (1, 2, 3):
        assert found(zero(stage), TRAIN__OPTIMIZER__NAME='muon') == []
        assert "algo 'adamuon'" in found(zero(stage), TRAIN__OPTIMIZER__NAME='adamuon')[0]
    (error,) = found(zero(0), TRAIN__OPTIMIZER__NAME='adahessian')
    assert "'adahessian' (Adahessian) at ZeRO stage 0: a trial of its step() fails" in error
    assert 'neither adamw, sgd' in found(zero(0), TRAIN__OPTIMIZER__NAME='adamm')[0]
    assert 'cannot be built here' in found(zero(0), TRAIN__OPTIMIZER__NAME='fusedlamb')[0]
    assert found(OFFLOAD) == []  # DeepSpeed's own for the CPU
    assert len(found(OFFLOAD, TRAIN__OPTIMIZER__ADAM='torch')) == 1


@pytest.mark.parametrize('kind', ['Lamb', 'Muon', 'Adagrad', 'LBFGS'])
def test_so_is_one_that_the_json_names(kind):
    section = {'type': kind, 'params': {'lr': 0.1}}
    (error,) = found(zero(1, optimizer=section), in_code=False)
    assert error.startswith('/optimizer/type')
    assert kind in error
    assert 'at ZeRO stage 1' in error
    assert ('TRAIN.OPTIMIZER.NAME muon trains right' in error) is (kind == 'Muon')
    assert found(zero(1, optimizer={**section, 'type': 'RAdam'}), in_code=False) == []
