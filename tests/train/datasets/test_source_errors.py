"""What is wrong with a source is one line that names the file, and the line or entry in it."""

import importlib.util
import tarfile

import pytest
from PIL import Image

from internvl_ds.errors import DataError
from internvl_ds.train.data import build_loaders
from tests.harness.training import small_config, write_folder
from tests.train.datasets.made import line_of
from tests.train.datasets.sourced import (
    add,
    pack,
    write_shards,
    write_tables,
    write_tar,
)

HERE = __name__


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp('images'), classes=3, train=25, val=7)


FAULTY_CSV = {
    'other columns': ('file,label\na.png,0\n', 'line 1: has no column path; its columns are file'),
    'no columns': ('', 'line 1: has no column path and no label; its columns are none'),
    'too few values': ('path,label\na.png\n', 'line 2: does not have the 2 columns of line 1'),
    'too many values': ('path,label\na.png,0,1\n', 'line 2: does not have the 2 columns'),
    'no path': ('path,label\n,0\n', "line 2: path is '', and no path"),
    'no label': ('path,label\na.png,\n', "line 2: label is '', and takes the name or the number"),
    'no such class': (
        'path,label\nimages/val/class_0/000.png,class_0\nb.png,cat\n',
        "line 3: label is 'cat', and not one of the 3 class names of the training images "
        '(class_0, class_1, class_2)',
    ),
    'no such file': ('path,label\na.png,class_0\n', 'line 2: there is no '),
    'no rows': ('path,label\n', 'lists no image'),
    'an open quote': ('path,label\n"a.png,0\n', 'line 1 or the next: cannot be read: '),
    'a column twice': ('path,label,label\na.png,0,1\n', 'line 1: has the column label twice'),
    'bytes that are no text': (b'path,label\n\xff\xfe,0\n', 'or the next: cannot be read: '),
}


@pytest.mark.parametrize('fault', FAULTY_CSV)
def test_a_faulty_csv_is_refused_by_its_line(folder, tmp_path, fault):
    content, words = FAULTY_CSV[fault]
    write_tables(folder, tmp_path, 'csv', True)
    table = tmp_path / 'val.csv'
    table.write_bytes(content if isinstance(content, bytes) else content.encode())
    said = line_of(small_config(tmp_path, DATA__DATASET='csv'))
    assert str(table) in said
    assert words in said


FAULTY_JSONL = {
    'no JSON': ('{"path": "a.png", "label": 0}\n{"path"\n', 'line 2: is no JSON: '),
    'no object': ('[1]\n', 'line 1: is [1], and no object with path and label'),
    'no label': ('{"path": "a.png"}\n', 'and no object with path and label'),
    'a float': ('{"path": "a.png", "label": 1.5}\n', 'line 1: label is 1.5, and takes the name'),
    'true': ('{"path": "a.png", "label": true}\n', 'line 1: label is True, and takes the name'),
    'a list': ('{"path": "a.png", "label": [1]}\n', 'read with DATA.MULTI_LABEL True'),
    'a negative': ('{"path": "a.png", "label": -1}\n', 'line 1: label is -1, and not a number of'),
    'a name': ('{"path": "a.png", "label": "cat"}\n', "line 1: label is 'cat', and not a number"),
    'half a character': ('{"path": "\\ud800", "label": 0}\n', 'or the next: cannot be read: '),
}


@pytest.mark.parametrize('fault', FAULTY_JSONL)
def test_a_faulty_jsonl_is_refused_by_its_line(folder, tmp_path, fault):
    content, words = FAULTY_JSONL[fault]
    write_tables(folder, tmp_path, 'jsonl', False)
    (tmp_path / 'val.jsonl').write_text(content)
    said = line_of(small_config(tmp_path, DATA__DATASET='jsonl'))
    assert said.startswith(f'{tmp_path}/val.jsonl, line ')
    assert words in said


