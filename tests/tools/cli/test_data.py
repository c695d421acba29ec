"""internvl-ds data check: each kind of fault, counted and named; exit statuses and errors."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios

import numpy as np
import pytest
from PIL import Image

from internvl_ds.tools.cli import main
from tests.harness.ranks import ROOT, base_env
from tests.train.faulty import encode, grey

NOTHING = 'nothing is wrong'


def write(path, width=20, height=10, seed=0, **values):
    """An image of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    image = Image.fromarray(pixels)
    image.convert(values.pop('mode', 'RGB')).save(path, **values)


@pytest.fixture
def sound(tmp_path):
    """Two classes of 3 and 1 images for training, of 1 and 2 for validation."""
    root = tmp_path / 'sound'
    sizes = {'a/0': (20, 10), 'a/1': (30, 12), 'a/sub/2': (50, 11), 'b/0': (40, 40)}
    for seed, (name, size) in enumerate(sizes.items()):
        write(root / 'train' / f'{name}.png', *size, seed=seed)
    for seed, name in enumerate(('a/0', 'b/0', 'b/1'), 10):
        write(root / 'val' / f'{name}.jpg', seed=seed)
    return root


@pytest.fixture
def faulty(sound):
    """The same with one or more of each fault."""
    train, val = sound / 'train', sound / 'val'
    whole = (train / 'a' / '0.png').read_bytes()
    (train / 'a' / 'cut.png').write_bytes(whole[: len(whole) // 2])
    (train / 'b' / 'empty.png').touch()
    (train / 'b' / 'text.jpg').write_text('no image')
    write(train / 'b' / 'cmyk.jpg', mode='CMYK', seed=20)
    write(train / 'b' / 'palette.png', mode='P', seed=21)
    (train / 'b' / '16.png').write_bytes(encode(grey(65535, 'u2'), 'PNG'))
    frames = [Image.new('RGB', (8, 8), colour) for colour in ('red', 'blue')]
    frames[0].save(train / 'b' / 'moving.webp', save_all=True, append_images=frames[1:])
    shutil.copy(train / 'a' / '0.png', train / 'a' / 'again.png')
    shutil.copy(train / 'a' / '1.png', train / 'b' / 'other class.png')
    shutil.copy(train / 'a' / '0.png', val / 'b' / 'leaked.png')
    for hidden in (train / '.ipynb_checkpoints', val / '.cache'):
        write(hidden / 'a.png')
    (train / 'a' / 'notes.txt').touch()
    (train / 'a' / 'b').mkdir()
    (train / 'a' / 'b' / 'up').symlink_to('..')
    (train / 'only').mkdir()
    return sound


def check(capsys, *words):
    status = main(['data', 'check', *map(str, words)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def tree(capsys, tmp_path, *words):
    file = tmp_path / 'found.json'
    status, out, _ = check(capsys, *words, '--json', file)
    return status, json.loads(file.read_text()), out


def test_a_sound_folder_has_exact_numbers_and_nothing_wrong(capsys, tmp_path, sound):
    status, found, out = tree(capsys, tmp_path, sound)
    assert status == 0
    assert out.splitlines()[-1] == NOTHING
    assert found['wrong'] is False
    assert found['between'] == []
    assert found['other_classes'] == {'train': [], 'val': []}
    train, val = found['splits']['train'], found['splits']['val']
    sizes = train.pop('bytes')
    files = sorted(path.stat().st_size for path in (sound / 'train').rglob('*.png'))
    assert sizes == {'min': files[0], 'median': sum(files[1:3]) / 2, 'max': files[3]}
    empty = ('empty', 'unreadable', 'warnings', 'duplicates', 'hidden_folders')
    assert train == {
        'path': str(sound / 'train'),
        'images': 4,
        'classes': {'a': 3, 'b': 1},
        'images_per_class': {'min': 1, 'median': 2, 'max': 3},
        'width': {'min': 20, 'median': 35, 'max': 50},
        'height': {'min': 10, 'median': 11.5, 'max': 40},
        'kinds': {},
        'duplicates_across_classes': 0,
        **{key: [] for key in (*empty, 'other_files', 'linked_twice')},
    }
    assert (val['images'], val['classes']) == (3, {'a': 1, 'b': 2})
    assert '  images: a 3, b 1' in out.splitlines()
    assert '  balance: the largest class has 3.00 times the smallest' in out.splitlines()
    assert '  width: min 20, median 35, max 50 pixels' in out.splitlines()


def test_each_fault_is_counted_and_named(capsys, tmp_path, faulty):
    status, found, out = tree(capsys, tmp_path, faulty)
    assert status == 1
    train, val = found['splits']['train'], found['splits']['val']
    assert train['classes'] == {'a': 5, 'b': 8, 'only': 0}
    assert train['empty'] == ['only']
    errors = {each['name']: each['error'] for each in train['unreadable']}
    assert errors == {
        'a/cut.png': 'OSError: image file is truncated',
        'b/empty.png': 'Unreadable: it is empty',
        'b/text.jpg': 'Unreadable: it has no image format that Pillow knows, or a damaged header',
    }
    assert train['kinds'] == {
        '16-bit': ['b/16.png'],
        'CMYK': ['b/cmyk.jpg'],
        'animated': ['b/moving.webp'],
        'palette': ['b/palette.png'],
    }
    assert train['duplicates'] == [['a/0.png', 'a/again.png'], ['a/1.png', 'b/other class.png']]
    assert train['duplicates_across_classes'] == 1
    assert train['hidden_folders'] == ['.ipynb_checkpoints']
    assert train['other_files'] == ['a/notes.txt']
    assert train['linked_twice'] == ['a/b/up']
    assert train['width'] == {'min': 8, 'median': 20, 'max': 50}
    assert val['hidden_folders'] == ['.cache']
    assert val['unreadable'] == []
    leak = {'train': ['a/0.png', 'a/again.png'], 'val': ['b/leaked.png']}
    assert found['between'] == [leak]
    assert found['other_classes'] == {'train': ['only'], 'val': []}
    lines = out.splitlines()
    for line in (
        'WRONG: 1 images are in both splits:',
        '    train/a/0.png, a/again.png = val/b/leaked.png',
        'WRONG: only train has the classes only',
        '  WRONG: no image in the classes only',
        '  WRONG: 3 images cannot be used:',
        '    b/empty.png: Unreadable: it is empty',
        '  CMYK: 1 (b/cmyk.jpg)',
        '  hidden folders, which are no classes: 1 (.ipynb_checkpoints)',
        '  the same file again: 2 images, 1 of them in other classes too:',
    ):
        assert line in lines, line
    assert lines[-1] == 'something is wrong'


@pytest.mark.parametrize('name', ['a/9.png', '.hidden/9.png', 'a/9.txt'])
def test_only_a_file_that_training_would_read_makes_the_status_1(capsys, sound, name):
    path = sound / 'val' / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b'no image')
    status, out, _ = check(capsys, sound)
    assert status == (1 if name == 'a/9.png' else 0)
    assert (out.splitlines()[-1] == NOTHING) == (status == 0)


def test_an_image_in_both_splits_alone_makes_the_status_1(capsys, sound):
    shutil.copy(sound / 'train' / 'a' / '0.png', sound / 'val' / 'a' / '5.png')
    assert check(capsys, sound)[0] == 1
    # In one split alone it is said, and no fault.
    shutil.move(sound / 'val' / 'a' / '5.png', sound / 'train' / 'a' / '5.png')
    status, out, _ = check(capsys, sound)
    assert status == 0
    assert '    a/0.png, a/5.png' in out.splitlines()


def test_a_single_split_and_a_val_elsewhere(capsys, tmp_path, sound):
    status, found, _ = tree(capsys, tmp_path, sound / 'train')
    assert (status, list(found['splits'])) == (0, ['train'])
    (sound / 'val').rename(tmp_path / 'elsewhere')
    status, found, _ = tree(capsys, tmp_path, sound, '--val', tmp_path / 'elsewhere')
    assert (status, found['splits']['val']['images']) == (0, 3)
    status, again, _ = tree(capsys, tmp_path, sound / 'train', '--val', tmp_path / 'elsewhere')
    assert (status, again) == (0, found)


def test_any_number_of_processes_finds_the_same(capsys, tmp_path, faulty):
    found = [tree(capsys, tmp_path, faulty, '--processes', count) for count in (1, 3)]
    assert found[0] == found[1]


def test_the_sheet_has_a_row_of_samples_for_each_class(capsys, tmp_path, sound):
    for number in range(10):
        write(sound / 'train' / 'b' / f'red{number}.png', 200, 100)
        Image.new('RGB', (200, 100), 'red').save(sound / 'train' / 'b' / f'red{number}.png')
    (sound / 'train' / 'b' / '0.png').write_bytes(b'')
    path = tmp_path / 'sheet.png'
    assert check(capsys, sound, '--sheet', path)[0] == 1
    with Image.open(path) as sheet:
        assert (sheet.format, sheet.size) == ('PNG', (160 + 8 * 100, 2 * 100 + 4))
        pixels = np.asarray(sheet)
    assert np.array_equal(pixels[4:14, 160:180], np.asarray(Image.open(sound / 'train/a/0.png')))
    red = (pixels == (255, 0, 0)).all(-1)
    assert red.sum() == 8 * 96 * 48
    assert red[104:152, 860:956].all()
    assert (pixels[4:, :160] < 128).any()  # names


@pytest.mark.parametrize(
    ('words', 'said'),
    [
        (['{}/gone'], 'error: {}/gone: cannot be read: No such file or directory'),
        (['{}/train/a'], 'error: {}/train/a: has no class folders'),
        (['{}/train/a/0.png'], 'error: {}/train/a/0.png: cannot be read: Not a directory'),
        (['{}', '--val', '{}/gone'], 'error: {}/gone: cannot be read: No such file'),
        (['{}', '--json', '{}/gone/a.json'], 'error: {}/gone/a.json: cannot be written'),
        (['{}', '--sheet', '{}'], 'error: {}: cannot be written: it is a folder'),
    ],
)
def test_wrong_usage_is_status_2_and_one_line(capsys, sound, words, said):
    (sound / 'train' / 'a' / 'sub' / '2.png').unlink()
    (sound / 'train' / 'a' / 'sub').rmdir()
    status, out, err = check(capsys, *(word.format(sound) for word in words))
    assert (status, out) == (2, '')
    assert said.format(sound) in err
    assert err.count('\n') == 1


def test_names_of_any_bytes_are_told_in_one_line(capsys, tmp_path, sound):
    odd = os.fsdecode(b'a\n\xff.png')
    (sound / 'train' / 'a' / odd).write_bytes(b'')
    status, found, out = tree(capsys, tmp_path, sound)
    assert status == 1
    assert found['splits']['train']['unreadable'][0]['name'] == f'a/{odd}'
    assert r'    a/a\n\udcff.png: Unreadable: it is empty' in out.splitlines()


def test_deepspeed_is_not_imported_and_a_pipe_gets_no_bar(sound):
    code = (
        'import sys; from internvl_ds.tools.cli import main; '
        'main(["data", "check", sys.argv[1]]); '
        'sys.exit(str({"torch", "deepspeed"} & set(sys.modules)))'
    )
    done = subprocess.run(
        [sys.executable, '-c', code, str(sound)],
        capture_output=True, text=True, timeout=120, env=base_env(), cwd=ROOT,
    )  # fmt: skip
    assert done.stderr == 'set()\n'
    assert done.stdout.splitlines()[-1] == NOTHING


def test_a_terminal_gets_a_bar(sound):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 80, 0, 0))
    command = [sys.executable, '-m', 'internvl_ds.tools.cli', 'data', 'check', str(sound)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=theirs, env=base_env(), cwd=ROOT
    )
    os.close(theirs)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert b'\r' not in out
    drawn = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert 'train: ' in drawn
    assert '4/4' in drawn
