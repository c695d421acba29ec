"""The training program asks of devices and of NCCL only what they can do.

On CPUs all is noted; with --soak it also runs on the device of tests/harness/device, whose tensors
no operation takes beside the host's.
"""

import pytest
import torch

from internvl_ds.train.model import build_model
from tests.harness.ranks import DEVICE, run_ranks
from tests.harness.training import small_config, write_folder
from tests.train import device_use

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

FAKE = {DEVICE: 'fake'}


@pytest.fixture
def data(tmp_path):
    folder = write_folder(tmp_path / 'data', 3, 24, 12)
    model = build_model(small_config(folder))
    torch.save({'model': model.state_dict()}, folder / 'weights.pth')
    return folder


def train(data, folder, stage, env):
    return run_ranks(
        device_use.train, 2, folder, timeout=400, env=env, data=str(data), output=str(folder),
        stage=stage,
    )  # fmt: skip


def require_orderly(first, second):
    assert first['order'] == second['order']
    assert len(first['order']) > 10
    for result in (first, second):
        assert result['faults'] == []
        assert result['strays'] == []
        assert result['asked'] == ''


@pytest.mark.parametrize('stage', [0, 2, 3])
def test_collectives_are_those_of_nccl_from_the_main_thread_in_one_order(tmp_path, data, stage):
    require_orderly(*train(data, tmp_path, stage, {}))


@pytest.mark.soak_only
@pytest.mark.parametrize('stage', [0, 2, 3])
def test_the_program_trains_on_a_device_and_reads_it_no_more_than_a_bare_loop(
    tmp_path, data, stage
):
    results = train(data, tmp_path, stage, FAKE)
    require_orderly(*results)
    for result in results:
        reads = result['reads']
        (bare,), (_, second) = reads['bare update'], reads['train_one_epoch']
        # Three updates, which ask whether they are finite, two lines of the log, and the mean loss.
        # The first epoch tries things out.
        assert second <= 3 * max(bare, 1) + 2 + 1, reads
        assert reads['evaluate'] == [1] * 4


@pytest.mark.soak_only
def test_all_of_the_selftest_is_right_on_a_device(tmp_path):
    for rows in run_ranks(
        device_use.try_all, 2, tmp_path, timeout=400, env=FAKE, output=str(tmp_path)
    ):
        assert len(rows) == 12
        assert {verdict for _, verdict, _ in rows} == {'ok', 'absent'}, rows
