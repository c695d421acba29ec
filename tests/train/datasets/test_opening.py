"""Lists, zip files and ImageNet-22K: the same images and labels as of class folders."""

import zipfile

import pytest
import torch
from PIL import Image

from internvl_ds.errors import ConfigError, DataError
from internvl_ds.train.data import build_loaders, order_of
from internvl_ds.train.datasets.archive import Archive
from internvl_ds.train.datasets.lists import read_list
from tests.harness.training import small_config, write_folder
from tests.train.datasets.made import error_of, variant_config, write_image, zip_folder


@pytest.fixture
def data(tmp_path):
    return write_folder(tmp_path / 'data', classes=3, train=25, val=7)


def contents(config, split='val'):
    """All images of a split, with their labels, without augmentation."""
    loaders = build_loaders(config, 0, 1)
    images = loaders.val.dataset if split == 'val' else loaders.train.dataset.images
    images.transform = build_loaders(config, 0, 1).val.dataset.transform
    return [(image, label) for image, label in images]


def assert_same(one, other):
    assert [label for _, label in one] == [label for _, label in other]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(one, other, strict=True))


def list_of(root):
    """Lines of all images below a folder."""
    return [
        f'{path.relative_to(root)} {int(path.parent.name[-1])}' for path in sorted(root.glob('*/*'))
    ]


def test_an_image_stands_upright_as_its_exif_orientation_says(data):
    """As OpenCV reads it, through which the original does."""
    image = Image.new('RGB', (16, 16), (255, 0, 0))
    image.paste((0, 0, 255), (0, 0, 16, 8))  # blue above
    orientation = Image.Exif()
    orientation[0x0112] = 3  # it is upside down
    path = data / 'val' / 'class_0' / '000.png'
    image.save(path)
    plain = contents(small_config(data))[0][0]
    image.save(path, exif=orientation)
    assert torch.equal(contents(small_config(data))[0][0], plain.flip(1, 2))


@pytest.mark.parametrize('place', ['META_DATA', 'meta_data'])
def test_lists_give_what_class_folders_give(data, tmp_path, place):
    whole = {split: contents(small_config(data), split) for split in ('train', 'val')}
    order = order_of(build_loaders(small_config(data), 0, 1).train, 0)
    folder = tmp_path / 'lists' if place == 'META_DATA' else data / place
    folder.mkdir()
    for split in ('train', 'val'):
        (folder / f'{split}.txt').write_text('\n'.join(list_of(data / split)) + '\n')
    config = small_config(
        data, **({'DATA__META_DATA': str(folder)} if place == 'META_DATA' else {})
    )
    for split, wanted in whole.items():
        assert_same(contents(config, split), wanted)
    loaders = build_loaders(config, 0, 1)
    assert loaders.classes == ['class_0', 'class_1', 'class_2']
    assert order_of(loaders.train, 0) == order  # a run goes on with the list
    # The list decides: what is not in it is not read.
    (folder / 'val.txt').write_text('class_2/002.png 0\n')
    assert [label for _, label in contents(config)] == [0]


@pytest.mark.parametrize('place', ['beside', 'start'])
def test_images_without_folders_have_their_labels_in_the_list(tmp_path, monkeypatch, place):
    """As the original's README lays ImageNet-1K out, started beside its meta_data."""
    root = tmp_path / 'data' / 'imagenet-1k'
    for number in (1, 2):
        write_image(root / 'val' / f'ILSVRC2012_val_{number:08d}.JPEG', number)
    write_image(root / 'train' / 'n01440764' / 'a.JPEG', 0)
    config = variant_config(root, 'imagenet')
    monkeypatch.chdir(tmp_path)
    said = error_of(config)
    assert f'{root}/val: has no class folders, and there is no list of its images' in said
    lists = root.parent / 'meta_data' if place == 'beside' else tmp_path / 'meta_data'
    lists.mkdir()
    (lists / 'val.txt').write_text(
        'ILSVRC2012_val_00000001.JPEG 65\nILSVRC2012_val_00000002.JPEG 970\n'
    )
    images = build_loaders(config, 0, 1).val.dataset
    assert images.labels.tolist() == [65, 970]
    assert images.classes[0] == 'n01440764'


def test_a_list_that_is_none_names_the_line(tmp_path):
    path = tmp_path / 'val.txt'
    for line in ('a.png 3', 'a.png -1', 'a.png', '7', 'a.png n01440764'):
        path.write_text(f'ok.png\t0\n\n{line}\n')
        with pytest.raises(ConfigError, match=rf"{path}, line 3: '{line}' is not a path"):
            read_list(path, 3)
    path.write_text('a b.png 1\r\nc.png\t2')
    assert read_list(path, 3) == (['a b.png', 'c.png'], [1, 2])
    path.write_text('\n')
    with pytest.raises(ConfigError, match='lists no image'):
        read_list(path, 3)
    path.write_text('n04399382/a.JPEG n04398044\nb.JPEG 21840\n')
    assert read_list(path, 21841)[1] == [11136, 21840]


