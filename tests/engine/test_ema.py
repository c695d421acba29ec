"""The averages, sharded and timm's: without an engine, and on 2 real ranks."""

from types import SimpleNamespace

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from internvl_ds.engine import ema
from internvl_ds.engine.ema import EmaWarmup, ShardedEma
from tests.engine import averaging
from tests.harness import saving
from tests.harness.model import OFFLOAD, PERSISTENT, trained
from tests.harness.ranks import run_ranks

STAGES = trained([0, 1, 2, 3, OFFLOAD, PERSISTENT])


@pytest.fixture
def engine(monkeypatch):
    """What an average asks of an engine: one master, buffers of two kinds, applied steps."""
    module = nn.BatchNorm1d(2).to(torch.bfloat16)
    engine = SimpleNamespace(module=module, applied=True, master=torch.zeros(3), pushed=[])
    engine.was_step_applied = lambda: engine.applied
    monkeypatch.setattr(ema, 'engine_of', lambda model: engine)
    wrapper = SimpleNamespace(
        holds_average=False,
        masters=lambda: {'0': engine.master},
        before_write=lambda: None,
        push_masters=lambda: engine.pushed.append(engine.master.tolist()),
    )
    monkeypatch.setattr(ema, 'wrapper_of', lambda engine: wrapper)
    return engine


def set_to(engine, value, count):
    engine.master.fill_(value)
    engine.module.running_mean.fill_(value)
    engine.module.num_batches_tracked.fill_(count)


def test_an_update_is_one_step_of_the_average_and_a_skipped_one_none(engine):
    average = ShardedEma(engine, decay=0.75)
    set_to(engine, 4.0, 7)
    average.update()
    engine.applied = False
    average.update()
    assert average.num_updates == 1
    assert average._shards['0'].tolist() == [1.0] * 3
    assert average._buffers['running_mean'].tolist() == [1.0] * 2
    assert average._buffers['running_mean'].dtype == torch.float32
    assert average._buffers['num_batches_tracked'] == 7
    assert engine.master.tolist() == [4.0] * 3


def test_warm_up_lets_the_decay_rise(engine):
    average = ShardedEma(engine, decay=0.75, warmup=True)
    set_to(engine, 4.0, 0)
    average.update()
    assert average._shards['0'].tolist() == [4.0] * 3  # the decay of the first update is 0
    set_to(engine, 8.0, 0)
    average.update()
    decay = EmaWarmup().decay(2, 0.75)
    assert average._shards['0'].tolist() == pytest.approx([8.0 - 4.0 * decay] * 3)


@pytest.mark.parametrize('error', [None, ValueError])
def test_the_average_is_in_the_weights_place_inside_only(engine, error):
    average = ShardedEma(engine, decay=0.75)
    set_to(engine, 4.0, 7)
    average.update()
    set_to(engine, 8.0, 9)
    seen = []
    try:
        with average.swapped_in():
            seen += [engine.master.tolist(), engine.module.running_mean.tolist()]
            seen.append(int(engine.module.num_batches_tracked))
            if error is not None:
                raise error
    except ValueError:
        assert error is not None
    assert seen == [[1.0] * 3, [1.0] * 2, 7]
    assert engine.pushed == [[1.0] * 3, [8.0] * 3]
    assert engine.module.running_mean.tolist() == [8.0] * 2
    assert engine.module.num_batches_tracked == 9
    assert average._shards['0'].tolist() == [1.0] * 3


def test_it_goes_on_with_what_a_tag_says_of_it(engine):
    average = ShardedEma(engine)
    average.take_header({'decay': '0.5', 'num_updates': '3', 'warmup': '{"gamma": 2.0}'})
    assert (average.decay, average.num_updates, average.warmup) == (0.5, 3, EmaWarmup(gamma=2.0))
    average.take_header({'decay': '0.5', 'num_updates': '3', 'warmup': 'null'})
    assert average.warmup is None


@pytest.mark.ranks
@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_the_ema_is_the_average_and_evaluates_in_place(tmp_path, precision):
    results = run_ranks(saving.ema_in_place, 2, tmp_path, stages=STAGES, precision=precision)
    for stage in map(str, STAGES):
        for result in results:
            got = result[stage]
            # the same fp32 lerp, element by element, over another cut of the tensors
            assert got['off'] <= 1e-7, stage
            assert got['inside_differs'], stage
            assert got['restored'], stage
            assert got['inside'] == results[0][stage]['inside']
            # `seen` counts forward passes in training: 2 an update, averaged with decay 0.9
            assert got['seen'] == pytest.approx(_averaged_count(5), rel=1e-6)


