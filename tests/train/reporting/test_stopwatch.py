"""BENCH: what all ranks saw as one record, and the training program timing itself."""

import json

import pytest

from internvl_ds.train.reporting.stopwatch import BENCH_FILE, summarize
from tests.harness import training
from tests.harness.ranks import run_ranks
from tests.harness.training import write_folder

GB = 2**30


def seen(laps, peak, host='a', device_bytes=None):
    return {
        'laps': laps, 'peak': peak, 'baseline': peak - 1, 'host': host, 'host_bytes': 12 * GB,
        'device': 'cpu' if device_bytes is None else 'H100', 'device_bytes': device_bytes,
    }  # fmt: skip


def test_an_update_lasts_as_long_as_on_its_slowest_rank():
    ranks = [
        seen([(32, 1.0), (32, 2.0), (16, 1.0)], 5),
        seen([(32, 4.0), (32, 1.0), (16, 0.5)], 7),
    ]
    record = summarize(ranks)
    # 32 / 4, 32 / 2 and 16 / 1 images per second: the last update of an epoch is shorter
    assert (record['images_per_s'], record['images_per_s_range']) == (16.0, [8.0, 16.0])
    assert (record['seconds_per_update'], record['updates']) == (2.0, 3)
    assert (record['peak_bytes'], record['baseline_bytes'], record['ranks']) == (7, 6, 2)


def test_ranks_of_one_host_share_its_memory():
    laps = [(1, 1.0)]
    record = summarize([seen(laps, 1, 'a'), seen(laps, 1, 'a'), seen(laps, 1, 'b')])
    assert (record['device'], record['host_bytes'], record['device_bytes']) == (
        'cpu', 6 * GB, 6 * GB,
    )  # fmt: skip
    record = summarize([seen(laps, 1, 'a', 80 * GB), seen(laps, 1, 'b', 40 * GB)])
    assert (record['device'], record['host_bytes'], record['device_bytes']) == (
        'H100', 12 * GB, 40 * GB,
    )  # fmt: skip


@pytest.mark.first
@pytest.mark.ranks
def test_the_program_times_updates_of_several_epochs_and_saves_nothing(tmp_path):
    # 12 images on 2 ranks are 3 micro-batches of 2 on each: updates of 2 and of 1 in an epoch.
    data = write_folder(tmp_path / 'data', classes=3, train=12, val=3)
    results = run_ranks(
        training.time_on_ranks, 2, tmp_path, data=str(data),
        output=str(tmp_path / 'out'),
    )  # fmt: skip
    record = json.loads((tmp_path / 'out' / BENCH_FILE).read_text())
    assert results[0] == results[1]
    assert results[0]['images_per_s'] == record['images_per_s'] > 0
    assert results[0]['updates'] == 8
    assert (record['updates'], record['warmup'], record['ranks']) == (5, 3, 2)
    assert (record['micro_batch'], record['accumulation'], record['global_batch']) == (2, 2, 8)
    assert record['device'] == 'cpu'
    assert record['baseline_bytes'] <= record['peak_bytes'] < record['device_bytes']
    low, high = record['images_per_s_range']
    assert low <= record['images_per_s'] <= high
    assert {path.name for path in (tmp_path / 'out').iterdir()} == {
        BENCH_FILE, 'config.json', 'ds_config.json', 'log_rank0.txt', 'log_rank1.txt',
    }  # fmt: skip
