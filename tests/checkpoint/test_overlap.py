"""Background saves that are copied while training goes on: a tag is of the moment of the call."""

import os
import threading

import pytest

from internvl_ds.checkpoint import async_save
from tests.checkpoint import overlapping
from tests.harness.model import OFFLOAD, trained
from tests.harness.ranks import run_ranks

ALL = list(overlapping.AFTER)
CASES = [(1, 'fp32', ALL), (3, 'fp32', ['updates', 'an evaluation'])]
MORE = [
    (0, 'fp32', ALL), (0, 'bf16', ALL), (2, 'bf16', ALL), (3, 'fp32', ALL), (3, 'bf16', ALL),
    (OFFLOAD, 'fp32', ALL),
]  # fmt: skip


@pytest.mark.first
@pytest.mark.ranks
@pytest.mark.parametrize('cases', [CASES, pytest.param(MORE, marks=pytest.mark.soak_only)])
def test_a_tag_is_of_the_moment_of_the_call_whatever_comes_after(tmp_path, cases):
    for found in run_ranks(overlapping.go_on, 2, tmp_path, root=tmp_path, cases=trained(cases)):
        for case, report in found.items():
            unguarded = report.pop('unguarded')
            assert set(map(str, report.values())) == {'[]'}, (case, report)
            # At stage 0 rank 0 alone saves.
            assert unguarded or case.startswith('0'), case
    assert any(found.values())


def test_the_thread_of_a_save_steps_back_and_no_other_does():
    def niceness():
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before, inside = niceness(), []
    thread = threading.Thread(target=lambda: [async_save.step_back(), inside.append(niceness())])
    thread.start()
    thread.join(10)
    assert inside == [min(19, before + async_save._NICENESS)]
    assert niceness() == before
