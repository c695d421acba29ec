"""The average as a module to evaluate, in the middle of a training."""

from types import SimpleNamespace

import pytest

from internvl_ds import ConfigError
from internvl_ds.engine.averaged_module import AveragedModule
from tests.engine import evaluating
from tests.harness.model import PERSISTENT
from tests.harness.ranks import run_ranks

PAIRS = [
    *((stage, 'fp32') for stage in (0, 1, 2, 3, PERSISTENT)),
    (0, 'bf16'), (2, 'bf16'), (3, 'bf16'),
    *((stage, 'autocast_bf16') for stage in (0, 1, 3)),
]  # fmt: skip


@pytest.mark.ranks
@pytest.mark.first
def test_it_evaluates_the_average_and_leaves_the_training_as_it_was(tmp_path):
    for result in run_ranks(evaluating.call_the_average, 2, tmp_path, pairs=PAIRS):
        for (stage, _), (name, got) in zip(PAIRS, result.items(), strict=True):
            assert got['equal'] == [True] * 5, name
            assert not got['needs a gradient'], name
            assert got['copies'] == (stage < 3), name
            assert got['freed'], name
            assert got['modes'] == [True, True, False], name
            assert got['same masters'], name
            assert got['norms'], name
            assert got['trains on'], name
            assert got['next average'], name
            assert got['autocast'] == [True, True, True], name
            assert got['state'], name
            words = 'inside `with model_ema.swapped_in():`: the engine holds the averaged weights'
            assert f'save_checkpoint {words}' in got['inside']['save'], name
            assert f'an update {words}' in got['inside']['step'], name
            for what, call in (
                ('update', 'ShardedEma.update'), ('state', 'ShardedEma.state_dict'),
                ('load', 'load_ema_checkpoint'),
            ):  # fmt: skip
                assert f'{call} inside swapped_in' in got['inside'][what], name


def test_what_a_module_has_and_an_average_has_not_says_what_to_do():
    module = AveragedModule(SimpleNamespace())
    assert module.eval() is module
    assert module.train(False) is module
    assert not module.training
    assert not hasattr(module, 'module')
    with pytest.raises(AttributeError, match=r"has no 'parameters'.*with model_ema.swapped_in"):
        module.parameters()
    with pytest.raises(ConfigError, match='an average does not train'):
        module.train()
