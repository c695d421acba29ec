"""Faulty and odd images: what is read, what is refused by name, and what takes its place."""

import errno
import io
import json
import logging
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from internvl_ds.errors import ConfigError, DataError
from internvl_ds.train.data import build_loaders, start_epoch
from internvl_ds.train.datasets import skipping as skipping_module
from internvl_ds.train.datasets.decode import decode
from internvl_ds.train.datasets.skipping import Skipped, is_of_file
from internvl_ds.train.datasets.sources import Folder
from internvl_ds.train.datasets.transforms import build_transform
from internvl_ds.train.sampler import TrainSampler
from tests.harness import training
from tests.harness.ranks import run_ranks
from tests.harness.training import small_config, write_folder
from tests.train.datasets.made import error_of, write_variant
from tests.train.faulty import PICTURES, encode, write_pictures

UNIT = {'AUG__MEAN': [0.0] * 3, 'AUG__STD': [1.0] * 3}


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    config = small_config(
        write_pictures(tmp_path_factory.mktemp('pictures')), EVAL_MODE=True, MODEL__NUM_CLASSES=1,
        DATA__INTERPOLATION='bilinear', **UNIT,
    )  # fmt: skip
    images = build_loaders(config, 0, 1).val.dataset
    return {Path(images.source.where(n)).name: (images, n) for n in range(len(images))}


def test_there_are_all_kinds_of_pictures(pictures):
    assert len(PICTURES) == len(pictures) > 40


@pytest.mark.parametrize('picture', PICTURES, ids=[picture.name for picture in PICTURES])
def test_a_picture_is_read_rightly_or_refused_by_name(pictures, picture):
    images, number = pictures[picture.name]
    if picture.mean is not None:
        assert float(images[number][0].mean()) == pytest.approx(picture.mean, abs=0.015)
        return
    with pytest.raises(DataError) as caught:
        images[number]
    said = str(caught.value)
    assert said.startswith(f'{images.source.where(number)} cannot be used as an image: ')
    assert picture.words in said
    assert 'mend or remove it' in said
    assert '\n' not in said


def test_each_level_of_16_bits_is_divided_by_257():
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    read = decode(encode(Image.fromarray(levels), 'PNG'), upright=True)
    assert np.array_equal(np.asarray(read)[..., 0], np.rint(levels / 257))


