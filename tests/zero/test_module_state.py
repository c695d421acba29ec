"""Modules that no checkpoint of every stage could hold are refused; shared ones keep every name."""

import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn
from torch.torch_version import TorchVersion

from internvl_ds.errors import ConfigError
from internvl_ds.zero.module_state import (
    keeping_buffers,
    require_dtypes,
    require_plain_state,
    require_real,
    require_sendable,
)
from tests.checkpoint import proving
from tests.harness.ranks import run_ranks


class Counting(nn.Linear):
    def get_extra_state(self):
        return torch.tensor(3)

    def set_extra_state(self, state):
        pass


class Renaming(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_state_dict_post_hook(
            lambda module, state, prefix, _: state.update(
                {f'{prefix}kernel': state.pop(f'{prefix}weight')}
            )
        )


def shared():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.again = model[0]
    model.register_buffer('scratch', torch.ones(1), persistent=False)
    model.register_buffer('none', None)
    return model


@pytest.mark.parametrize(
    ('model', 'named'),
    [
        (nn.Sequential(Counting(2, 2)), r'1 entries .*\(0\._extra_state\), and lacks 0'),
        (nn.Sequential(Renaming(2, 2)), r'1 entries .*\(0\.kernel\), and lacks 1 .*\(0\.weight\)'),
    ],
)
def test_what_is_no_parameter_or_buffer_under_its_own_name_is_refused(model, named):
    with pytest.raises(ConfigError, match=named):
        require_plain_state(model)


def test_complex_parameters_are_not_trained_and_may_be_frozen():
    model = nn.ParameterDict({'w': nn.Parameter(torch.ones(3, dtype=torch.cfloat))})
    with pytest.raises(ConfigError, match=r'1 trained parameters are complex.*: w\. Keep their'):
        require_real(model)
    require_real(model.requires_grad_(False))


@pytest.mark.parametrize(('version', 'words'), [('2.9.1', 'cannot gather'), ('2.14.0', None)])
def test_frozen_complex_parameters_at_stage_3_need_a_torch_that_gathers_them(
    monkeypatch, version, words
):
    model = nn.Sequential(nn.Linear(2, 2), nn.ParameterDict({'w': torch.ones(3) * 1j}))
    model.requires_grad_(False)
    monkeypatch.setattr(torch, '__version__', TorchVersion(version))
    if words is None:
        require_dtypes(model)
        return
    with pytest.raises(ConfigError, match=words):
        require_dtypes(model)


def test_buffers_that_an_old_deepspeed_rounds_are_as_they_were(monkeypatch):
    monkeypatch.delattr(DeepSpeedEngine, '_cast_module_mixed_precision', raising=False)
    norm = nn.BatchNorm1d(2)
    norm.running_mean.fill_(1 / 3)
    model = nn.ModuleDict({'a': norm, 'b': norm, 'c': nn.Linear(2, 2)})
    with keeping_buffers(model):
        model.half()
        assert norm.running_mean.dtype == torch.float16
    assert norm.running_mean.tolist() == torch.full((2,), 1 / 3).tolist()
    assert norm.weight.dtype == model['c'].weight.dtype == torch.float16
    assert norm.num_batches_tracked.dtype == torch.int64


def test_shared_modules_and_all_kinds_of_buffers_are_plain():
    require_plain_state(shared())
    require_plain_state(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    require_sendable(shared())


@pytest.mark.parametrize(
    ('parameter', 'words'),
    [
        (torch.tensor(2.0), 'no dimension: declare them with the shape'),
        (torch.ones(0, 3), 'no elements: leave them out'),
        (torch.ones(2, 3).t(), 'another order than a contiguous tensor: make them contiguous'),
        (torch.ones(4, 2, 3, 3).to(memory_format=torch.channels_last), 'images may be channels_l'),
    ],
)
def test_parameters_that_deepspeed_cannot_send_are_named(parameter, words):
    for trained in (True, False):
        model = nn.ParameterDict({'w': nn.Parameter(parameter, requires_grad=trained)})
        with pytest.raises(ConfigError, match=f'^w: 1 parameters have .*{words}'):
            require_sendable(model)


@pytest.mark.first
@pytest.mark.ranks
def test_every_name_of_a_shared_module_is_saved_and_changed_buffers_are_refused(tmp_path):
    for result in run_ranks(proving.share, 2, tmp_path, root=tmp_path):
        for stage in map(str, range(4)):
            seen = result[stage]
            for target in map(str, range(4)):
                assert seen[target] == [], f'{stage} -> {target}'
            assert seen['grown'].startswith('CheckpointError: 1 buffers are not as they'), stage
            assert 'grows (2,) -> (3,)' in seen['grown'], stage
            assert 'grows (2,) -> none' in seen['gone'], stage
            assert 'lazy none -> (1,)' in seen['new'], stage
            assert seen['tags'] == ['ckpt_epoch_0'], stage
