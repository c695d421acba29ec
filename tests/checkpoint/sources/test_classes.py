"""The class names that weights keep, wherever they went, and what differs from those of now."""

import logging

import pytest
import torch

from internvl_ds.checkpoint.formats.export import write_original, write_safetensors
from internvl_ds.checkpoint.sources.classes import require_same_classes, saved_classes
from internvl_ds.errors import CheckpointError, CheckpointMismatch
from tests.checkpoint.formats.test_export import _write_tag
from tests.harness.model import make_config
from tests.harness.tags import save_tag

logger = logging.getLogger('test')
NAMES = ['cat', 'dog', 'Übergang']


def _with_names(folder, names):
    """A tag of real shards that keeps class names, without a manifest."""
    shapes = {'a.weight': (5, 3), 'b': (7,)}
    tag = _write_tag(
        folder / 'tag', shapes, lambda n: torch.zeros(shapes[n]), lambda n: torch.ones(shapes[n])
    )
    state = save_tag(folder / 'state', 0, state={} if names is None else {'class_names': names})
    (state / 'state.json').rename(tag / 'state.json')
    return tag


def _exports(tag, folder):
    """A tag as one file, in each format."""
    write_original(tag, folder / 'x.pth')
    write_safetensors(tag, folder / 'x.safetensors', torch.float32, ema=False, largest=1 << 30)
    parts = folder / 'parts'
    parts.mkdir()
    write_safetensors(tag, parts / 'x.safetensors', torch.float32, ema=False, largest=64)
    index = parts / 'x.safetensors.index.json'
    return [folder / 'x.pth', folder / 'x.safetensors', min(parts.glob('*-of-*')), index, parts]


@pytest.mark.parametrize('names', [NAMES, None])
def test_a_tag_and_its_exports_keep_them(tmp_path, names):
    tag = _with_names(tmp_path, names)
    for path in (tag, *_exports(tag, tmp_path)):
        assert saved_classes(str(path)) == names, path


def test_weights_of_others_keep_none(tmp_path):
    torch.save({'class_names': 'three', 'model': {}}, tmp_path / 'x.pth')
    (tmp_path / 'broken.safetensors').write_text('x')
    (tmp_path / 'x.index.json').write_text('{}')
    (tmp_path / 'empty').mkdir()
    for name in ('x.pth', 'broken.safetensors', 'x.index.json', 'empty', 'none.pth', '.'):
        assert saved_classes(str(tmp_path / name)) is None


def test_damaged_names_are_not_compared(tmp_path):
    tag = save_tag(tmp_path, 0, state={'class_names': NAMES})
    path = tag / 'state.json'
    path.write_text(path.read_text().replace('cat', 'cow'))
    with pytest.raises(CheckpointError, match=r'state\.json: damaged'):
        saved_classes(str(tag))


@pytest.mark.parametrize(
    ('now', 'difference'),
    [
        (['dog', 'cat', 'Übergang'], "class 0 was 'cat', and is 'dog' (3 classes then, 3 now)"),
        (
            ['cat', 'eel', 'Übergang'],
            "class 1 was 'dog', and is 'eel' (3 classes then, 3 now; gone: dog; new: eel)",
        ),
        (
            ['cat', 'dog'],
            "class 2 was 'Übergang', and is none (3 classes then, 2 now; gone: Übergang)",
        ),
        (
            [*NAMES, 'zoo', 'zoos'],
            "class 3 was none, and is 'zoo' (3 classes then, 5 now; new: zoo, zoos)",
        ),
    ],
)
def test_the_first_difference_is_named(tmp_path, now, difference, caplog):
    tag = save_tag(tmp_path, 0, state={'class_names': NAMES})
    with pytest.raises(CheckpointMismatch) as caught:
        require_same_classes(make_config(''), now, str(tag), logger)
    assert str(caught.value).startswith(f'{tag}: trained on other classes than those of now: ')
    assert difference in str(caught.value)
    assert 'set DATA.CHECK_CLASS_NAMES False' in str(caught.value)
    assert caplog.text == ''
    require_same_classes(make_config('', DATA__CHECK_CLASS_NAMES=False), now, str(tag), logger)
    assert difference in caplog.text


def test_nothing_is_said_where_they_are_the_same_or_not_known(tmp_path, caplog):
    tag = save_tag(tmp_path, 0, state={'class_names': NAMES})
    old = save_tag(tmp_path, 1, state={'epoch': 1})
    for now, path in ((NAMES, tag), (tuple(NAMES), tag), ([], tag), (['x'], old)):
        require_same_classes(make_config(''), now, str(path), logger)
    assert caplog.text == ''


def test_names_that_are_no_texts_are_an_error_of_the_file(tmp_path):
    torch.save({'model': {}, 'class_names': ['a', {'b': 1}]}, path := tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match=r"x\.pth: class_names holds \{'b': 1\}"):
        saved_classes(str(path))
