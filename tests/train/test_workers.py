"""Which processes end with a rank, and which it leaves alone."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from internvl_ds.dist.signals import SIGNALS
from internvl_ds.errors import DataError
from internvl_ds.files import forks
from internvl_ds.train import workers
from internvl_ds.train.workers import Loader
from tests.dist import ending
from tests.harness.ranks import ROOT, base_env, run_ranks
from tests.harness.training import write_folder


@pytest.mark.first
@pytest.mark.ranks
@pytest.mark.parametrize('kept', [False, True])
def test_only_workers_of_loaders_are_killed_at_exit(tmp_path, kept):
    data = write_folder(tmp_path / 'images', classes=3, train=24, val=6)
    (workers,) = run_ranks(
        ending.beside_a_child, 1, tmp_path, folder=tmp_path, data=data, persistent=kept
    )
    assert (tmp_path / 'ended in order 0').exists()
    assert len(workers) == 2
    assert not [pid for pid in workers if Path(f'/proc/{pid}').exists()]


def test_another_thread_than_the_main_one_may_end_the_process():
    worker = multiprocessing.Process(target=time.sleep, args=(60,), daemon=True)
    worker.start()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(workers._kill, [worker]).result(30)
    assert worker.exitcode == -signal.SIGKILL


class Stuck:
    """A data set of an image that never comes."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGSTOP)


def test_a_worker_that_stands_still_is_named_at_the_limit():
    begin = time.monotonic()
    with pytest.raises(DataError, match=r'within COMM.TIMEOUT \(2 s\): one of the processes \d+ '):
        list(Loader(Stuck(), num_workers=1, limit=2))
    for worker in multiprocessing.active_children():
        worker.kill()
    assert time.monotonic() - begin < 60


def test_an_error_in_a_worker_is_that_error():
    with pytest.raises(AttributeError, match='no_such_name'):
        list(Loader([0], num_workers=1, limit=60, collate_fn=lambda batch: os.no_such_name))


def test_a_signal_between_the_fork_and_the_beginning_is_ignored():
    loader = Loader(Drawn(), num_workers=2, limit=60, begin_within=5)
    forks.at_fork('signals', lambda: [os.kill(os.getpid(), number) for number in SIGNALS])
    try:
        assert len(list(loader)) == len(Drawn())
    finally:
        forks.forget('signals')


class Drawn:
    """A data set of random numbers."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return index, torch.randint(1 << 40, ())


@pytest.fixture
def stand_still(monkeypatch):
    """Call it: the workers of the next ``tries`` starts stop before they begin; none is left."""
    others = multiprocessing.active_children()
    left = [0]
    start = Loader._start

    def start_some(loader):
        forks.forget('stand still')
        if left[0] > 0:
            left[0] -= 1
            forks.at_fork('stand still', lambda: os.kill(os.getpid(), signal.SIGSTOP))
        return start(loader)

    monkeypatch.setattr(Loader, '_start', start_some)
    yield lambda tries: left.__setitem__(0, tries)
    forks.forget('stand still')
    assert not set(multiprocessing.active_children()) - set(others)


@pytest.mark.parametrize('generator', [None, torch.Generator()], ids=['global', 'own'])
@pytest.mark.parametrize('tries', [1, 2])
def test_workers_that_do_not_begin_are_started_anew(tries, generator, stand_still, caplog):
    """What Python 3.10 does to a child now and then: it never comes back from the fork."""

    def epochs(tries):
        (generator or torch.default_generator).manual_seed(5)
        loader = Loader(
            Drawn(), num_workers=2, limit=60, begin_within=2, shuffle=True, generator=generator
        )
        stand_still(tries)
        return [[torch.stack(batch).tolist() for batch in loader] for _ in range(2)]

    assert epochs(tries) == epochs(0)
    assert caplog.text.count('did not begin within DATA.WORKER_TIMEOUT (2 s)') == tries


def kept_loader(**settings):
    return Loader(Drawn(), num_workers=2, limit=60, persistent_workers=True, **settings)


def test_kept_workers_read_every_epoch():
    loader = kept_loader()
    pids = set()
    for _ in range(3):
        batches = iter(loader)
        pids.add(tuple(worker.pid for worker in batches.workers))
        assert [int(index) for index, _ in batches] == list(range(12))
    assert len(pids) == 1


def test_kept_workers_drop_what_is_left_of_an_epoch_that_was_broken_off():
    loader = kept_loader(prefetch_factor=3)
    batches = iter(loader)
    assert [int(next(batches)[0]) for _ in range(2)] == [0, 1]
    assert [int(index) for index, _ in loader] == list(range(12))


def test_kept_workers_that_stand_still_between_epochs_are_replaced(caplog):
    loader = kept_loader(begin_within=2)
    before = iter(loader)
    list(before)
    os.kill(before.workers[1].pid, signal.SIGSTOP)
    after = iter(loader)
    assert [int(index) for index, _ in after] == list(range(12))
    assert caplog.text.count('did not begin within DATA.WORKER_TIMEOUT (2 s)') == 1
    assert not {worker.pid for worker in before.workers} & {worker.pid for worker in after.workers}
    assert not any(worker.is_alive() for worker in before.workers)


class StuckTheSecondTime(Drawn):
    """A data set that each process reads once."""

    read = 0

    def __getitem__(self, index):
        self.read += 1
        if self.read > len(self):
            os.kill(os.getpid(), signal.SIGSTOP)
        return index


def test_kept_workers_that_stand_still_in_a_later_epoch_are_named_at_the_limit():
    loader = Loader(StuckTheSecondTime(), num_workers=1, limit=2, persistent_workers=True)
    assert len(list(loader)) == 12
    batches = iter(loader)
    with pytest.raises(DataError, match=r'within COMM.TIMEOUT \(2 s\): one of the processes \d+ '):
        list(batches)
    workers._kill(batches.workers)


@pytest.mark.parametrize(('ending', 'status'), [('SIGKILL', -signal.SIGKILL), ('exit', 3)])
def test_kept_workers_die_with_their_rank(ending, status):
    """Also where the rank has no time to say anything, and where one of them stands still."""
    code = f'from tests.train.test_workers import end_with_kept; end_with_kept({ending!r})'
    rank = subprocess.Popen(
        [sys.executable, '-c', code], stdout=subprocess.PIPE, text=True, env=base_env(), cwd=ROOT
    )
    pids = next(line for line in rank.stdout if line.startswith('pids ')).split()[1:]
    assert len(pids) == 4
    begin = time.monotonic()
    assert rank.wait(60) == status
    while any(Path(f'/proc/{pid}').exists() for pid in pids) and time.monotonic() < begin + 60:
        time.sleep(0.05)
    assert not [pid for pid in pids if Path(f'/proc/{pid}').exists()]


def end_with_kept(ending):
    loaders = [kept_loader(), kept_loader()]
    batches = [iter(loader) for loader in loaders]
    list(batches[0])
    next(batches[1])
    workers = [worker for each in batches for worker in each.workers]
    for worker in workers[::2]:
        os.kill(worker.pid, signal.SIGSTOP)
    print('pids', *(worker.pid for worker in workers), flush=True)
    if ending == 'SIGKILL':
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(3)


def test_workers_that_never_begin_are_named(stand_still):
    loader = Loader(Drawn(), num_workers=2, limit=60, begin_within=1)
    stand_still(3)
    with pytest.raises(DataError, match=r'\d+, \d+, did not begin .* in 3 tries: .*NUM_WORKERS'):
        list(loader)
