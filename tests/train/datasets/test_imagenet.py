"""ImageNet's variants: logits, labels, places, and numbers as of a plain loop over all images."""

import json
import pkgutil

import pytest

from internvl_ds.errors import ConfigError
from internvl_ds.train.data import build_loaders
from internvl_ds.train.datasets.imagenet import labels_of_folders, real_answers, wnids_1k
from tests.harness.ranks import run_ranks
from tests.train.datasets import made
from tests.train.datasets.made import (
    error_of,
    evaluate_all,
    plain_result,
    variant_config,
    write_image,
    write_variant,
)

# The loss is summed in another order and from other batches: at most 2**-23 of each of a few
# hundred roundings of float32, of values below 10.
LOSS = 1e-4


def of_timm(name):
    return pkgutil.get_data('timm.data', f'_info/{name}').decode().split()


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """All variants, with few classes: the root of the original's README."""
    root = tmp_path_factory.mktemp('data')
    wnids = wnids_1k()
    write_variant(
        root / 'imagenet-a', {wnids[label]: label for label in (6, 11, 13, 17, 300, 301, 988)}
    )
    write_variant(
        root / 'imagenet-r', {wnids[label]: label for label in (1, 2, 4, 30, 31, 600)}, '.JPEG'
    )
    write_variant(root / 'imagenet-sketch', {wnids[label]: label for label in (0, 5, 77, 998, 999)})
    v2 = root / 'imagenetv2' / 'ImageNetV2-matched-frequency'
    write_variant(v2, {str(label): label for label in (0, 1, 2, 9, 10, 11, 100, 999)})
    listed = {}
    for number, (label, shown) in enumerate([(65, 65), (970, 795), (230, 229), (809, 809)], 1):
        name = f'ILSVRC2012_val_{number:08d}.JPEG'
        write_image(root / 'imagenet-1k' / 'val' / name, shown)
        listed[name] = label
    lists = root / 'imagenet-1k' / 'meta_data'
    lists.mkdir()
    lines = ''.join(f'{name} {label}\n' for name, label in listed.items())
    (lists / 'val.txt').write_text(lines)
    return root


def expected(data, dataset):
    """Of the plain loop."""
    wnids = list(wnids_1k())
    if dataset in ('imagenet', 'imagenet-real'):
        root = data / 'imagenet-1k'
        lines = (root / 'meta_data' / 'val.txt').read_text().splitlines()
        labels = {name: int(label) for name, label in map(str.split, lines)}
        real = json.loads(pkgutil.get_data('timm.data', '_info/imagenet_real_labels.json'))
        return plain_result(
            (
                root / 'val' / name,
                label,
                set(real[number]) if dataset == 'imagenet-real' else {label},
            )
            for number, (name, label) in enumerate(labels.items())
        )
    root = data / dataset.replace('_', '-')
    if dataset == 'imagenetv2':
        root = root / 'ImageNetV2-matched-frequency'
    folders = sorted(path.name for path in root.iterdir())
    labels = [int(n) if dataset == 'imagenetv2' else wnids.index(n) for n in folders]
    return plain_result(
        (
            (path, label, {label})
            for folder, label in zip(folders, labels, strict=True)
            for path in sorted((root / folder).iterdir())
        ),
        labels if dataset in ('imagenet_a', 'imagenet_r') else None,
    )


PATHS = {
    'imagenet': 'imagenet-1k',
    'imagenet-real': 'imagenet-1k',
    'imagenetv2': 'imagenetv2',
    'imagenet_a': 'imagenet-a',
    'imagenet_r': 'imagenet-r',
    'imagenet_sketch': 'imagenet-sketch',
}


def compare(result, wanted):
    assert {key: result[key] for key in ('acc1', 'acc5', 'count', 'labelled')} == {
        key: wanted[key] for key in ('acc1', 'acc5', 'count', 'labelled')
    }
    assert result['loss'] == pytest.approx(wanted['loss'], abs=LOSS)


@pytest.mark.parametrize('batch_size', [1, 5])
def test_every_variant_is_counted_as_by_a_plain_loop(data, batch_size):
    results = {}
    for dataset, path in PATHS.items():
        config = variant_config(data / path, dataset, DATA__BATCH_SIZE=batch_size)
        loaders = build_loaders(config, 0, 1)
        result = vars(made.evaluate(config, made.Colours(), loaders.val, made.torch.device('cpu')))
        compare(result, expected(data, dataset))
        results[dataset] = result
        assert list(loaders.classes) == list(wnids_1k())
    # Among its own seven classes the nearest one is right more often than among a thousand.
    assert results['imagenet_a']['acc1'] > results['imagenet_sketch']['acc1'] == 100 / 3
    # The first image has no label of ReaL; the second is taken for the second of its two.
    assert results['imagenet-real']['labelled'] == 3
    assert results['imagenet-real']['acc1'] == pytest.approx(200 / 3)
    assert results['imagenet']['acc1'] == 50.0


