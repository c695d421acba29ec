"""Images of several labels: their targets, the loss, and the mean average precision."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import nn

from internvl_ds.engine.epochs import seed_everything
from internvl_ds.errors import ConfigError
from internvl_ds.train.data import build_loaders
from internvl_ds.train.datasets.precision import average_precision
from internvl_ds.train.model import build_model
from internvl_ds.train.objective.checks import contradictions
from internvl_ds.train.objective.criterion import build_criterion
from tests.harness.ranks import run_ranks
from tests.harness.training import small_config, write_folder
from tests.train.datasets import sourced
from tests.train.datasets.sourced import images_of
from tests.train.datasets.test_source_errors import line_of

CLASSES = ['a', 'b', 'c', 'd']


def labels_of(number):
    """None of the first image and the eighth, and up to three of the others."""
    return [label for label in range(4) if (number * 7 // 3) >> label & 1][:3]


@pytest.fixture
def folder(tmp_path):
    """Tables of the three kinds of labels: numbers in lists, names in lists, and names in text."""
    root = write_folder(tmp_path / 'images', classes=3, train=16, val=11)
    for split in ('train', 'val'):
        csv, numbers, names = [], [], []
        for number, (path, _, _) in enumerate(images_of(root, split)):
            name = str(path.relative_to(root))
            named = [CLASSES[label] for label in labels_of(number)]
            csv.append(f'{name},{"|".join(named)}\n')
            numbers.append(json.dumps({'path': name, 'label': labels_of(number)}) + '\n')
            names.append(json.dumps({'path': name, 'label': named}) + '\n')
        (root / f'{split}.csv').write_text('path,label\n' + ''.join(csv))
        (root / f'{split}.jsonl').write_text(''.join(numbers))
        (root / 'names').mkdir(exist_ok=True)
        (root / 'names' / f'{split}.jsonl').write_text(''.join(names))
    return root


def several(folder, dataset='jsonl', **values):
    settings = {'MODEL__NUM_CLASSES': 4, 'DATA__MULTI_LABEL': True, 'TRAIN__LOSS': 'bce', **values}
    return small_config(folder, DATA__DATASET=dataset, **settings)


def assert_targets(images):
    for number in range(len(images)):
        target = images[number][1]
        assert target.dtype == torch.float32
        assert target.tolist() == [float(label in labels_of(number)) for label in range(4)]


@pytest.mark.parametrize('form', ['csv', 'jsonl', 'names'])
def test_a_target_has_a_one_for_each_label(folder, form):
    values = {'DATA__META_DATA': str(folder / 'names')} if form == 'names' else {}
    config = several(folder, 'csv' if form == 'csv' else 'jsonl', MODEL__NUM_CLASSES=0, **values)
    loaders = build_loaders(config, 0, 1)
    assert config.MODEL.NUM_CLASSES == 4
    assert loaders.classes == ([] if form == 'jsonl' else CLASSES)
    assert_targets(loaders.val.dataset)
    _, targets = next(iter(loaders.train))
    loss = build_criterion(config, soft_targets=False)(torch.zeros(4, 4), targets)
    assert loss.item() == pytest.approx(np.log(2))


def test_one_label_is_a_list_of_one_where_a_key_says_so(folder):
    (folder / 'val.jsonl').write_text('{"path": "val/class_0/000.png", "label": 2}\n')
    images = build_loaders(several(folder, EVAL_MODE=True), 0, 1).val.dataset
    assert images[0][1].tolist() == [0, 0, 1, 0]


def several_labels(config, split):
    """For DATA.FACTORY."""

    class Several(sourced.Pictures):
        def __getitem__(self, index):
            return super().__getitem__(index)[0], labels_of(index)

    items = Several(Path(config.DATA.DATA_PATH), split)
    items.classes = CLASSES
    return items


def test_a_factory_gives_lists_of_labels(folder):
    config = small_config(
        folder, DATA__FACTORY=f'{__name__}:several_labels', MODEL__NUM_CLASSES=0,
        DATA__MULTI_LABEL=True,
    )  # fmt: skip
    loaders = build_loaders(config, 0, 1)
    assert_targets(loaders.val.dataset)
    assert loaders.val.dataset.multi_label
    config.DATA.MULTI_LABEL = False
    assert 'has the label [], and not an integer of 0 ... 3' in line_of(config)


def test_saved_lists_of_labels_are_read(folder, tmp_path):
    datasets = pytest.importorskip('datasets')
    features = datasets.Features(
        {'image': datasets.Image(), 'labels': datasets.Sequence(datasets.ClassLabel(4, CLASSES))}
    )
    splits = {}
    for split in ('train', 'val'):
        paths = [str(path) for path, _, _ in images_of(folder, split)]
        columns = {'image': paths, 'labels': [labels_of(n) for n in range(len(paths))]}
        splits[split] = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict(splits).save_to_disk(tmp_path / 'saved')
    loaders = build_loaders(several(tmp_path / 'saved', 'hfds'), 0, 1)
    assert loaders.classes == CLASSES
    assert_targets(loaders.val.dataset)


def test_average_precision_is_scikit_learns_with_equal_scores_too():
    generator = np.random.default_rng(0)
    for total in (1, 2, 10, 100):
        scores = generator.integers(0, 7, total).astype(float)
        targets = generator.integers(0, 2, total)
        targets[0] = 1
        wanted = average_precision_score(targets, scores)
        assert average_precision(scores, targets) == pytest.approx(wanted)


def plain_result(folder):
    """The model of `evaluate_several` on all images at once, with nothing of the package."""
    config = several(folder, EVAL_MODE=True)
    images = list(build_loaders(config, 0, 1).val.dataset)
    seed_everything(0)
    model = build_model(config).eval()
    with torch.no_grad():
        logits = model(torch.stack([image for image, _ in images]))
    targets = torch.stack([target for _, target in images])
    loss = nn.functional.binary_cross_entropy_with_logits(logits, targets).item()
    return 100 * average_precision_score(targets, logits, average='macro'), loss


@pytest.mark.ranks
@pytest.mark.slow
def test_the_mean_average_precision_is_of_all_images_on_any_number_of_ranks(folder, tmp_path):
    wanted, loss = plain_result(folder)
    results = [
        result
        for ranks, batch in ((2, 4), (3, 2))
        for result in run_ranks(
            sourced.evaluate_several, ranks, tmp_path, data=str(folder), batch_size=batch
        )
    ]
    for result in results:
        assert result['mAP'] == result['acc1'] == pytest.approx(wanted, abs=1e-4)
        assert result['val_loss'] == pytest.approx(loss, abs=1e-6)
        assert (result['count'], result['labelled']) == (11, 9)
        assert result['told'] == f'mAP {wanted:.2f} % loss {loss:.4f}'


def test_evaluation_without_a_label_is_refused(folder, tmp_path):
    (folder / 'val.jsonl').write_text('{"path": "val/class_0/000.png", "label": []}\n')
    with pytest.raises(ConfigError, match='none of the images evaluated has a label'):
        sourced.evaluate_several(str(folder), 4)


@pytest.mark.ranks
@pytest.mark.slow
def test_training_on_several_labels_goes_on_inside_an_epoch(folder, tmp_path):
    results = run_ranks(
        sourced.train_from, 2, tmp_path, data=str(folder), root=str(tmp_path), dataset='jsonl',
        opts={'DATA__MULTI_LABEL': True, 'TRAIN__LOSS': 'bce', 'TRAIN__EMA__ENABLE': True},
    )  # fmt: skip
    for result in results:
        whole, resumed = result['whole'], result['resumed']
        assert whole['last'] == resumed['last']
        assert whole['classes'] == 4
        assert {'mAP', 'ema_mAP', 'val_loss'} <= whole['last'].keys()
        assert not {'acc1', 'acc5'} & whole['last'].keys()
        assert whole['best'] >= whole['last']['mAP'] > 0
    assert 'best mAP' in results[0]['whole']['log']
    assert 'top-1' not in results[0]['whole']['log']


def test_a_loss_of_one_label_is_refused(folder):
    found = contradictions(several(folder, TRAIN__LOSS=''))
    assert [each.message for each in found] == [
        "TRAIN.LOSS is '', and DATA.MULTI_LABEL True gives images several labels: set 'bce'"
    ]
