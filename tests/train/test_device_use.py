"""The training program asks of devices and of NCCL only what they can do; on CPUs all is noted."""

import pytest
import torch

from internvl_ds.train.model import build_model
from tests.harness.ranks import run_ranks
from tests.harness.training import small_config, write_folder
from tests.train import device_use


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize('stage', [0, 2, 3])
def test_collectives_are_those_of_nccl_from_the_main_thread_in_one_order(tmp_path, stage):
    data = write_folder(tmp_path / 'data', 3, 24, 12)
    model = build_model(small_config(data))
    torch.save({'model': model.state_dict()}, data / 'weights.pth')
    first, second = run_ranks(
        device_use.train, 2, tmp_path, timeout=200, data=str(data), output=str(tmp_path),
        stage=stage,
    )  # fmt: skip
    assert first['order'] == second['order']
    assert len(first['order']) > 10
    for result in (first, second):
        assert result['faults'] == []
        assert result['strays'] == []
        assert result['asked'] == ''