@pytest.mark.first
@pytest.mark.ranks
def test_every_variant_on_two_ranks_is_that_of_one_process(data, tmp_path):
    cases = [[str(data / path), dataset, {}] for dataset, path in PATHS.items()]
    cases += [[str(data / 'imagenet-a'), 'imagenet_a', {'TEST__SEQUENTIAL': True}]]
    ranks = run_ranks(evaluate_all, 2, tmp_path, cases=cases)
    assert ranks[0] == ranks[1]
    for result, dataset in zip(ranks[0], [*PATHS, 'imagenet_a'], strict=True):
        compare(result, expected(data, dataset))
    config = variant_config(data / 'imagenet-a', 'imagenet_a')
    loader = build_loaders(config, 0, 1).val
    whole = vars(made.evaluate(config, made.Colours(), loader, made.torch.device('cpu')))
    assert ranks[0][-1] == whole  # bit for bit: the batches are the same


@pytest.mark.parametrize(('name', 'members'), [('a', (6, 11, 988)), ('r', (1, 2, 988))])
def test_the_masks_of_a_and_r_are_the_originals(tmp_path, name, members):
    """Whose 200 classes timm has as a list of their own."""
    wnids = of_timm(f'imagenet_{name}_synsets.txt')
    for wnid in wnids:
        write_image(tmp_path / wnid / '0.png', 0)
    config = variant_config(tmp_path, f'imagenet_{name}')
    measure = build_loaders(config, 0, 1).val.dataset.measure
    columns = measure.columns.tolist()
    assert columns == list(map(int, of_timm(f'imagenet_{name}_indices.txt')))
    assert len(columns) == 200
    assert (members[0] in columns, members[1] in columns) == (True, True)


def test_numbers_are_labels_and_not_places_in_the_order_of_text(tmp_path):
    for path in (tmp_path, tmp_path / 'ImageNetV2-matched-frequency'):
        write_variant(path, {name: int(name) for name in ('0', '1', '2', '10', '999')})
        images = build_loaders(variant_config(path, 'imagenetv2'), 0, 1).val.dataset
        labels = {
            images.source.where(index).split('/')[-2]: int(images.labels[index])
            for index in range(len(images))
        }
        assert labels == {name: int(name) for name in labels}


@pytest.mark.parametrize(
    ('dataset', 'folders', 'words'),
    [
        ('imagenet_a', ['n01440764', 'n99999999'], 'no WordNet ids of ImageNet-1K .*: n99999999'),
        ('imagenet_r', ['0', '1'], 'no WordNet ids of ImageNet-1K .*: 0, 1'),
        ('imagenetv2', ['0', '1000'], 'nor all labels 0 ... 999: 1000'),
        ('imagenetv2', ['1', '01'], 'the same label: 1, 1'),
        ('imagenetv2', ['0', 'n01440764'], 'nor all labels 0 ... 999: 0'),
    ],
)
def test_folders_of_no_known_class_are_named(tmp_path, dataset, folders, words):
    for folder in folders:
        write_image(tmp_path / folder / '0.png', 0)
    with pytest.raises(ConfigError, match=words):
        labels_of_folders(tmp_path, sorted(folders), numbers=dataset == 'imagenetv2')
    assert str(tmp_path) in error_of(variant_config(tmp_path, dataset))


def test_what_only_evaluates_refuses_to_train_by_name(data):
    config = variant_config(data / 'imagenet-a', 'imagenet_a', EVAL_MODE=False)
    assert "DATA.DATASET 'imagenet_a' has no training images" in error_of(config)
    config = variant_config(data / 'imagenet-a', 'imagenet_a', MODEL__NUM_CLASSES=10)
    assert 'MODEL.NUM_CLASSES is 10' in error_of(config)


def test_a_part_of_a_published_data_set_is_not_taken_for_it(data, caplog):
    build_loaders(variant_config(data / 'imagenet-r', 'imagenet_r'), 0, 1)
    assert 'has 18 images of 6 classes, and imagenet_r as it is published has 30000 of 200' in (
        caplog.text
    )


def test_reals_labels_come_from_a_file_where_one_is_named(tmp_path):
    path = tmp_path / 'real.json'
    path.write_text('[[1], [], [2, 3]]')
    names = ['n01/ILSVRC2012_val_00000003.JPEG', 'ILSVRC2012_val_00000002.png']
    assert real_answers(str(path), names, 'data') == [(2, 3), ()]
    with pytest.raises(ConfigError, match='data/ILSVRC2012_val_00000004.JPEG: ReaL has labels'):
        real_answers(str(path), ['ILSVRC2012_val_00000004.JPEG'], 'data')
    with pytest.raises(ConfigError, match='data/cat.png: ReaL has labels'):
        real_answers('', ['cat.png'], 'data')
    for text in ('{}', '[[1000]]', '[[true]]', '[1]', 'x'):
        path.write_text(text)
        with pytest.raises(ConfigError, match='DATA.REAL_LABELS'):
            real_answers(str(path), names, 'data')


def test_images_without_any_label_of_real_are_an_error(tmp_path):
    write_image(tmp_path / 'val' / 'ILSVRC2012_val_00000001.JPEG', 65)
    (tmp_path / 'meta_data').mkdir()
    (tmp_path / 'meta_data' / 'val.txt').write_text('ILSVRC2012_val_00000001.JPEG 65\n')
    config = variant_config(tmp_path, 'imagenet-real')
    loader = build_loaders(config, 0, 1).val
    with pytest.raises(ConfigError, match='none of the 1 images has a label that counts'):
        made.evaluate(config, made.Colours(), loader, made.torch.device('cpu'))
