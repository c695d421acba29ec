"""What is wrong with a DATA.FACTORY or its items is one line that names it."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset

from internvl_ds.errors import ConfigError, DataError
from internvl_ds.train.data import build_loaders
from tests.harness.training import small_config, write_folder
from tests.train.datasets.made import line_of
from tests.train.datasets.sourced import Pictures, images_of

HERE = __name__


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp('images'), classes=3, train=25, val=7)


class Stream(IterableDataset):
    """Has no order to resume in."""

    def __iter__(self):
        return iter([])


class Ordered:
    """Two items of a kind."""

    classes = ('a', 'b', 'c')

    def __init__(self, item, **attributes):
        self.item = item
        vars(self).update(attributes)

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return self.item


class Endless(Ordered):
    """Has a length that raises."""

    def __init__(self):
        super().__init__((PICTURE, 0))

    def __len__(self):
        raise RuntimeError('ever')


PICTURE = Image.new('RGB', (16, 16))
RETURNED = {
    'a stream': (Stream(), 'a Stream, which has no __len__ and __getitem__'),
    'none': (None, 'a NoneType, which has no __len__'),
    'an empty list': ([], 'a list of 0 without an item'),
    'an image alone': (Ordered(PICTURE), 'item 0 is a Image, and not an image and its label'),
    'a path': (Ordered(('a.png', 0)), 'item 0 begins with a str, and not with a PIL image'),
    'another shape': (
        Ordered((torch.zeros(3, 8, 8), 0)),
        'item 0 is a tensor of torch.float32 and the shape (3, 8, 8); a tensor is taken as it is, '
        'and must be of floats and of the shape (3, 16, 16)',
    ),
    'a label beyond': (Ordered((PICTURE, 3)), 'has the label 3, and not an integer of 0 ... 2'),
    'a float': (Ordered((PICTURE, 1.0)), 'item 0 has the label 1.0, and not an integer'),
    'a list of labels': (Ordered((PICTURE, [1])), 'has the label [1], and not an integer'),
    'other classes': (Ordered((PICTURE, 0), classes=['a']), 'has 1 classes, and the model is to'),
    'classes of no texts': (Ordered((PICTURE, 0), classes=[1, 2, 3]), 'its attribute classes is'),
    'too few names': (Ordered((PICTURE, 0), names=['a']), 'has 2 items and 1 names'),
    'classes of a number': (Ordered((PICTURE, 0), classes=3), 'its attribute classes is 3, and no'),
    'half a character': (Ordered((PICTURE, 0), names=['\ud800', 'b']), 'its attribute names is'),
    'no length': (Endless(), ': the length of a Endless failed: RuntimeError: ever ('),
}  # fmt: skip


def raising(config, split):
    """For DATA.FACTORY."""
    raise KeyError('nothing')


def test_a_factory_that_raises_is_named_with_its_place(tmp_path, monkeypatch):
    said = line_of(small_config(tmp_path, DATA__FACTORY=f'{HERE}:raising'))
    start = f"DATA.FACTORY '{HERE}:raising' (val) failed: KeyError: 'nothing' ({__file__}, line "
    assert said.startswith(start)
    (tmp_path / 'faulty_factory.py').write_text('\n1 / 0\n')
    monkeypatch.syspath_prepend(tmp_path)
    said = line_of(small_config(tmp_path, DATA__FACTORY='faulty_factory:f'))
    assert said.endswith(
        f'ZeroDivisionError: division by zero ({tmp_path}/faulty_factory.py, line 2)'
    )


def test_grey_levels_of_a_factory_are_scaled_as_those_of_files(tmp_path, monkeypatch):
    def first(picture):
        given = Ordered((picture, 0), names=(name for name in 'ab'))  # read once
        monkeypatch.setattr(sys.modules[HERE], 'given', given, raising=False)
        opts = {'AUG__MEAN': [0.0] * 3, 'AUG__STD': [1.0] * 3, 'DATA__BATCH_SIZE': 1}
        config = small_config(tmp_path, DATA__FACTORY=f'{HERE}:returned', EVAL_MODE=True, **opts)
        dataset = build_loaders(config, 0, 1).val.dataset
        assert dataset.source.names.tolist() == [b'a', b'b']
        return dataset[0][0]

    levels = np.full((16, 16), 257 * 51, np.uint16)
    assert first(Image.fromarray(levels)).unique().tolist() == pytest.approx([0.2])
    with pytest.raises(DataError, match='samples are floats whose range is not known'):
        first(Image.fromarray(np.zeros((16, 16), np.float32)))


def returned(config, split):
    """For DATA.FACTORY: what a test has put there."""
    return sys.modules[HERE].given


@pytest.mark.parametrize('kind', RETURNED)
def test_what_a_factory_returns_is_checked(tmp_path, monkeypatch, kind):
    value, words = RETURNED[kind]
    monkeypatch.setattr(sys.modules[HERE], 'given', value, raising=False)
    said = line_of(small_config(tmp_path, DATA__FACTORY=f'{HERE}:returned'))
    assert said.startswith(f"DATA.FACTORY '{HERE}:returned' (val)")
    assert words in said


def test_a_label_of_a_later_item_is_an_error_that_no_skipping_hides(folder, monkeypatch):
    class Wrong(Pictures):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return image, 9 if index == 5 else label

    monkeypatch.setattr(sys.modules[HERE], 'given', Wrong(folder, 'train'), raising=False)
    config = small_config(folder, DATA__FACTORY=f'{HERE}:returned', DATA__ON_ERROR='skip')
    images = build_loaders(config, 0, 1).train.dataset.images
    name = images_of(folder, 'train')[5][0]
    with pytest.raises(ConfigError, match=rf'item 5 \({name}\) has the label 9, and not an'):
        images[5]