def test_a_list_of_other_images_is_noticed_at_once(data):
    (data / 'meta_data').mkdir()
    (data / 'meta_data' / 'val.txt').write_text('class_0/000.png 0\nclass_0/gone.png 0\n')
    said = error_of(small_config(data))
    assert 'meta_data/val.txt: names class_0/gone.png, and there is no' in said
    assert 'DATA.META_DATA' in error_of(small_config(data, DATA__META_DATA=str(data / 'none')))


def test_imagenet_22k_lies_in_data_path_itself(tmp_path):
    root = tmp_path / 'imagenet22k'
    for label in range(3):
        for number in range(4):
            write_image(root / f'class_{label}' / f'{number}.png', label)
        write_image(root / 'val' / f'class_{label}' / '0.png', label)
    loaders = build_loaders(small_config(root, DATA__DATASET='imagenet22K'), 0, 1)
    assert loaders.classes == ['class_0', 'class_1', 'class_2']
    assert len(loaders.train.dataset) == 12
    assert loaders.train.dataset.images.root == str(root)


@pytest.mark.parametrize('layout', ['folders', 'split inside', 'map', 'one archive'])
@pytest.mark.parametrize('compression', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_files_give_what_class_folders_give(data, tmp_path, layout, compression):
    whole = {split: contents(small_config(data), split) for split in ('train', 'val')}
    path = tmp_path / 'zipped'
    path.mkdir()
    paths: list[object] = [path]
    if layout == 'one archive':
        zip_folder(data, path / 'x.zip', compression)
        zip_folder(data, path / 'deep.zip', compression, inside='a/b/')
        paths = [f'{path}/x.zip@/', f'{path}/deep.zip@/a/b']
    for split in ('train', 'val') if layout != 'one archive' else ():
        inside = f'{split}/' if layout == 'split inside' else ''
        zip_folder(data / split, path / f'{split}.zip', compression, inside)
        if layout == 'map':
            lines = '\n'.join(line.replace(' ', '\t') for line in list_of(data / split))
            (path / f'{split}_map.txt').write_text(lines)
    for place in paths:
        for mode in ('no', 'part', 'full'):
            config = small_config(place, DATA__ZIP_MODE=True, DATA__CACHE_MODE=mode)
            for split, wanted in whole.items():
                assert_same(contents(config, split), wanted)


@pytest.mark.parametrize('workers', [0, 2])
def test_workers_read_one_archive_at_the_same_time(data, tmp_path, workers):
    for split in ('train', 'val'):
        zip_folder(data / split, tmp_path / f'{split}.zip', zipfile.ZIP_DEFLATED)
    whole = contents(small_config(data))
    config = small_config(
        tmp_path, DATA__ZIP_MODE=True, DATA__CACHE_MODE='no', DATA__NUM_WORKERS=workers,
        DATA__BATCH_SIZE=1,
    )  # fmt: skip
    loader = build_loaders(config, 0, 1).val
    for _ in range(3):
        read = [(images[0], int(labels)) for images, labels in loader]
        assert_same(read, whole)


def test_what_is_wrong_with_an_archive_is_named(data, tmp_path):
    config = small_config(tmp_path, DATA__ZIP_MODE=True, DATA__CACHE_MODE='no')
    assert f'there is no {tmp_path}/val.zip' in error_of(config)
    archive = tmp_path / 'val.zip'
    archive.write_text('no zip')
    assert f'{archive}: cannot be read as a zip file' in error_of(config)
    with zipfile.ZipFile(archive, 'w') as target:
        target.writestr('a.png', b'')
    assert 'a.png in it, where class folders are due' in error_of(config)
    zip_folder(data / 'val', archive)
    (tmp_path / 'val_map.txt').write_text('class_0/gone.png\t0\n')
    assert f'{archive}: has no entry class_0/gone.png' in error_of(config)


@pytest.mark.parametrize('compression', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_entry_is_an_error_that_names_it(data, tmp_path, compression):
    archive = zip_folder(data / 'val', tmp_path / 'val.zip', compression)
    with zipfile.ZipFile(archive) as opened:
        entry = opened.getinfo('class_1/001.png')
    content = bytearray(archive.read_bytes())
    content[entry.header_offset + 80] ^= 255
    archive.write_bytes(content)
    config = small_config(tmp_path, DATA__ZIP_MODE=True, DATA__CACHE_MODE='no', EVAL_MODE=True)
    images = build_loaders(config, 0, 1).val.dataset
    where = f'{archive}@/class_1/001.png cannot be used as an image'
    with pytest.raises(DataError, match=where):
        list(images)


def test_an_entry_is_not_unpacked_beyond_what_it_says(tmp_path):
    path = tmp_path / 'bomb.zip'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as target:
        target.writestr('a/b.png', bytes(1 << 20))
    content = path.read_bytes().replace((1 << 20).to_bytes(4, 'little'), (10).to_bytes(4, 'little'))
    path.write_bytes(content)
    archive = Archive(path).choose('', ['a/b.png'])
    with pytest.raises(ValueError, match='size and checksum'):
        archive.read(0)
    huge = content.replace((10).to_bytes(4, 'little'), (1 << 31).to_bytes(4, 'little'))
    path.write_bytes(huge)
    with pytest.raises(ConfigError, match='an image has'):
        Archive(path).choose('', ['a/b.png'])