@pytest.mark.parametrize(
    ('dataset', 'rotate', 'turned'),
    [
        ('imagenet', None, True), ('imagenet', True, True), ('imagenet', False, False),
        ('imagenetv2', None, False), ('imagenetv2', True, True), ('imagenetv2', False, False),
    ],
)  # fmt: skip
def test_exif_turns_an_image_as_the_key_says(tmp_path, dataset, rotate, turned):
    folder = tmp_path if dataset == 'imagenetv2' else tmp_path / 'val'
    write_variant(folder, {'0': 0, '1': 1})
    config = small_config(
        tmp_path, DATA__DATASET=dataset, DATA__EXIF_ROTATE=rotate, EVAL_MODE=True,
        MODEL__NUM_CLASSES=1000 if dataset == 'imagenetv2' else 2, **UNIT,
    )  # fmt: skip
    images = build_loaders(config, 0, 1).val.dataset
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)
    flipped = pixels.transpose(1, 0, 2)
    # As EXIF defines them: where the file's first row and column are seen.
    seen = [
        pixels, pixels[:, ::-1], pixels[::-1, ::-1], pixels[::-1],
        flipped, flipped[:, ::-1], flipped[::-1, ::-1], flipped[::-1],
    ]  # fmt: skip
    for orientation, right in enumerate(seen, 1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(pixels).save(folder / '0' / '0.png', exif=exif)
        read = images[0][0].permute(1, 2, 0).numpy() * 255
        assert np.array_equal(read.round(), right if turned else pixels), orientation


@pytest.mark.parametrize('kind', ['u1', 'u2'])
@pytest.mark.parametrize('upright', [True, False])
def test_pillow_turns_tiff_files_and_they_are_not_turned_twice(kind, upright):
    levels = np.random.default_rng(0).integers(0, 255, (8, 16))
    pixels = Image.fromarray((levels * (257 if kind == 'u2' else 1)).astype(kind))
    exif = Image.Exif()
    exif[0x0112] = 6
    read = decode(encode(pixels, 'TIFF', exif=exif), upright=upright)
    assert np.array_equal(np.asarray(read)[..., 0], np.rot90(levels, -1))


def test_a_strip_that_would_fill_the_memory_is_refused(tmp_path):
    strip = Image.new('RGB', (20_000, 1))
    with pytest.raises(ValueError, match=r'20000 x 1 pixels, and 1004 million .* resized to 224'):
        build_transform(small_config(tmp_path, DATA__IMG_SIZE=224), training=False)(strip)


FAULTY = ('class_0/003.png', 'class_1/001.png', 'class_2/005.png')


def damage(root, names):
    """Empties, truncates and removes images in turn; a removed one is a link that leads nowhere."""
    for turn, name in enumerate(names):
        path = root / name
        if turn % 3 == 2:
            path.unlink()
            path.symlink_to('nowhere')
        else:
            path.write_bytes(path.read_bytes()[: 60 * turn])


@pytest.fixture
def data(tmp_path):
    return write_folder(tmp_path / 'data', classes=3, train=30, val=7)


def skipping(data, share=0.1, **values):
    return small_config(
        data, DATA__ON_ERROR='skip', DATA__MAX_SKIPPED=share, DATA__IMG_SIZE=40, AUG__REPROB=0.5,
        **values,
    )  # fmt: skip


def epoch_of(config, epoch=0):
    """The batches of an epoch on one rank, and what was found to be faulty."""
    loaders = build_loaders(config, 0, 1)
    start_epoch(loaders.train, 0, epoch, 0)
    batches = list(loaders.train)
    assert loaders.skipped.untold() == len(loaders.skipped.found)
    images, labels = (torch.cat(each) for each in zip(*batches, strict=True))
    return images, labels, loaders.skipped.found


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('memory', [False, True])
def test_others_take_the_places_of_faulty_images(data, workers, memory):
    sound = epoch_of(skipping(data, DATA__BATCH_SIZE=5))
    damage(data / 'train', FAULTY)
    where = {'DATA__NUM_WORKERS': workers, 'DATA__IMG_ON_MEMORY': memory}
    images, labels, found = epoch_of(skipping(data, DATA__BATCH_SIZE=5, **where))
    again = epoch_of(skipping(data, DATA__BATCH_SIZE=5, **where))
    assert torch.equal(images, again[0])
    assert torch.equal(labels, again[1])
    assert sorted(found) == [1, 10, 21]
    assert [text.split(' cannot')[0] for _, text in sorted(found.items())] == [
        str(data / 'train' / name) for name in FAULTY
    ]
    # Only they are replaced, and by sound images.
    other = [n for n in range(30) if not torch.equal(images[n], sound[0][n])]
    assert len(other) == 3
    assert labels[[n for n in range(30) if n not in other]].tolist() == [
        label for n, label in enumerate(sound[1].tolist()) if n not in other
    ]


@pytest.mark.parametrize('mode', ['no', 'part', 'full'])
def test_in_zip_files_too(data, tmp_path, mode):
    """Also an entry with another checksum, which no image can be made of."""
    damage(data / 'train', FAULTY[:2])
    for split in ('train', 'val'):
        with zipfile.ZipFile(tmp_path / f'{split}.zip', 'w') as archive:
            for path in sorted((data / split).rglob('*.png')):
                archive.write(path, path.relative_to(data / split))
    with zipfile.ZipFile(tmp_path / 'train.zip') as archive:
        entry = archive.getinfo(FAULTY[2])
    content = bytearray((tmp_path / 'train.zip').read_bytes())
    content[entry.header_offset + 80] ^= 255
    (tmp_path / 'train.zip').write_bytes(content)
    damage(data / 'train', [FAULTY[2]])
    zipped = epoch_of(skipping(tmp_path, DATA__ZIP_MODE=True, DATA__CACHE_MODE=mode))
    folder = epoch_of(skipping(data))
    assert torch.equal(zipped[0], folder[0])
    assert sorted(zipped[2]) == [1, 10, 21]
    assert f'train.zip@/{FAULTY[2]} cannot be used' in zipped[2][21]


@pytest.mark.parametrize('workers', [0, 2])
def test_beyond_the_share_the_run_stops(data, workers):
    damage(data / 'train', FAULTY)
    with pytest.raises(
        DataError, match=r'3 of 30 training images are faulty, and DATA.MAX_SKIPPED'
    ):
        epoch_of(skipping(data, share=0.09, DATA__NUM_WORKERS=workers))


def test_kept_workers_know_what_other_ranks_have_found(data, monkeypatch):
    """Else they would count the share anew in each epoch, and end the run later than new ones."""
    damage(data / 'train', FAULTY)
    said = []
    for kept in (False, True):
        config = skipping(data, 0.1, DATA__NUM_WORKERS=2, DATA__PERSISTENT_WORKERS=kept)
        loaders = build_loaders(config, 0, 1)
        start_epoch(loaders.train, 0, 0, 0)
        list(loaders.train)
        others = [[[number, f'{number} of another rank']] for number in (2, 3)]
        monkeypatch.setattr(skipping_module, 'exchange', lambda what, mine, _: [mine, others[0]])
        loaders.skipped._most = 4
        loaders.skipped.tell('epoch 0', 1)
        assert sorted(loaders.skipped.found) == [1, 2, 10, 21]
        said.append(loaders.skipped.found[2])
    assert said == ['2 of another rank'] * 2


def test_a_data_set_without_a_sound_image_comes_to_an_end(data):
    for path in (data / 'train').rglob('*.png'):
        path.write_bytes(b'')
    with pytest.raises(DataError, match='30 of 30 training images are faulty'):
        epoch_of(skipping(data, share=1.0))


def test_the_share_is_counted_exactly():
    for total in (1, 7, 100, 1_281_167):
        for percent in (0, 1, 29, 58, 100):
            most = Skipped(total, percent / 100)._most
            assert most == min(total * percent // 100, total - 1)


def test_errors_of_the_machine_are_not_skipped(data, monkeypatch):
    def no_descriptors(self, index):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), self.where(index))

    monkeypatch.setattr(Folder, 'read', no_descriptors)
    with pytest.raises(DataError, match='Too many open files'):
        epoch_of(skipping(data))
    assert not is_of_file(MemoryError())
    assert is_of_file(PermissionError(errno.EACCES, 'no'))


