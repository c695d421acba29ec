"""Where weights came from, as load_pretrained notes it. One process."""

import logging

import torch
from torch import nn

from internvl_ds import load_pretrained
from internvl_ds.zero.origins import Origin, origins_of, warn_of_unknown_origins
from tests.harness.model import make_config

logger = logging.getLogger('test')


class Window(nn.Module):
    def __init__(self, side):
        super().__init__()
        self.window_size = (side, side)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * side - 1) ** 2, 2))
        self.proj = nn.Linear(4, 4)


def load(path, model, **values):
    load_pretrained(make_config(MODEL__PRETRAINED=str(path), **values), model, logger)
    return origins_of(model)


def test_what_is_in_the_file_as_it_is_has_its_place_and_what_is_resized_has_none(tmp_path):
    source = Window(3).state_dict()
    path = tmp_path / 'w.pth'
    torch.save({'model': {f'module.{name}': tensor for name, tensor in source.items()}}, path)
    model = Window(4).bfloat16()
    found = load(path, model)
    assert found['proj.weight'] == Origin(str(path), ('model', 'module.proj.weight'), ('bfloat16',))
    assert found['relative_position_bias_table'] is None
    # Of a part, by the names of the whole.
    assert origins_of(nn.Sequential(model))['0.proj.bias'] == found['proj.bias']


def test_an_average_has_its_place_and_another_load_takes_over(tmp_path):
    path, other = tmp_path / 'w.pth', tmp_path / 'o.pth'
    state = nn.Linear(4, 2).state_dict()
    torch.save({'model': state, 'model_ema': dict(state)}, path)
    torch.save({'weight': state['weight']}, other)
    model = nn.Linear(4, 2)
    found = load(path, model, MODEL__PRETRAINED_EMA=True)
    assert found['bias'] == Origin(str(path), ('model_ema', 'bias'), ('float32',))
    found = load(other, model, MODEL__PRETRAINED_MIN_MATCH=0.0)
    assert [found[name].source for name in ('weight', 'bias')] == [str(other), str(path)]


def test_a_run_whose_saves_will_fail_is_warned_before_it_trains(tmp_path, caplog):
    model = nn.Linear(4, 2).requires_grad_(False)
    warn_of_unknown_origins('once', model)
    assert caplog.text == ''
    warn_of_unknown_origins('omit', model)
    assert 'load_pretrained gave no values of weight, bias (2 frozen parameters)' in caplog.text
    caplog.clear()
    torch.save(model.state_dict(), tmp_path / 'w.pth')
    load(tmp_path / 'w.pth', model)
    warn_of_unknown_origins('omit', model)
    assert 'load_pretrained gave no' not in caplog.text
