"""doctor: what DeepSpeed compiles its ops with, and the op of CPU ranks."""

from __future__ import annotations

import os
import shutil

import pytest

from internvl_ds.tools.doctor import compilers
from internvl_ds.tools.doctor.probe_result import ERROR, OK, WARNING

OP = 'deepspeed_shm_comm'


@pytest.fixture
def extensions(tmp_path, monkeypatch):
    """An empty TORCH_EXTENSIONS_DIR on a machine without a GPU."""
    monkeypatch.setenv('TORCH_EXTENSIONS_DIR', str(tmp_path))
    monkeypatch.setattr(compilers, 'has_gpu', lambda: False)
    return tmp_path


def build(folder, torch):
    """What a build for a torch leaves."""
    home = folder / OP
    home.mkdir()
    (home / f'{OP}.so').touch()
    (home / 'build.ninja').write_text(
        f'cflags = -DX -isystem {torch}/include -isystem {torch}/include/torch/csrc/api/include\n'
    )


def test_this_machine_compiles(extensions):
    tools, op = compilers.probe()
    assert tools.verdict == OK
    assert op.verdict == WARNING
    assert f'not built yet in {extensions}' in op.found


def test_no_compiler_bites_where_the_op_is_still_to_be_built(extensions, monkeypatch):
    monkeypatch.setenv('PATH', str(extensions))
    monkeypatch.delenv('CXX', raising=False)
    tools, _ = compilers.probe()
    assert tools.verdict == ERROR
    assert 'missing: the C++ compiler (c++), ninja on PATH' in tools.found
    assert 'apt-get install g++' in tools.advice


def test_no_compiler_is_a_note_where_the_op_is_built(extensions, monkeypatch):
    build(extensions, compilers._torch_dir())
    monkeypatch.setenv('PATH', str(extensions))
    tools, op = compilers.probe()
    assert (tools.verdict, op.verdict) == (WARNING, OK)


def test_the_compiler_of_cxx_is_the_one_that_counts(extensions, monkeypatch):
    monkeypatch.setenv('CXX', '/nowhere/clang++ -O3')
    assert 'the C++ compiler (/nowhere/clang++)' in compilers.probe()[0].found
    monkeypatch.setenv('CXX', str(shutil.which('c++')))
    assert compilers.probe()[0].verdict == OK


def test_an_op_of_another_environment_bites_while_that_is_there(extensions):
    other = extensions / 'other' / 'site-packages' / 'torch'
    other.mkdir(parents=True)
    build(extensions, other)
    op = compilers.probe()[1]
    assert op.verdict == ERROR
    assert f'built for the torch of {other.parent}' in op.found
    assert 'export TORCH_EXTENSIONS_DIR=' in op.advice
    other.rmdir()
    op = compilers.probe()[1]
    assert (op.verdict, 'a torch that is gone' in op.found) == (WARNING, True)


def test_an_op_that_is_older_than_torch_is_a_note(extensions):
    build(extensions, compilers._torch_dir())
    os.utime(extensions / OP / f'{OP}.so', (0, 0))
    op = compilers.probe()[1]
    assert (op.verdict, f'rm -r {extensions}/{OP}' in op.advice) == (WARNING, True)


def test_the_directory_that_all_environments_share_is_a_note(extensions, monkeypatch):
    monkeypatch.delenv('TORCH_EXTENSIONS_DIR')
    monkeypatch.setenv('XDG_CACHE_HOME', str(extensions))
    place = compilers.extensions_dir()
    place.mkdir(parents=True)
    build(place, compilers._torch_dir())
    op = compilers.probe()[1]
    assert (op.verdict, 'export TORCH_EXTENSIONS_DIR=' in op.advice) == (WARNING, True)


def test_the_directory_is_torchs(monkeypatch, tmp_path):
    from torch.utils import cpp_extension

    for variables in ({}, {'TORCH_EXTENSIONS_DIR': str(tmp_path / 'given')}):
        monkeypatch.delenv('TORCH_EXTENSIONS_DIR', raising=False)
        monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        theirs = cpp_extension._get_build_directory(OP, verbose=False)
        assert str(compilers.extensions_dir() / OP) == theirs