@pytest.mark.parametrize('memory', [False, True])
def test_evaluation_skips_nothing(data, memory):
    damage(data / 'val', ['class_0/000.png'])
    config = skipping(data)
    images = build_loaders(config, 0, 1).val.dataset
    assert images.skipped is None
    with pytest.raises(
        DataError, match=r'val/class_0/000.png .* it is empty; .*never in evaluation'
    ):
        images[0]


def test_what_cannot_be_kept_in_memory_is_named(data):
    damage(data / 'train', FAULTY)
    said = error_of(small_config(data, DATA__IMG_ON_MEMORY=True))
    assert f'into memory: {data}/train/{FAULTY[2]}: No such file or directory; mend or' in said


def test_hidden_folders_are_no_classes(data, caplog):
    write_folder(data / 'train' / '.ipynb_checkpoints', classes=1, train=1, val=1)
    with caplog.at_level(logging.WARNING, 'internvl_ds'):
        loaders = build_loaders(small_config(data), 0, 1)
    assert loaders.classes == ['class_0', 'class_1', 'class_2']
    said = [text for text in caplog.messages if 'hidden' in text]
    assert said == [f'{data}/train: hidden folders are no classes: .ipynb_checkpoints']


def test_hidden_folders_in_zip_files_are_no_classes(data, tmp_path):
    for split in ('train', 'val'):
        with zipfile.ZipFile(tmp_path / f'{split}.zip', 'w') as archive:
            for path in sorted((data / split).rglob('*.png')):
                archive.write(path, path.relative_to(data / split))
            archive.writestr('.ipynb_checkpoints/a.png', b'')
    loaders = build_loaders(small_config(tmp_path, DATA__ZIP_MODE=True), 0, 1)
    assert loaders.classes == ['class_0', 'class_1', 'class_2']
    assert len(loaders.val.dataset) == 7


def test_a_folder_too_many_is_named(data):
    (data / 'val' / 'tmp').mkdir()
    with pytest.raises(ConfigError, match=r'val has 4 classes, .*; only \S+/val has tmp$'):
        build_loaders(small_config(data), 0, 1)