@pytest.mark.parametrize('labels', [('1.0', '2.0'), ('-1', '0'), ('1', '9' * 5000)])
def test_numbers_that_are_no_labels_are_not_taken_for_names(folder, tmp_path, labels):
    write_tables(folder, tmp_path, 'csv', False)
    rows = ''.join(f'images/train/class_0/000.png,{label}\n' for label in labels)
    (tmp_path / 'train.csv').write_text(f'path,label\n{rows}')
    said = line_of(small_config(tmp_path, DATA__DATASET='csv', MODEL__NUM_CLASSES=0))
    assert said.startswith(f'{tmp_path}/train.csv, line ')
    assert said.endswith('and not a number of 0 and above')


def test_a_label_that_no_model_has_is_refused(folder, tmp_path):
    write_shards(folder, tmp_path / 'wds')
    files = [('a.png', b''), ('a.cls', b'9' * 25)]
    pack(tmp_path / 'wds' / 'more-train.tar', files)
    said = line_of(small_config(tmp_path / 'wds', DATA__DATASET='wds', MODEL__NUM_CLASSES=0))
    assert said.endswith(f'label {"9" * 25} is not of 0 ... 16777215 (MODEL.NUM_CLASSES 0)')
    (tmp_path / 'train.txt').write_text(f'class_0/000.png {"9" * 25}\n')
    said = line_of(small_config(folder, DATA__META_DATA=str(tmp_path), MODEL__NUM_CLASSES=0))
    assert f"{tmp_path}/train.txt, line 1: 'class_0/000.png 9999" in said


def test_a_table_may_begin_with_a_mark_of_its_encoding(folder, tmp_path):
    for kind in ('csv', 'jsonl'):
        write_tables(folder, tmp_path / kind, kind, False)
        for path in (tmp_path / kind).glob(f'*.{kind}'):
            path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes())
        images = build_loaders(small_config(tmp_path / kind, DATA__DATASET=kind), 0, 1).train
        assert len(images.dataset) == 25


def test_a_label_beyond_the_classes_names_line_and_number(folder, tmp_path):
    write_tables(folder, tmp_path, 'csv', False)
    said = line_of(small_config(tmp_path, DATA__DATASET='csv', MODEL__NUM_CLASSES=2))
    assert f'({tmp_path}/val.csv, line ' in said
    assert said.endswith('label 2 is not of 0 ... 1 (MODEL.NUM_CLASSES 2)')
    write_tables(folder, tmp_path / 'names', 'csv', True)
    said = line_of(small_config(tmp_path / 'names', DATA__DATASET='csv', MODEL__NUM_CLASSES=2))
    assert 'has 3 classes, and the model is to tell 2 apart (MODEL.NUM_CLASSES 2)' in said


def test_a_file_that_is_gone_later_is_named_with_its_line(folder, tmp_path):
    write_tables(folder, tmp_path, 'csv', True)
    lines = (tmp_path / 'val.csv').read_text().splitlines()
    lines[2] = lines[2].replace('.png', '.gone')
    (tmp_path / 'val.csv').write_text('\n'.join(lines) + '\n')
    images = build_loaders(small_config(tmp_path, DATA__DATASET='csv'), 0, 1).val.dataset
    with pytest.raises(DataError, match=rf'gone \({tmp_path}/val.csv, line 3\) cannot be used'):
        images[1]


