"""Copies that are made later, by one thread or several. No processes."""

import threading
import time

import pytest
import torch

from internvl_ds.checkpoint.copying import copies, snapshot
from internvl_ds.checkpoint.copying.copies import Copies, memories_of, memory_of
from internvl_ds.checkpoint.copying.snapshot import Snapshot
from internvl_ds.errors import CheckpointError

WRITTEN = r'tensors of the state \(of shape \(4, 5\)\) were written to.*async_save\.wait\(\)'


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(copies, '_PIECE', 16)
    monkeypatch.setattr(snapshot, '_SMALL', 16)


def _pairs():
    sources = [
        torch.randn(4, 5), torch.arange(12).reshape(3, 4).T, torch.randn(7).bfloat16(),
        torch.tensor(3.0), torch.randn(6)[::2],
    ]  # fmt: skip
    return [(s, torch.empty(s.shape, dtype=s.dtype)) for s in sources]


def _added(pairs):
    later = Copies()
    for source, target in pairs:
        later.add(source, target)
    later.seal()
    return later


def test_nothing_is_copied_before_it_is_asked_for_and_then_all_of_it():
    pairs = _pairs()
    for _, target in pairs:
        target.zero_()
    later = _added(pairs)
    assert not later.done
    assert not any(target.any() for _, target in pairs)
    later.finish()
    assert later.done
    assert later.error is None
    assert all(torch.equal(source, target) for source, target in pairs)


def test_who_finishes_waits_for_what_another_thread_is_at(monkeypatch):
    pairs, began = _pairs(), threading.Event()
    later, copy = _added(pairs), Copies._copy

    def slow(self, source, target):
        if threading.current_thread() is not threading.main_thread():
            began.set()
            time.sleep(0.2)
        copy(self, source, target)

    monkeypatch.setattr(Copies, '_copy', slow)
    thread = threading.Thread(target=later.finish)
    thread.start()
    began.wait(10)
    later.finish()
    assert all(torch.equal(source, target) for source, target in pairs)
    thread.join(10)
    assert later.error is None


def test_a_failure_is_kept_and_ends_the_copying(monkeypatch):
    def refuse(self, source, target):
        raise RuntimeError('no memory')

    later = _added(_pairs())
    monkeypatch.setattr(Copies, '_copy', refuse)
    later.finish()
    assert later.done
    assert str(later.error) == 'no memory'


def test_a_write_that_did_not_wait_is_an_error_of_the_save():
    pairs = _pairs()
    later = _added(pairs)
    pairs[0][0][1, 2] = 9
    later.finish()
    with pytest.raises(CheckpointError, match=WRITTEN):
        raise later.error


def test_what_is_dropped_is_not_copied():
    pairs = _pairs()
    later = _added(pairs)
    pairs[0][1].zero_()
    later.drop()
    later.finish()
    assert later.done
    assert not pairs[0][1].any()


def test_a_snapshot_puts_off_what_is_steady_and_not_small():
    steady, other, small = torch.randn(4, 5), torch.randn(9), torch.randn(2)
    of_both = memories_of({'a': [steady[1:], torch.empty(0)], 'b': (small, 'text')})
    assert of_both == {memory_of(steady), memory_of(small)}
    state = Snapshot()
    state.begin(of_both)
    copied = state.copy({'steady': steady, 'view': steady[2], 'other': other, 'small': small})
    wanted = {'steady': steady, 'view': steady[2], 'other': other, 'small': small}
    values = {name: tensor.clone() for name, tensor in wanted.items()}
    for name in ('other', 'small'):
        wanted[name].add_(1)
    state.copies.finish()
    steady.add_(1)
    assert state.copies.error is None
    assert {n for n, t in copied.items() if not torch.equal(t, values[n])} == set()


def test_beyond_its_limit_a_snapshot_holds_the_originals():
    first, second = torch.randn(4, 5), torch.randn(4, 5)
    state = Snapshot()
    state.begin(memories_of([first, second]), limit=100)
    copied = state.copy([first, second])
    assert copied[0] is not first
    assert copied[1].data_ptr() == second.data_ptr()
    second.add_(1)
    with pytest.raises(CheckpointError, match=WRITTEN):
        copies.require_unwritten(state.originals)
    state.begin()
    assert state.originals == []
