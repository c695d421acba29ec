"""TRAIN.SAVE_OVERHEAD: the interval follows from what saves cost, and a run keeps to it."""

import json
import logging

import pytest

from internvl_ds.train import save_interval
from internvl_ds.train.save_interval import SaveInterval
from tests.harness import training
from tests.harness.ranks import run_ranks
from tests.harness.training import small_config, write_folder


class Laps:
    """Updates by a clock that stands still but for them."""

    def __init__(self, monkeypatch, share=0.1):
        self.now = 100.0
        monkeypatch.setattr(save_interval.time, 'perf_counter', lambda: self.now)
        self.interval = SaveInterval(share, logging.getLogger('test.laps'))

    def pass_(self, *seconds, saves=False):
        for each in seconds:
            self.now += each
            self.interval.lap(saves)
        return self.interval.seconds


@pytest.fixture
def laps(monkeypatch):
    return Laps(monkeypatch)


def test_the_first_save_is_after_20_updates_and_its_cost_is_the_measure(laps, caplog):
    with caplog.at_level('INFO', 'test.laps'):
        assert laps.pass_(7.0, *[1.0] * 18) is None  # the first one is slow
        assert laps.pass_(1.0) == 0
        # One waits for the save for 3 s, and two are slowed by what is written beside them.
        assert laps.pass_(4.0, 1.5, 1.5, saves=True) is None
        assert laps.pass_(1.0) == pytest.approx(4 / 0.1)
    (line,) = [record.getMessage() for record in caplog.records]
    assert 'a save costs 4 s of training, an update takes 1 s: one every 40 s (40 updates)' in line


def test_saves_that_cost_next_to_nothing_are_20_updates_apart(laps):
    laps.pass_(*[1.0] * 20)
    laps.pass_(1.0, saves=True)
    assert laps.pass_(1.0) == pytest.approx(20)


def test_what_began_before_is_not_measured(laps):
    laps.pass_(*[1.0] * 20)
    laps.pass_(3.0, saves=True)
    assert laps.pass_(1.0) == pytest.approx(20)
    laps.now += 50  # an evaluation, and the save at the end of an epoch
    laps.interval.start()
    assert laps.pass_(9.0, saves=True) is None  # which is being written still
    assert laps.pass_(1.0) == pytest.approx(20)


def test_the_interval_follows_and_is_told_where_it_changes(laps, caplog):
    with caplog.at_level('INFO', 'test.laps'):
        for cost in (3.0, 3.3, 6.0):
            laps.pass_(*[1.0] * 20)
            laps.pass_(1 + cost, saves=True)
            assert laps.pass_(1.0) == pytest.approx(max(20, cost / 0.1))
    assert len(caplog.records) == 2  # 3.3 is within a quarter of 3


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize('asynchronous', [False, True])
def test_a_run_saves_first_to_measure_and_then_as_seldom_as_it_must(tmp_path, asynchronous):
    data = write_folder(tmp_path / 'images', classes=3, train=240, val=6)
    cfg = tmp_path / 'small.yaml'
    config = small_config(
        data, DATA__BATCH_SIZE=2, TRAIN__EPOCHS=1, TRAIN__WARMUP_EPOCHS=0,
        TRAIN__SAVE_OVERHEAD=1e-6, CHECKPOINT__KEEP_STEPS=9, CHECKPOINT__ASYNC=asynchronous,
    )  # fmt: skip
    cfg.write_text(config.dump())
    run_ranks(
        training.train_on_ranks, 1, tmp_path, cfg=str(cfg), output=str(tmp_path / 'out'), opts=[],
        ds_config={'zero_optimization': {'stage': 1}},
    )  # fmt: skip
    out = tmp_path / 'out/small'
    steps = sorted(int(path.name.rpartition('_')[2]) for path in out.glob('ckpt_epoch_0_step_*'))
    assert 20 <= steps[0] <= 30
    # On a loaded machine nothing may be seen of what a background save costs: then another follows.
    assert len(steps) == 1 or (asynchronous and min(map(int.__sub__, steps[1:], steps)) >= 10)
    assert 'for TRAIN.SAVE_OVERHEAD 1e-06' in (out / 'log_rank0.txt').read_text()
    # What 'auto' is here: the program alone writes to the weights.
    checkpoint = json.loads((out / 'config.json').read_text())['CHECKPOINT']
    assert checkpoint['ASYNC_COPY'] == 'overlap'
