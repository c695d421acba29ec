"""A checkpoint of the original's own main.py in the training program, and the way back."""

import pytest

from tests.harness.ranks import run_ranks
from tests.harness.training import write_folder
from tests.train import original_pth


@pytest.mark.ranks
def test_a_file_of_the_original_resumes_in_the_program_and_its_export_does_there(tmp_path):
    data = write_folder(tmp_path / 'images', classes=3, train=16, val=6)
    for found in run_ranks(
        original_pth.resume, 2, tmp_path, data=data, folder=tmp_path, stages=[0, 1, 3]
    ):
        for stage, got in found.items():
            assert (got['best'], got['start']) == (12.5, 1), stage
            assert got['differing'] == [] == got['back'], stage
            assert got['groups'] == 2, stage  # merged: ZeRO partitions and reduces by group
