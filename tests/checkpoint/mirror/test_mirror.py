"""Runs whose tags are in a second directory too."""

import pytest

from tests.checkpoint.mirror import mirroring
from tests.harness.ranks import run_ranks


def require_gone_on(found, root):
    """What `mirroring.lose_and_go_on` has to find."""
    for got in found:
        assert got['mirror'] == ['ckpt_epoch_1', 'ckpt_epoch_2', 'ckpt_epoch_best']
        assert got['path'] == f'{root}/new/ckpt_epoch_2'
        assert got['same']
        assert got['damage'] == []
        assert got['latest'] == 'ckpt_epoch_2'
        assert got['after'] == ['ckpt_epoch_2', 'ckpt_epoch_best', 'ckpt_epoch_3']
        assert got['at hand'] == got['repaired'] == f'{root}/new/ckpt_epoch_3'


@pytest.mark.first
@pytest.mark.ranks
@pytest.mark.parametrize(
    ('stage', 'asynchronous'),
    [(3, True), pytest.param(1, False, marks=pytest.mark.soak_only)],  # the same by another path
)
def test_a_run_that_lost_its_output_goes_on_from_the_mirror_bit_for_bit(
    tmp_path, stage, asynchronous
):
    found = run_ranks(
        mirroring.lose_and_go_on, 2, tmp_path, root=str(tmp_path),
        address=f'file://{tmp_path}/mirror', stage=stage, asynchronous=asynchronous,
    )  # fmt: skip
    require_gone_on(found, tmp_path)
