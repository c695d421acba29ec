"""Which class an engine gets, and what goes with it; engines are stood in for."""

import gc
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from internvl_ds.errors import ConfigError
from internvl_ds.zero.stage_0 import ClientOptimizer, UnfusedOptimizer
from internvl_ds.zero.stage_1_2 import Stage1And2
from internvl_ds.zero.stage_3 import Stage3, Stage3Module
from internvl_ds.zero.wrap import _warn_of_newer, wrap
from internvl_ds.zero.wrapper import Wrapper, replaced

CLIENT = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)


class FP16_Optimizer:
    pass


class Engine:
    """As much of DeepSpeed's as choosing takes."""

    def __init__(self, stage, optimizer, client=CLIENT):
        self.module = nn.Linear(2, 2)
        self.optimizer, self.basic_optimizer = optimizer, client
        self.zero_optimization_stage = lambda: stage
        self._config = SimpleNamespace(_param_dict={'train_batch_size': 2})


@pytest.mark.parametrize(
    ('stage', 'optimizer', 'client', 'kind'),
    [
        (0, None, None, Wrapper), (1, None, None, Wrapper), (3, object(), None, Stage3Module),
        (0, CLIENT, CLIENT, ClientOptimizer), (0, object(), CLIENT, UnfusedOptimizer),
        (1, object(), CLIENT, Stage1And2), (2, object(), CLIENT, Stage1And2),
        (3, object(), CLIENT, Stage3),
    ],
)  # fmt: skip
def test_the_optimizer_and_the_stage_choose_the_class(stage, optimizer, client, kind):
    engine = Engine(stage, optimizer, client)
    wrapper = wrap(engine)
    assert kind in type(wrapper).__mro__[:2]  # one for an earlier DeepSpeed stands below it
    assert wrapper.engine is engine
    assert (wrapper.partitioned, wrapper.sharded) == (stage > 0, stage == 3)
    assert wrapper.ds_config == {'train_batch_size': 2}
    del engine
    gc.collect()
    assert not wrapper.alive


def test_a_fused_optimizer_in_low_precision_is_refused_at_stage_0():
    with pytest.raises(ConfigError, match='SGD with fp16 or bf16 at ZeRO stage 0'):
        wrap(Engine(0, FP16_Optimizer()))


def test_what_is_replaced_comes_back_to_the_object_or_the_class():
    engine = Engine(0, CLIENT)
    with replaced(engine, 'basic_optimizer', None):
        assert engine.basic_optimizer is None
    assert engine.basic_optimizer is CLIENT
    with replaced(engine, '__init__', None):
        assert engine.__init__ is None
    assert '__init__' not in vars(engine)


@pytest.mark.parametrize(('version', 'told'), [('0.18.9', 0), ('0.19.99', 0), ('0.20.0', 1)])
def test_a_newer_deepspeed_than_known_is_told_once(caplog, version, told):
    _warn_of_newer.cache_clear()
    for _ in range(2):
        _warn_of_newer(version)
    assert len(caplog.records) == told
    assert all(f'DeepSpeed {version} is newer' in record.message for record in caplog.records)


def test_frozen_parameters_that_deepspeed_would_move_are_refused():
    """As DeepSpeed 0.18's of half precision at stage 0 has them; 0.19.8 leaves them out."""
    engine = Engine(0, SimpleNamespace(fp16_groups=[list(nn.Linear(2, 2).parameters())]))
    engine.global_steps = 0
    engine.param_names = dict(zip(engine.optimizer.fp16_groups[0], ('w', 'b'), strict=True))
    engine.optimizer.fp16_groups[0][1].requires_grad_(False)
    with pytest.raises(ConfigError, match='1 frozen parameters are in the optimizer.* stage 0: b'):
        UnfusedOptimizer(engine).attach()