def train(tmp_path, data, output, share, *opts, **values):
    config = small_config(
        data, DATA__ON_ERROR='skip', DATA__MAX_SKIPPED=share, DATA__NUM_WORKERS=1, TRAIN__EPOCHS=2,
        TRAIN__WARMUP_EPOCHS=0, AUG__REPROB=0.5, SAVE_CKPT_NUM=0,
    )  # fmt: skip
    cfg = tmp_path / 'small.yaml'
    cfg.write_text(config.dump())
    ds_config = tmp_path / 'stage1.json'
    ds_config.write_text(json.dumps({'zero_optimization': {'stage': 1}}))
    run = run_ranks(
        training.train_on_ranks, 2, tmp_path, expect_failure=share < 0.1, cfg=str(cfg),
        output=str(tmp_path / output), opts=list(opts), ds_config=str(ds_config),
    )  # fmt: skip
    logs = [(tmp_path / output / 'small' / f'log_rank{rank}.txt').read_text() for rank in (0, 1)]
    return run, logs


@pytest.fixture
def damaged_on_both(data):
    """Two faulty images among those of each of two ranks, in epoch 0."""
    names = Folder(data, sorted(str(p.relative_to(data)) for p in data.glob('train/*/*'))).names
    numbers = [
        [draw.image for draw in TrainSampler(30, 2, rank, 0)][place]
        for rank in (0, 1)
        for place in (1, 6)
    ]
    damage(data, [os.fsdecode(names[number]) for number in numbers])
    return [str(data / os.fsdecode(names[number])) for number in numbers]


@pytest.mark.first
@pytest.mark.ranks
@pytest.mark.slow
def test_a_run_over_faulty_images_names_them_and_repeats(tmp_path, data, damaged_on_both):
    (one, _), (log, other_log) = train(tmp_path, data, 'one', 0.14)
    assert [record['epoch'] for record in one['metrics']] == [0, 1]
    epoch_0 = log.partition('Train: [1/2]')[0]
    assert 'epoch 0: 4 images were found faulty, and others took their places' in epoch_0
    for path in damaged_on_both:
        assert len(re.findall(f'skipped: {path} cannot be used as an image: ', epoch_0)) == 1
        assert log.count(f'skipped: {path} ') == 2  # at the end once more
    assert '4 of 30 training images were skipped in this run' in log
    assert 'skipped: ' not in other_log

    (kept, _), _ = train(tmp_path, data, 'kept', 0.14, 'DATA.PERSISTENT_WORKERS', 'True')
    for record in (*kept['metrics'], *one['metrics']):
        del record['images_per_s'], record['seconds']
    assert kept['metrics'] == one['metrics']

    # The second epoch again, from the first one's tag: the same images, so the same losses.
    tag = str(tmp_path / 'one' / 'small' / 'ckpt_epoch_0')
    (again, _), _ = train(tmp_path, data, 'again', 0.14, 'MODEL.RESUME', tag)
    del again['metrics'][0]['images_per_s'], again['metrics'][0]['seconds']
    assert again['metrics'][0] == one['metrics'][1]


@pytest.mark.ranks
def test_ranks_that_together_found_too_many_all_stop(tmp_path, data, damaged_on_both):
    texts, logs = train(tmp_path, data, 'out', 0.09)  # 2 of 30: each alone has as many
    words = 'DataError: 4 of 30 training images are faulty, and DATA.MAX_SKIPPED 0.09'
    assert sum(words in text for text in texts) == 1  # one speaks for all
    for log in logs:
        assert words in log
    assert 'ckpt_epoch_0' not in os.listdir(tmp_path / 'out' / 'small')


def test_an_rgb_image_is_decoded_to_what_pillow_converts_it_to():
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)
    for kind in ('JPEG', 'PNG', 'WEBP', 'TIFF', 'BMP'):
        data = encode(Image.fromarray(pixels), kind)
        with Image.open(io.BytesIO(data)) as image:
            wanted = image.convert('RGB')
        for upright in (True, False):
            read = decode(data, upright=upright)
            assert read.mode == 'RGB'
            assert read.tobytes() == wanted.tobytes()