def damage(path, how):
    """Damages a tar file."""
    data = bytearray(path.read_bytes())
    if how == 'cut off':
        del data[len(data) // 3 :]
    elif how == 'no end':
        del data[data.rstrip(b'\0').__len__() // 512 * 512 + 512 :]
    elif how == 'a header':
        data[data.find(b'000.png') + 300] ^= 0xFF
    elif how == 'two in one':
        data *= 2
    else:
        data = bytearray(b'no tar file' * 100)
    path.write_bytes(data)


@pytest.mark.parametrize('how', ['cut off', 'no end', 'a header', 'two in one', 'other'])
@pytest.mark.parametrize('kind', ['tar', 'wds'])
def test_a_damaged_tar_file_is_named(folder, tmp_path, kind, how):
    (write_tar if kind == 'tar' else write_shards)(folder, tmp_path)
    path = tmp_path / ('val.tar' if kind == 'tar' else 'set-val-000004.tar')
    damage(path, how)
    said = line_of(small_config(tmp_path, DATA__DATASET=kind))
    assert said.startswith(f'{path}: cannot be read as a tar file: ')


FAULTY_SHARDS = {
    'no image': ([('a.cls', b'0')], 'the sample a has 0 images among its files (cls)'),
    'two images': ([('a.png', b''), ('a.jpg', b''), ('a.cls', b'0')], 'a has 2 images'),
    'no label': ([('a.png', b'')], 'the sample a has no label: no a.cls and no a.json'),
    'a name': ([('a.png', b''), ('a.cls', b'cat')], 'a.cls has no label in it: '),
    'another key': ([('a.png', b''), ('a.json', b'{"class": 1}')], 'a.json has no label in it: '),
    'twice': ([('a.png', b''), ('a.png', b'')], 'has a.png twice'),
    'too large': ([('a.png', b''), ('a.cls', b'7')], 'label 7 is not of 0 ... 2'),
    'nothing': ([('README', b'')], 'has no sample in its shards'),
}  # fmt: skip


@pytest.mark.parametrize('fault', FAULTY_SHARDS)
def test_a_faulty_sample_is_named_with_its_shard(tmp_path, fault):
    files, words = FAULTY_SHARDS[fault]
    pack(tmp_path / 'val' / '0.tar', files)
    said = line_of(small_config(tmp_path, DATA__DATASET='wds'))
    assert str(tmp_path / 'val') in said
    assert words in said


@pytest.mark.parametrize(
    ('kind', 'words'),
    [
        ('tar', 'there is no {0}/val.tar nor {0}/val/*.tar'),
        ('wds', 'there is no {0}/val/*.tar nor {0}/*val*.tar'),
        ('csv', 'there is no {0}/val.csv (columns path and label'),
    ],
)
def test_a_missing_source_says_where_it_was_looked_for(tmp_path, kind, words):
    assert words.format(tmp_path) in line_of(small_config(tmp_path, DATA__DATASET=kind))


def test_timms_names_that_are_not_read_say_what_to_do(tmp_path):
    for name in ('tfds/mnist', 'hfids/x', 'wds/x'):
        said = line_of(small_config(tmp_path, DATA__DATASET=name))
        assert f"DATA.DATASET is '{name}'" in said
        assert 'DATA.FACTORY' in said


def test_a_tar_needs_a_class_folder_for_each_image(tmp_path):
    pack(tmp_path / 'val.tar', [('a.png', b'')])
    said = line_of(small_config(tmp_path, DATA__DATASET='tar'))
    assert said == f'{tmp_path}/val.tar: a.png is in no folder, which would be its class'


def test_an_image_twice_in_a_tar_is_named(tmp_path):
    pack(tmp_path / 'val.tar', [('c/a.png', b''), ('c/b.png', b''), ('./c/a.png', b'')])
    said = line_of(small_config(tmp_path, DATA__DATASET='tar'))
    assert said == f'{tmp_path}/val.tar: has c/a.png twice'


def test_hidden_folders_of_a_tar_are_no_classes(folder, tmp_path, caplog):
    write_tar(folder, tmp_path)
    for split in ('train', 'val'):
        with tarfile.open(tmp_path / f'{split}.tar', 'a') as archive:
            add(archive, f'{split}/.ipynb_checkpoints/a.png', b'')
    config = small_config(tmp_path, DATA__DATASET='tar', MODEL__NUM_CLASSES=0)
    assert build_loaders(config, 0, 1).classes == ['class_0', 'class_1', 'class_2']
    assert f'{tmp_path}/val.tar: hidden folders are no classes: .ipynb_checkpoints' in caplog.text


def test_a_shard_that_is_of_both_splits_by_its_name_is_refused(folder, tmp_path):
    write_shards(folder, tmp_path)
    path = tmp_path / 'set-val-000000.tar'
    path.rename(tmp_path / 'constrained-val-000000.tar')
    said = line_of(small_config(tmp_path, DATA__DATASET='wds', MODEL__NUM_CLASSES=0))
    assert said.startswith(f'{tmp_path}/constrained-val-000000.tar: is of train and of val by its')


@pytest.mark.parametrize(
    ('settings', 'words'),
    [
        ({'DATA__FACTORY': 'nowhere'}, "DATA.FACTORY 'nowhere' is not of the form"),
        ({'DATA__FACTORY': 'no.where:f'}, "DATA.FACTORY 'no.where:f': No module named"),
        ({'DATA__FACTORY': f'{HERE}:none'}, 'has no function none'),
        ({'DATA__FACTORY': 'a:b', 'DATA__DATASET': 'csv'}, "DATA.DATASET, which is 'csv'"),
        ({'DATA__FACTORY': 'a:b', 'DATA__ZIP_MODE': True}, 'ZIP_MODE True reads class folders'),
        ({'DATA__FACTORY': 'a:b', 'DATA__IMG_ON_MEMORY': True}, 'DATA.IMG_ON_MEMORY True keeps'),
        ({'DATA__DATASET': 'tar', 'DATA__ZIP_MODE': True}, "DATA.DATASET 'tar' is set"),
        ({'DATA__DATASET': 'tar', 'DATA__MULTI_LABEL': True}, "'tar' has one label an image"),
        (
            {'DATA__DATASET': 'csv', 'DATA__MULTI_LABEL': True, 'AUG__MIXUP': 0.8},
            'DATA.MULTI_LABEL True: AUG.MIXUP 0.8 / AUG.CUTMIX 0.0 mix images of one label',
        ),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_named(tmp_path, settings, words):
    assert words in line_of(small_config(tmp_path, **settings))


@pytest.mark.skipif(importlib.util.find_spec('datasets') is not None, reason='it is there')
def test_without_datasets_the_error_says_what_to_install(tmp_path):
    said = line_of(small_config(tmp_path, DATA__DATASET='hfds'))
    assert f"DATA.DATASET 'hfds' ({tmp_path})" in said
    assert said.endswith('pip install datasets')


def test_hugging_face_data_that_does_not_fit_is_named(tmp_path):
    datasets = pytest.importorskip('datasets')

    def said_of(columns, features, **splits):
        table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        datasets.DatasetDict(splits or {'train': table, 'validation': table}).save_to_disk(path)
        return line_of(small_config(path, DATA__DATASET='hfds'))

    text, number = datasets.Value('string'), datasets.Value('int64')
    picture = {'image': [Image.new('RGB', (16, 16))]}
    said = said_of({'text': ['a'], 'label': [0]}, {'text': text, 'label': number})
    assert 'split validation: has the columns text, label; one of images' in said
    said = said_of(picture | {'label': ['a']}, {'image': datasets.Image(), 'label': text})
    assert "the column label holds 'a', and labels are numbers" in said
    assert 'class_encode_column' in said
    lists = datasets.Sequence(number)
    said = said_of(picture | {'label': [[0]]}, {'image': datasets.Image(), 'label': lists})
    assert 'the column label holds lists, and DATA.MULTI_LABEL is False' in said
    table = datasets.Dataset.from_dict({'a': [1]})
    assert 'has no split validation or val or test; it has other' in said_of({}, {}, other=table)
    said = line_of(small_config(tmp_path / 'none', DATA__DATASET='hfds'))
    assert 'cannot be read: ' in said
