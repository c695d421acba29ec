"""What the check finds in one file, in which process, and what becomes of one that is killed."""

import multiprocessing
import os
import signal

import pytest
from PIL import Image

from internvl_ds.errors import DataError
from internvl_ds.tools.data.look import _AHEAD, _CHUNK, in_processes, look, look_at
from tests.train.faulty import PICTURES, colour, encode, grey

PATHS = [str(number) for number in range(10 * _CHUNK)]


def process_of(path):
    return path, os.getpid()


def killed_at_40(path):
    if path == '40':
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize('picture', PICTURES, ids=[picture.name for picture in PICTURES])
def test_a_file_is_refused_where_training_refuses_it(tmp_path, picture):
    path = tmp_path / picture.name
    path.write_bytes(picture.content())
    looked = look(str(path))
    assert bool(looked.error) == (picture.mean is None)
    assert picture.words in looked.error
    assert looked.size == path.stat().st_size


@pytest.mark.parametrize(
    ('data', 'kinds'),
    [
        (encode(colour(), 'PNG'), ()),
        (encode(colour().convert('CMYK'), 'JPEG'), ('CMYK',)),
        (encode(colour().quantize(), 'PNG'), ('palette',)),
        (encode(grey(65535, 'u2'), 'PNG'), ('16-bit',)),
        (encode(grey(65535, 'u2'), 'TIFF'), ('16-bit',)),
        (encode(colour(), 'GIF', save_all=True, append_images=[Image.new('RGB', (16, 16))]),
         ('palette', 'animated')),
        (encode(colour(), 'TIFF', save_all=True, append_images=[colour()]), ('several frames',)),
    ],
)  # fmt: skip
def test_what_is_odd_is_named(tmp_path, data, kinds):
    (tmp_path / 'a.png').write_bytes(data)
    looked = look(str(tmp_path / 'a.png'))
    assert looked.kinds == kinds
    assert (looked.width, looked.height, looked.error) == (16, 16, '')


def test_sizes_are_those_of_the_turned_image_and_a_missing_file_is_an_error(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (30, 20)).save(tmp_path / 'a.png', exif=exif)
    looked = look(str(tmp_path / 'a.png'))
    assert (looked.width, looked.height) == (20, 30)
    assert 'No such file' in look(str(tmp_path / 'b.png')).error


def test_results_come_in_order_from_several_processes_and_few_wait():
    done = []
    results = in_processes(process_of, PATHS, 2, done.append)
    assert next(results)[0] == '0'
    assert len(done) == 1
    assert [path for path, _ in results] == PATHS[1:]
    assert sum(done) == len(PATHS) > _AHEAD * 2 * _CHUNK
    assert len({process for _, process in in_processes(process_of, PATHS, 2, len_of)}) <= 2
    assert look_at([], 2, done.append) == []


def len_of(count):
    return count


def test_a_process_that_is_killed_is_an_error_of_one_line():
    with pytest.raises(DataError, match='has ended on its own: .* fewer --processes'):
        list(in_processes(killed_at_40, PATHS, 2, len_of))
    assert not multiprocessing.active_children()
