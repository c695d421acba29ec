"""doctor: versions against what this package and torchvision ask for."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest

from internvl_ds.tools.doctor.probe_result import ERROR, OK, WARNING
from internvl_ds.tools.doctor.versions import installed, pair, probe, unmet


@pytest.fixture
def old_torch(tmp_path, monkeypatch):
    """A torch of another version that comes first, as metadata goes."""
    home = tmp_path / 'torch-2.8.0.dist-info'
    home.mkdir()
    (home / 'METADATA').write_text('Metadata-Version: 2.1\nName: torch\nVersion: 2.8.0\n')
    monkeypatch.syspath_prepend(str(tmp_path))


def by_topic(findings):
    return {finding.topic: finding for finding in findings}


def test_this_environment_is_within_the_ranges(monkeypatch):
    monkeypatch.setenv('PATH', str(Path(sys.executable).parent))
    found = by_topic(probe())
    assert {finding.verdict for finding in found.values()} == {OK}
    assert f'torch {metadata.version("torch")}' in found['packages'].found


def test_another_python_on_path_is_a_note(tmp_path, monkeypatch):
    stub = tmp_path / 'python'
    stub.write_text('#!/bin/sh\necho /usr\n')
    stub.chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}:/bin')
    finding = by_topic(probe())['python']
    assert (finding.verdict, f'`python` on PATH is {stub}' in finding.found) == (WARNING, True)
    monkeypatch.setenv('PATH', str(tmp_path / 'none'))
    assert 'is not there' in by_topic(probe())['python'].found


def test_a_torch_outside_the_ranges_bites(old_torch):
    found = by_topic(probe())
    assert found['version ranges'].verdict == ERROR
    assert 'torch 2.8.0 (needs <2.16,>=2.9)' in found['version ranges'].found
    assert found['torch pair'].verdict == ERROR
    assert 'not 2.8.0' in found['torch pair'].found


def test_unmet_skips_extras_and_names_what_is_not_there():
    assert unmet(['nonesuch-1>=2', 'nonesuch-2; extra == "test"', 'torch>=2']) == [
        'nonesuch-1 is not installed'
    ]
    assert installed('nonesuch-1') is None


@pytest.mark.parametrize(
    ('torch', 'vision', 'asks', 'verdict'),
    [
        ('2.15.0', '0.29.2', 'torch==2.15.0', OK),
        ('2.15.0+cpu', '0.29.2+cpu', 'torch==2.15.0', OK),
        ('2.15.0+cu130', '0.29.2', 'torch==2.15.0', OK),
        ('2.15.0+cpu', '0.29.2', 'torch==2.15.0', WARNING),  # PyPI's links CUDA
        ('2.14.1', '0.29.2', 'torch==2.15.0', ERROR),
        ('2.14.1', '0.29.2', 'torch (>=2.15.0)', ERROR),
    ],
)
def test_torchvision_fits_the_torch_that_it_names(torch, vision, asks, verdict):
    finding = pair(torch, vision, ['numpy', asks, 'scipy ; extra == "scipy"'])
    assert finding.verdict == verdict
    assert bool(finding.advice) == (verdict != OK)
