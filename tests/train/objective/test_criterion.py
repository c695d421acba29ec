"""TRAIN.LOSS: timm's binary cross entropy, for labels, mixed and multi-hot targets."""

import pytest
import torch
from timm.loss import BinaryCrossEntropy

from internvl_ds.train.objective.criterion import build_criterion
from tests.harness.ranks import run_ranks
from tests.harness.training import small_config, write_folder
from tests.train.objective.following import follow_plain_loop, require_same_epoch

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.1, 0.2, -3.0]])


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp('images'), classes=3, train=29, val=7)


@pytest.mark.parametrize('soft', [False, True])
@pytest.mark.parametrize(('threshold', 'total'), [(None, False), (0.2, True)])
@pytest.mark.parametrize('targets', [[2, 0], [[1, 0, 1], [0, 0, 1]], [[0.7, 0.3, 0], [0, 0.1, 1]]])
def test_bce_is_timms_whatever_the_targets(tmp_path, soft, threshold, total, targets):
    config = small_config(
        tmp_path, TRAIN__LOSS='bce', TRAIN__BCE_TARGET_THRESH=threshold, TRAIN__BCE_SUM=total,
        MODEL__LABEL_SMOOTHING=0.15,
    )  # fmt: skip
    targets = torch.tensor(targets)
    theirs = BinaryCrossEntropy(0.15, target_threshold=threshold, sum_classes=total)
    expected = theirs(LOGITS, targets.float() if targets.dim() == 2 else targets)
    assert torch.equal(build_criterion(config, soft)(LOGITS, targets), expected)
    if targets.is_floating_point():
        assert torch.equal(build_criterion(config, soft)(LOGITS, targets.double()), expected)


@pytest.mark.first
@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize(
    ('stage', 'opts', 'bce', 'multi_hot'),
    [
        (0, {'AUG__MIXUP': 0.8, 'AUG__CUTMIX': 1.0}, {}, False),
        (2, {'MODEL__LABEL_SMOOTHING': 0.2}, {'smoothing': 0.2}, False),
        (
            3, {'TRAIN__BCE_SUM': True, 'TRAIN__BCE_TARGET_THRESH': 0.2},
            {'sum_classes': True, 'target_threshold': 0.2}, True,
        ),
    ],
    ids=['mixup', 'labels', 'multi_hot'],
)  # fmt: skip
def test_an_epoch_is_that_of_a_plain_loop(tmp_path, data, stage, opts, bce, multi_hot):
    results = run_ranks(
        follow_plain_loop, 2, tmp_path, data=str(data), output=str(tmp_path / 'out'), stage=stage,
        opts={'TRAIN__LOSS': 'bce', **opts}, bce=bce, multi_hot=multi_hot,
    )  # fmt: skip
    for result in results:
        require_same_epoch(result)
