"""Every source of images: the same images and labels, dealt out once, in an order that repeats."""

import hashlib
import importlib.util
import os

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor

from internvl_ds.train.data import build_loaders, order_of, start_epoch
from tests.harness.ranks import run_ranks
from tests.harness.training import small_config, write_folder
from tests.train.datasets import sourced
from tests.train.datasets.sourced import FORMS, SPLITS, images_of, settings_of, write_tar

WITHOUT = importlib.util.find_spec('datasets') is None
FORM_NAMES = [
    pytest.param(
        form, marks=pytest.mark.skipif(form == 'saved' and WITHOUT, reason='needs datasets')
    )
    for form in FORMS
]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp('images'), classes=3, train=25, val=7)


def digest(image):
    return hashlib.sha256(image.numpy().tobytes()).hexdigest()


def files_of(folder, split):
    """Digest of the pixels of each image, and its label."""
    images = images_of(folder, split)
    return sorted((digest(to_tensor(Image.open(p).convert('RGB'))), n) for p, _, n in images)


def read(loader):
    """The images of a loader as they are in their files, with labels."""
    getattr(loader.dataset, 'images', loader.dataset).transform = to_tensor
    batches = list(loader)
    return [
        (digest(image), int(label))
        for images, labels in batches
        for image, label in zip(images, labels, strict=True)
    ]


@pytest.mark.parametrize('form', FORM_NAMES)
def test_an_epoch_over_ranks_and_workers_has_each_image_once(folder, tmp_path, form):
    path, settings = settings_of(form, folder, tmp_path)
    config = small_config(path, DATA__NUM_WORKERS=2, DATA__BATCH_SIZE=3, **settings)
    shares, evaluated = [], []
    for rank in range(2):
        loaders = build_loaders(config, rank, 2)
        start_epoch(loaders.train, 0, 0, rank)
        shares.append(read(loaders.train))
        evaluated += read(loaders.val)[: loaders.val.sampler.num_valid]
    assert [len(share) for share in shares] == [12, 12]
    seen = shares[0] + shares[1]
    assert len(set(seen)) == 24
    assert set(seen) <= set(files_of(folder, 'train'))
    assert sorted(evaluated) == files_of(folder, 'val')
    named = ['class_0', 'class_1', 'class_2']
    assert loaders.classes in (named, [])
    assert bool(loaders.classes) is not ('numbers' in form or 'shards' in form)


@pytest.mark.parametrize('form', FORM_NAMES)
def test_an_epoch_goes_on_at_the_next_batch_and_repeats(folder, tmp_path, form):
    path, settings = settings_of(form, folder, tmp_path)
    config = small_config(path, DATA__NUM_WORKERS=2, AUG__REPROB=0.5, **settings)

    def epoch(done=0):
        loader = build_loaders(config, 1, 2).train
        start_epoch(loader, 0, 3, 1, micro_batches=done)
        batches = list(loader)
        return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]), loader

    images, labels, loader = epoch()
    for done in (0, 1):
        again, same, other = epoch(done)
        assert torch.equal(again, images[4 * done :])
        assert torch.equal(same, labels[4 * done :])
        assert order_of(other, 0) == order_of(loader, 0)


@pytest.mark.parametrize('form', FORM_NAMES)
def test_the_number_of_classes_follows_the_images(folder, tmp_path, form):
    path, settings = settings_of(form, folder, tmp_path)
    for mode in (False, True):
        config = small_config(path, MODEL__NUM_CLASSES=0, EVAL_MODE=mode, **settings)
        loaders = build_loaders(config, 0, 1)
        assert config.MODEL.NUM_CLASSES == loaders.val.dataset.num_classes == 3


def test_a_run_goes_on_with_the_same_images_in_a_tar(folder, tmp_path):
    write_tar(folder, tmp_path)
    orders = [
        order_of(build_loaders(small_config(path, DATA__DATASET=kind), 0, 1).train, 0)
        for path, kind in ((folder, 'imagenet'), (tmp_path, 'tar'))
    ]
    assert orders[0] == orders[1]


@pytest.mark.parametrize('form', ['tar', 'shards', 'csv of names'])
def test_images_are_kept_in_memory_from_any_source(folder, tmp_path, form):
    path, settings = settings_of(form, folder, tmp_path)
    config = small_config(path, DATA__IMG_ON_MEMORY=True, **settings)
    loader = build_loaders(config, 0, 2).train
    kept = loader.dataset.images.source
    assert kept.kept_bytes == sum(kept.size(index) for index in range(0, 25, 2))
    start_epoch(loader, 0, 0, 0)
    assert len(set(read(loader))) == 12


def test_a_faulty_image_in_a_tar_is_named_or_skipped(folder, tmp_path):
    broken = tmp_path / 'images'
    for split in SPLITS:
        for path, name, _ in images_of(folder, split):
            target = broken / split / name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    (broken / 'train' / 'class_1' / '001.png').write_bytes(b'')
    write_tar(broken, tmp_path / 'tars')
    settings = {'DATA__DATASET': 'tar', 'DATA__MAX_SKIPPED': 0.1}
    loader = build_loaders(small_config(tmp_path / 'tars', **settings), 0, 1).train
    named = rf'{tmp_path}/tars/train.tar@/class_1/001.png cannot be used .* it is empty'
    with pytest.raises(ValueError, match=named):
        read(loader)
    config = small_config(tmp_path / 'tars', DATA__ON_ERROR='skip', **settings)
    loaders = build_loaders(config, 0, 1)
    assert len(read(loaders.train)) == 24
    loaders.skipped.untold()
    assert len(loaders.skipped.found) == 1


def test_no_file_stays_open(folder, tmp_path):
    path, settings = settings_of('shards', folder, tmp_path)
    loaders = build_loaders(small_config(path, **settings), 0, 1)
    before = len(os.listdir('/proc/self/fd'))
    read(loaders.val)
    assert len(os.listdir('/proc/self/fd')) == before


@pytest.mark.ranks
@pytest.mark.slow
def test_training_on_shards_goes_on_inside_an_epoch_bit_for_bit(folder, tmp_path):
    path, _ = settings_of('shards', folder, tmp_path / 'data')
    results = run_ranks(
        sourced.train_from, 2, tmp_path, data=str(path), root=str(tmp_path), dataset='wds', opts={}
    )
    for result in results:
        assert result['whole']['last'] == result['resumed']['last']
        assert result['whole']['classes'] == 3
        assert 'epoch 1 goes on after micro-batch 1 of 3' in result['resumed']['log']
    assert 'begun anew' not in results[0]['resumed']['log']


@pytest.mark.ranks
def test_ranks_that_find_other_numbers_of_classes_all_say_so(folder, tmp_path):
    other = write_folder(tmp_path / 'other', classes=2, train=4, val=4)
    said = run_ranks(sourced.set_up_apart, 2, tmp_path, paths=[str(folder), str(other)])
    words = 'the images that ranks 1 find have 2 classes, and those of rank 0 3: set'
    assert all(words in each for each in said)
