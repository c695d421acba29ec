"""Class folders are walked as torchvision's ImageFolder walks them, where that comes to an end."""

import logging

import torch
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from internvl_ds.train.data import build_loaders
from internvl_ds.train.datasets.walk import class_folders, is_image_name, walk_classes
from tests.harness.training import small_config, write_folder
from tests.train.datasets.made import write_image


def test_images_and_their_order_are_those_of_torchvision(tmp_path):
    write_folder(tmp_path, classes=3, train=6, val=6)
    for name in ('b/2.png', 'b/10.JPEG', 'b-c/1.webp', 'b/d/1.png', 'a.png', 'z.txt'):
        path = tmp_path / 'val' / 'class_1' / name
        if path.suffix == '.txt':
            path.write_text('')
        else:
            write_image(path, 7)
    (tmp_path / 'elsewhere').mkdir()
    write_image(tmp_path / 'elsewhere' / 'linked.png', 8)
    (tmp_path / 'val' / 'class_2' / 'link').symlink_to(tmp_path / 'elsewhere')
    config = small_config(tmp_path, EVAL_MODE=True)
    ours = build_loaders(config, 0, 1).val.dataset
    theirs = ImageFolder(str(tmp_path / 'val'), transform=ours.transform)
    paths = [ours.source.where(index) for index in range(len(ours))]
    assert paths == [path for path, _ in theirs.samples]
    assert ours.classes == theirs.classes
    for (image, label), (wanted, wanted_label) in zip(ours, theirs, strict=True):
        assert label == wanted_label
        assert torch.equal(image, wanted)


def test_links_to_where_the_walk_has_been_are_named_and_do_not_make_it_endless(tmp_path, caplog):
    write_image(tmp_path / 'cat' / 'a.png', 0)
    write_image(tmp_path / 'dog' / 'b.png', 1)
    for name, target in (('one', '.'), ('two', '.'), ('up', '..')):
        (tmp_path / 'cat' / name).symlink_to(target)
    with caplog.at_level(logging.WARNING, 'internvl_ds'):
        names, labels = walk_classes(tmp_path, class_folders(tmp_path))
    assert (names, labels) == (['cat/a.png', 'dog/b.png'], [0, 1])
    (said,) = caplog.messages
    assert 'cat/one' in said
    assert 'cat/two' in said
    assert 'cat/up' in said


def test_the_endings_of_image_names_are_those_of_torchvision():
    known = [*IMG_EXTENSIONS, '.gif', '.avif', '.jp2', '.heic', '.jpg2', '.txt', '']
    assert [end for end in known if is_image_name(f'a{end.upper()}')] == list(IMG_EXTENSIONS)
