"""DATA.CLASS_WEIGHTS: an epoch beside a plain loop, the numbers taken from the data, refusals."""

import json

import pytest
import torch

from internvl_ds.errors import ConfigError
from internvl_ds.train.data import build_loaders
from tests.harness.ranks import run_ranks
from tests.harness.training import small_config, write_folder
from tests.train.objective.following import follow_plain_loop, require_same_epoch

COUNTS = 13, 9, 7  # training images of the classes
BALANCED = [29 / (3 * count) for count in COUNTS]


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = write_folder(tmp_path_factory.mktemp('images'), classes=3, train=39, val=7)
    for label, count in enumerate(COUNTS):
        for path in sorted((root / f'train/class_{label}').iterdir())[count:]:
            path.unlink()
    return root


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize(
    ('stage', 'opts', 'plain'),
    [
        (
            1, {'DATA__CLASS_WEIGHTS': 'balanced', 'MODEL__LABEL_SMOOTHING': 0.2},
            {'weights': BALANCED},
        ),
        (3, {'DATA__CLASS_WEIGHTS': [0.5, 0, 3], 'AUG__MIXUP': 0.8}, {'weights': [0.5, 0.0, 3.0]}),
        (
            2, {'DATA__CLASS_WEIGHTS': 'balanced', 'TRAIN__LOSS': 'bce'},
            {'bce': {'smoothing': 0.1, 'pos_weight': [16 / 13, 20 / 9, 22 / 7]}},
        ),
    ],
    ids=['balanced', 'mixup', 'bce'],
)  # fmt: skip
def test_an_epoch_is_that_of_a_plain_loop(tmp_path, data, stage, opts, plain):
    results = run_ranks(
        follow_plain_loop, 2, tmp_path, data=str(data), output=str(tmp_path / 'out'), stage=stage,
        opts=opts, **plain,
    )  # fmt: skip
    for result in results:
        require_same_epoch(result)


def weights_of(data, **opts):
    return build_loaders(small_config(data, **opts), 0, 2).weights


def test_balanced_weights_have_the_mean_1_over_the_images(data):
    weights = weights_of(data, DATA__CLASS_WEIGHTS='balanced')
    assert weights.tolist() == pytest.approx(BALANCED)
    assert weights @ torch.tensor(COUNTS, dtype=torch.float32) == pytest.approx(29)
    assert weights_of(data) is None
    assert weights_of(data, DATA__CLASS_WEIGHTS='balanced', EVAL_MODE=True) is None


def test_of_several_labels_each_class_is_balanced_by_itself(tmp_path, data):
    root = tmp_path / 'table'
    root.mkdir()
    image = next((data / 'train/class_0').iterdir())
    for split in ('train', 'val'):
        lines = [{'path': str(image), 'label': label} for label in ([0, 1], [1], [1, 2, 2], [])]
        (root / f'{split}.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    opts = {'DATA__DATASET': 'jsonl', 'DATA__MULTI_LABEL': True, 'TRAIN__LOSS': 'bce'}
    weights = weights_of(root, DATA__CLASS_WEIGHTS='balanced', DATA__BATCH_SIZE=1, **opts)
    assert weights.tolist() == pytest.approx([3, 1 / 3, 3])
    for split in ('train', 'val'):
        lines = [{'path': str(image), 'label': label} for label in ([0, 1], [1])]
        (root / f'{split}.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    with pytest.raises(ConfigError, match='all images of .* have the classes 1, which would weigh'):
        weights_of(root, DATA__CLASS_WEIGHTS='balanced', DATA__BATCH_SIZE=1,
                   **opts | {'MODEL__NUM_CLASSES': 2})  # fmt: skip


@pytest.mark.parametrize(
    ('opts', 'words'),
    [
        (
            {'DATA__CLASS_WEIGHTS': [1.0, 2.0], 'MODEL__NUM_CLASSES': 0},
            'has 2 numbers, and .* has 3 classes',
        ),
        (
            {
                'DATA__CLASS_WEIGHTS': 'balanced', 'DATA__META_DATA': 'lists',
                'MODEL__NUM_CLASSES': 4, 'DATA__BATCH_SIZE': 1,
            },
            'has no image of the classes 2, 3: list the weights',
        ),
        (
            {
                'DATA__CLASS_WEIGHTS': 'balanced',
                'DATA__FACTORY': 'tests.train.objective.test_class_weights:made',
            },
            "the labels of DATA.FACTORY '.*' are known when its items are read",
        ),
    ],
    ids=['length', 'empty', 'factory'],
)  # fmt: skip
def test_what_has_no_weights_is_refused(tmp_path, data, monkeypatch, opts, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'lists').mkdir()
    for split in ('train', 'val'):
        names = [f'class_{n}/{sorted((data / split / f"class_{n}").iterdir())[0].name} {n}\n'
                 for n in (0, 1)]  # fmt: skip
        (tmp_path / f'lists/{split}.txt').write_text(''.join(names))
    with pytest.raises(ConfigError, match=words):
        weights_of(data, **opts)


def made(config, split):
    """A data set of its own."""
    return [(torch.zeros(3, config.DATA.IMG_SIZE, config.DATA.IMG_SIZE), 0)] * 9
