"""The internvl-ds command: the digits data set, versions, and how errors are told."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from internvl_ds.errors import InternvlDsError
from internvl_ds.tools.cli import build_parser, main
from internvl_ds.tools.cli import digits as digits_module
from internvl_ds.tools.cli.digits import DigitsSummary, enlarge, write_digits


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """The data set, written once; tests only read it."""
    root = tmp_path_factory.mktemp('data') / 'new' / 'digits'
    assert write_digits(root) == DigitsSummary(root, train=1433, val=364, written=True)
    return root


def snapshot(root):
    return {path: path.stat().st_mtime_ns for path in sorted(root.rglob('*'))}


class TestDigits:
    def test_are_all_there_once(self, digits):
        numbers = sorted(int(path.stem) for path in digits.glob('*/*/*.png'))

        assert numbers == list(range(1797))
        assert {path.parent.parent.name for path in digits.glob('*/*/*.png')} == {'train', 'val'}

    def test_lie_in_the_folder_of_their_class(self, digits):
        targets = load_digits().target

        for path in digits.glob('*/*/*.png'):
            assert path.parent.name == str(targets[int(path.stem)])

    def test_are_split_alike_in_every_class(self, digits):
        for name in '0123456789':
            train = len(list((digits / 'train' / name).iterdir()))
            val = len(list((digits / 'val' / name).iterdir()))
            assert val / (train + val) == pytest.approx(0.2, abs=0.005)

    @pytest.mark.parametrize('index', [0, 1, 777, 1796])
    def test_show_what_scikit_learn_has(self, digits, index):
        (path,) = digits.glob(f'*/*/{index:04d}.png')
        original = load_digits().images[index] * 255 / 16

        with Image.open(path) as image:
            assert (image.mode, image.size) == ('RGB', (32, 32))
            pixels = np.asarray(image).astype(float)
            shrunk = np.asarray(image.convert('L').resize((8, 8), Image.Resampling.BOX))

        assert np.array_equal(pixels[..., 0], pixels[..., 1])
        assert np.array_equal(pixels[..., 0], pixels[..., 2])
        assert np.corrcoef(shrunk.ravel(), original.ravel())[0, 1] > 0.97
        assert np.abs(shrunk - original).mean() < 20

    def test_reach_from_black_to_white(self):
        flat = np.zeros((8, 8))

        assert np.asarray(enlarge(flat)).max() == 0
        assert np.asarray(enlarge(flat + 16)).min() == 255

    def test_leave_nothing_else_behind(self, digits):
        assert [path.name for path in digits.parent.iterdir()] == ['digits']
        assert sorted(path.name for path in digits.iterdir()) == ['train', 'val']

    def test_are_left_as_they_are_when_they_are_there(self, digits):
        before = snapshot(digits)

        assert write_digits(digits) == DigitsSummary(digits, train=1433, val=364, written=False)
        assert snapshot(digits) == before

    def test_are_the_same_at_every_call(self, digits, tmp_path):
        again = tmp_path / 'again'
        again.mkdir()  # an empty folder is no obstacle

        write_digits(again)

        for path in again.glob('*/*/*.png'):
            assert path.read_bytes() == (digits / path.relative_to(again)).read_bytes()

    def test_refuse_a_folder_that_holds_something_else(self, tmp_path):
        (tmp_path / 'notes.txt').write_text('mine')

        with pytest.raises(InternvlDsError, match=r'not a complete digits .* notes\.txt'):
            write_digits(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ['notes.txt']

    def test_refuse_a_data_set_with_an_image_missing(self, digits, tmp_path):
        root = tmp_path / 'digits'
        for split in ('train', 'val'):
            for name in '0123456789':
                (root / split / name).mkdir(parents=True)
        (root / 'train' / '0' / '0000.png').touch()

        with pytest.raises(InternvlDsError, match='not a complete digits data set'):
            write_digits(root)

    def test_refuse_a_file(self, tmp_path):
        (tmp_path / 'file').touch()

        with pytest.raises(InternvlDsError, match='is a file'):
            write_digits(tmp_path / 'file')

    def test_say_why_they_cannot_be_written(self, tmp_path):
        (tmp_path / 'file').touch()

        with pytest.raises(InternvlDsError, match=r'cannot be written there: .*File exists'):
            write_digits(tmp_path / 'file' / 'digits')

    def test_are_not_seen_half_written(self, tmp_path, monkeypatch):
        def fail(root, *_):
            (root / 'train' / '0').mkdir(parents=True)
            raise OSError(28, 'No space left on device')

        monkeypatch.setattr(digits_module, '_write_images', fail)

        with pytest.raises(InternvlDsError, match='No space left on device'):
            write_digits(tmp_path / 'digits')
        assert list(tmp_path.iterdir()) == []

    def test_of_a_quicker_process_are_taken(self, digits, tmp_path, monkeypatch):
        root = tmp_path / 'digits'

        def lose_the_race(staged, images, targets):
            root.symlink_to(digits)
            staged.mkdir()
            return 0, 0

        monkeypatch.setattr(digits_module, '_write_images', lose_the_race)

        assert write_digits(root) == DigitsSummary(root, train=1433, val=364, written=False)

    def test_need_scikit_learn(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)

        with pytest.raises(InternvlDsError, match=r"pip install 'internvl_ds\[demo\]'"):
            write_digits(tmp_path / 'digits')
        assert list(tmp_path.iterdir()) == []


class TestCommand:
    def test_digits_says_what_it_did(self, tmp_path, capsys):
        root = tmp_path / 'digits'

        assert main(['digits', str(root)]) == 0
        assert main(['digits', str(root)]) == 0

        first, second = capsys.readouterr().out.splitlines()
        assert first == f'wrote 1433 training and 364 validation images in {root}'
        assert second.startswith(f'{root} holds the digits already')

    def test_a_users_error_is_one_line_on_stderr_and_status_2(self, tmp_path, capsys):
        (tmp_path / 'file').touch()

        assert main(['digits', str(tmp_path / 'file')]) == 2

        out, err = capsys.readouterr()
        assert out == ''
        assert re.fullmatch(r'internvl-ds digits: error: .*/file: is a file; .*\n', err)

    @pytest.mark.parametrize('words', [[], ['dogits', '/x'], ['digits']])
    def test_wrong_words_are_status_2_with_the_usage(self, words, capsys):
        with pytest.raises(SystemExit) as caught:
            main(words)

        assert caught.value.code == 2
        assert 'usage: internvl-ds' in capsys.readouterr().err

    def test_version_is_a_subcommand_and_a_flag(self, capsys):
        assert main(['version']) == 0
        by_command = capsys.readouterr().out
        with pytest.raises(SystemExit) as caught:
            main(['--version'])

        assert caught.value.code == 0
        assert capsys.readouterr().out == by_command
        names = [line.split()[0] for line in by_command.splitlines()]
        assert names == ['internvl_ds', 'torch', 'torchvision', 'deepspeed', 'timm']
        assert f'torch {metadata.version("torch")}' in by_command

    def test_a_package_that_is_not_installed_has_no_version(self, monkeypatch, capsys):
        def fail(name):
            raise metadata.PackageNotFoundError(name)

        monkeypatch.setattr(metadata, 'version', fail)

        assert main(['version']) == 0
        assert 'timm not installed' in capsys.readouterr().out

    def test_help_lists_every_subcommand(self, capsys):
        with pytest.raises(SystemExit) as caught:
            main(['--help'])

        assert caught.value.code == 0
        out = capsys.readouterr().out
        assert 'digits' in out
        assert 'version' in out

    def test_dir_is_a_path(self):
        assert build_parser().parse_args(['digits', 'x']).dir == Path('x')
