"""doctor: limits of a shell and of a container."""

from __future__ import annotations

import resource

import pytest

from internvl_ds.tools.doctor import limits
from internvl_ds.tools.doctor.probe_result import ERROR, OK, WARNING


@pytest.fixture
def group(tmp_path, monkeypatch):
    """A control group of this process, as a container sees its own."""
    monkeypatch.setattr(limits, '_CGROUP', tmp_path)

    def write(**files):
        for name, value in files.items():
            (tmp_path / name.replace('_', '.')).write_text(f'{value}\n')

    return write


@pytest.mark.parametrize(('soft', 'verdict'), [(256, ERROR), (1024, WARNING), (4096, OK)])
def test_open_files(soft, verdict):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= before[1] < soft:
        pytest.skip(f'the hard limit here is {before[1]}')
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
    try:
        finding = limits.probe()[0]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert finding.verdict == verdict
    assert f'soft limit {soft}, hard limit' in finding.found
    assert ('ulimit' in finding.advice) == (verdict != OK)


def test_the_processes_of_a_container(group):
    group(pids_max=600, pids_current=120)
    finding = limits.probe()[1]
    assert finding.verdict == ERROR
    assert "the container's: 600, 120 in use" in finding.found
    group(pids_max='max')
    assert 'container' not in limits.probe()[1].found


def test_the_memory_of_a_container(group):
    group(memory_max=10**9, memory_current=6 * 10**8, memory_stat='inactive_file 200000000')
    finding = limits.probe()[2]
    assert finding.verdict == ERROR
    assert 'the container is limited to 1.0 GB, 400.0 MB in use' in finding.found
    assert 'status 137' in finding.advice
    group(memory_max=2**63 - 4096)  # what an older kernel says for no limit
    assert 'container' not in limits.probe()[2].found


def test_the_time_that_a_container_gives(group):
    group(cpu_max='50000 100000')
    finding = limits.probe()[3]
    assert finding.verdict == WARNING
    assert 'the container gives the time of 0.5' in finding.found
    assert 'OMP_NUM_THREADS' in finding.advice
    group(cpu_max='max 100000')
    assert limits.probe()[3].verdict == OK
