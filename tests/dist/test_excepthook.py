"""One line says why a job ends, from the rank that failed first, and it is the last."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading

import pytest
from PIL import Image

from internvl_ds.dist.excepthook import one_line
from internvl_ds.dist.network import free_port
from tests.dist import ending
from tests.harness.ranks import base_env, run_ranks
from tests.harness.training import small_config, write_folder

RANKS = pytest.mark.ranks


def told(texts):
    """The lines that say why the job ends, with whether each is its rank's last."""
    return [
        (line.partition(' on ')[0], line.partition('ends the job: ')[2], line == lines[-1])
        for lines in map(str.splitlines, texts)
        for line in lines
        if 'ends the job' in line
    ]


def fails(what, folder, ranks=2, **kwargs):
    return run_ranks(getattr(ending, what), ranks, folder, expect_failure=True, **kwargs)


@pytest.mark.first
@RANKS
def test_an_error_that_all_have_is_told_once_and_without_a_traceback(tmp_path):
    texts = fails('alike', tmp_path, 3)
    ((_, text, last),) = told(texts)
    assert text == 'ConfigError: DATA.BATCH_SIZE 3 is odd'
    assert last
    assert 'Traceback' not in ''.join(texts)


@RANKS
def test_train_traceback_brings_the_traceback_of_every_rank_back(tmp_path):
    texts = fails('alike', tmp_path, traceback=True)
    assert len(told(texts)) == 1
    assert all('Traceback' in text for text in texts)


@RANKS
@pytest.mark.parametrize('who', [0, 1])
def test_what_others_see_of_an_error_is_not_told(tmp_path, who):
    texts = fails('one_fails', tmp_path, 3, who=who)
    assert told(texts) == [(f'rank {who}', 'ValueError: a bad batch', True)]
    assert 'Traceback' in texts[who]
    assert not any('Traceback' in text for rank, text in enumerate(texts) if rank != who)


@RANKS
def test_a_cause_that_shows_late_is_told_after_what_others_saw_of_it(tmp_path):
    first, second = told(fails('one_is_late', tmp_path))
    assert first[0] == 'rank 0'
    assert re.search(r'rank 1 on \S+ \(pid \d+\) did not come', first[1])
    assert second == ('rank 1', 'OSError: the share is gone', True)


@RANKS
def test_one_of_the_others_speaks_for_a_rank_that_cannot(tmp_path):
    texts = fails('one_is_killed', tmp_path, 3)
    ((_, text, last),) = told(texts)
    assert text.startswith('rank 1 on ')
    assert last


@RANKS
def test_ctrl_c_in_a_script_is_one_line(tmp_path):
    texts = fails('interrupted', tmp_path)
    assert [text for _, text, _ in told(texts)] == ['KeyboardInterrupt']
    assert 'Traceback' not in ''.join(texts)


@RANKS
@pytest.mark.parametrize('workers', [0, 1])
def test_an_image_that_cannot_be_read_is_named_in_the_last_line(tmp_path, workers):
    data = write_folder(tmp_path / 'images', classes=3, train=12, val=6)
    whole = tmp_path / 'whole.jpg'
    Image.new('RGB', (64, 64), 'red').save(whole)
    bad = data / 'train' / 'class_1' / '001.jpg'
    bad.write_bytes(whole.read_bytes()[:600])
    cfg = tmp_path / 'small.yaml'
    cfg.write_text(small_config(data, TRAIN__WARMUP_EPOCHS=0, DATA__BATCH_SIZE=2).dump())
    texts = fails('train', tmp_path, cfg=cfg, output=tmp_path / 'out', workers=workers)
    ((_, text, last),) = told(texts)
    assert text.startswith(f'DataError: {bad} cannot be used as an image: OSError: ')
    assert last
    assert 'killed by signal' not in ''.join(texts)
    assert 'Traceback' not in ''.join(texts)


@RANKS
@pytest.mark.slow
def test_a_configuration_that_is_wrong_is_told_by_one_rank(tmp_path):
    command = [sys.executable, '-m', 'internvl_ds.train', '--cfg', 'digits_quickstart']
    command += ['--opts', 'TRIAN.EPOCHS', '1']
    env = {'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_port())}
    ranks = [
        subprocess.Popen(
            command, env=base_env(RANK=rank, LOCAL_RANK=rank, **env), cwd=tmp_path,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in '01'
    ]  # fmt: skip
    texts = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1]
    ((_, text, last),) = told(texts)
    assert text.startswith('ConfigError: --opts: unknown key TRIAN')
    assert last
    assert 'Traceback' not in ''.join(texts)
    assert os.listdir(tmp_path) == []


def test_an_error_of_a_loaders_worker_is_told_without_its_traceback():
    text = (
        'Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call '
        'last):\n  File "a.py", line 1, in f\n    g()\nKeyError: 3\n\nThe above exception was the '
        'direct cause of the following exception:\n\nTraceback (most recent call last):\n'
        '  File "b.py", line 2, in h\n    f()\n    ^^^\na.b.DataError: x: two\nlines\n'
    )
    assert one_line(ValueError(text)) == 'x: two lines'
    assert one_line(ValueError('two\n  lines')) == 'two lines'


def _start(**env):
    """A process that joins the others; how it ends."""
    code = (
        'from internvl_ds.dist.process_group import init_distributed; '
        'from internvl_ds.config.tree import default_config; config = default_config(); '
        'config.COMM.INIT_TIMEOUT = 2; '
        'init_distributed(config)'
    )
    variables = {'WORLD_SIZE': '2', 'RANK': '1', 'LOCAL_RANK': '1', 'MASTER_ADDR': '127.0.0.1'}
    return subprocess.run(
        [sys.executable, '-c', code], env=base_env(**variables, **env), capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip


@RANKS
def test_a_start_at_another_programs_port_is_told_and_does_not_abort():
    """torch gives its connection up a moment after the limit: while the interpreter ends."""
    with socket.create_server(('127.0.0.1', 0)) as server:

        def answer():
            with contextlib.suppress(OSError):
                while True:
                    server.accept()[0].close()

        threading.Thread(target=answer, daemon=True).start()
        ended = _start(MASTER_PORT=str(server.getsockname()[1]))
        server.shutdown(socket.SHUT_RDWR)
    ((_, text, last),) = told([ended.stderr])
    assert 'within 2 s (COMM.INIT_TIMEOUT)' in text
    assert last
    assert ended.returncode == 1


@RANKS
def test_a_launcher_that_sets_no_number_is_told_without_a_traceback():
    ended = _start(MASTER_PORT='http')
    ((who, text, last),) = told([ended.stderr])
    assert who == 'a rank'
    assert text.startswith("ConfigError: MASTER_PORT is 'http'")
    assert last
    assert 'Traceback' not in ended.stderr


def test_a_rank_that_has_spoken_is_gone_without_a_look_at_all_that_it_made():
    code = (
        'import gc, sys, torch\n'
        'from internvl_ds.dist.excepthook import speak_on_exceptions\n'
        'speak_on_exceptions(None)\n'
        'try:\n    1 / 0\n'
        'except ZeroDivisionError:\n    sys.excepthook(*sys.exc_info())\n'
        'print(len(gc.get_objects()) / gc.get_freeze_count())'
    )
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, env=base_env(), timeout=60
    )
    assert 'a rank on' in done.stderr
    assert float(done.stdout) < 0.01  # what Python's last collection has to look at