def _averaged_count(updates: int) -> float:
    average = 0.0
    for update in range(1, updates + 1):
        average += 0.1 * (2 * update - average)
    return average


@pytest.mark.ranks
@pytest.mark.parametrize('precision', ['fp32', 'bf16', 'fp16'])
def test_fifty_updates_with_warm_up_are_timms(tmp_path, precision):
    results = run_ranks(
        averaging.follow_timm, 2, tmp_path,
        stages=[0, 1, 2, 3], precision=precision, updates=50,
    )  # fmt: skip
    for result in results:
        for stage, got in result.items():
            assert got['keys'], stage
            # the same float32 lerps in another cut; of values under 4, but for `seen`, whose
            # average is near 100: one rounding there is 2 ** -18
            assert got['off'] <= 2.0**-17, stage
            skipped = 50 - got['updates'][1]
            assert got['updates'] == [50 - skipped] * 2
            assert (skipped > 0) == (precision == 'fp16')


@pytest.mark.ranks
@pytest.mark.parametrize('precision', ['fp32', 'bf16', 'autocast_fp16'])
def test_an_update_talks_to_nobody_and_reads_nothing(tmp_path, precision):
    for result in run_ranks(
        averaging.count_update, 2, tmp_path, stages=[0, 1, 2, 3],
        precision=precision,
    ):  # fmt: skip
        assert result == {
            str(s): {'collectives': 0, 'reads': 0, 'synchronisations': 0} for s in range(4)
        }


@pytest.mark.ranks
def test_an_average_moves_to_other_ranks_and_stages_exactly(tmp_path):
    path, wanted, root = None, None, str(tmp_path / 'out')
    for epoch, (ranks, stage) in enumerate([(2, 1), (4, 3), (1, 0), (2, 2)]):
        results = run_ranks(
            averaging.go_on, ranks, tmp_path,
            root=root, stage=stage, resume=path, save_as=epoch,
        )  # fmt: skip
        for result in results:
            wanted = wanted or result['state']
            assert result['state'] == wanted, (ranks, stage)
            assert result['of'][:2] == [0.97, 4]
            assert result['of'][2].startswith('EmaWarmup(gamma=1.0, power=0.66')
        path = results[0]['path']


@pytest.mark.first
@pytest.mark.ranks
@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_evaluation_in_place_equals_a_plain_model_of_the_exported_average(tmp_path, precision):
    for result in run_ranks(
        averaging.evaluate_export, 2, tmp_path,
        root=str(tmp_path), stages=[0, 1, 2, 3], precision=precision,
    ):  # fmt: skip
        assert result == {str(stage): [True, True] for stage in range(4)}


def test_warm_up_is_timms():
    timms = ModelEmaV3(
        nn.Linear(1, 1), 0.99, 0.1, use_warmup=True, warmup_gamma=2, warmup_power=0.7
    )
    ours = EmaWarmup(2, 0.7, 0.1)
    wanted = [timms.get_decay(step) for step in range(1, 2000)]
    assert [ours.decay(update, 0.99) for update in range(1, 2000)] == wanted


@pytest.mark.ranks
def test_timm_averages_are_saved_and_loaded(tmp_path):
    for result in run_ranks(saving.timm_ema, 2, tmp_path, root=tmp_path):
        assert result['ModelEma'] == [True, 0.75]
        assert result['ModelEmaV2'] == [True, 0.75]
        assert result['ModelEmaV3'] == [True, 0.75]
        assert result['from shards'] <= 1e-7  # the same fp32 numbers, merged from 2 ranks
        assert result['without'] == [0.0, 'has no EMA: starting from the loaded weights']
        _require_right_averages_of_engines(result['of an engine'])


def _require_right_averages_of_engines(found):
    for stage in (0, 1, 2):
        for number in range(3):
            same, off, warnings = found[f'{stage} fp32 {number}']
            # of 3 updates in float32, of values under 4: a few roundings of 2 ** -23
            assert (same, off <= 2.0**-19, warnings) == (True, True, []), (stage, number)
    for number in range(2):
        assert 'averages in bfloat16, where most of an update' in found[f'1 bf16 {number}'][2][0]
    assert found['1 bf16 2'][2] == []  # timm's V3 rounds at random
    for message in (*found['3'], *found['engine']):
        assert 'internvl_ds.ShardedEma(engine, decay)' in message
