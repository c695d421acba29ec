"""The doctor subcommand, for real, on a machine that is made to be unwell."""

from __future__ import annotations

import json
import os
import sys

import pytest

from internvl_ds.tools.cli import main
from internvl_ds.tools.doctor import examine as examining
from internvl_ds.tools.doctor.examine import examine
from internvl_ds.tools.doctor.probe_result import ERROR, OK, ProbeResult, fault, ok, warn
from internvl_ds.tools.doctor.probes import PROBES, Probe
from internvl_ds.tools.doctor.screen import screen, summary
from tests.harness.ranks import ROOT, run_command


@pytest.fixture
def only(monkeypatch):
    """Leaves one probe, and makes modules that come before those that are installed."""

    def leave(name, folder=None, **modules):
        monkeypatch.setattr(examining, 'PROBES', {name: PROBES[name]})
        for module, text in modules.items():
            (folder / module).mkdir()
            (folder / module / '__init__.py').write_text(text)
        if folder:
            monkeypatch.setenv('PYTHONPATH', f'{folder}{os.pathsep}{ROOT}')

    return leave


@pytest.mark.slow
def test_a_machine_that_is_unwell_for_real(tmp_path):
    tools, output = tmp_path / 'bin', tmp_path / 'file'
    tools.mkdir()
    output.touch()
    (tools / 'mpirun').write_text(
        '#!/bin/sh\necho "HYDRA build details:"\necho " Version: 5.0.2"\n'
    )
    (tools / 'mpirun').chmod(0o755)
    words = f'ulimit -n 256; export PATH={tools}:$PATH; exec "$@"'
    command = [
        sys.executable,
        '-m',
        'internvl_ds.tools.cli',
        'doctor',
        '--json',
        '--output',
        str(output),
    ]
    job = run_command(
        ['bash', '-c', words + ' 2>/dev/null', 'doctor', *command],
        240,
        env={'NCCL_SOCKET_IFNAME': 'nonesuch0'},
    )
    tree = json.loads(job.output)
    findings = [ProbeResult(**fields) for fields in tree['findings']]
    bad = {finding.topic for finding in findings if finding.verdict == ERROR}
    assert job.returncode == 1
    assert {'open files', 'MPI', 'OUTPUT', 'network'} <= bad
    assert tree['errors'] == len(bad)
    topics = [finding.topic for finding in findings]
    assert {'python', 'imports', 'accelerator', 'compilers', 'memory', 'starters'} <= set(topics)
    assert len(set(topics)) == len(topics)
    lines = screen(findings).splitlines()
    assert max(map(len, lines)) <= 100
    # One screen, without the warnings of what other jobs on this machine leave and take meanwhile.
    here = [finding for finding in findings if finding.verdict == OK or finding.topic in bad]
    assert len(screen(here).splitlines()) <= 40


def test_the_exit_status_says_whether_something_bites(tmp_path, only, capsys):
    only('OUTPUT')
    (tmp_path / 'file').touch()
    assert main(['doctor', '--output', str(tmp_path / 'file')]) == 1
    out = capsys.readouterr().out
    assert out.startswith('error    OUTPUT            ')
    assert out.endswith('1 error: OUTPUT (0 warnings)\n')
    only('network')
    assert main(['doctor', '--json']) == 0
    assert json.loads(capsys.readouterr().out)['errors'] == 0


def test_an_import_that_raises_is_explained(tmp_path, only):
    only(
        'imports',
        tmp_path,
        torch='',
        torchvision="raise RuntimeError('operator torchvision::nms does not exist\\nmore')",
        deepspeed="raise ImportError('no deepspeed')",
    )
    imports, accelerator = examine(tmp_path)
    assert imports.verdict == ERROR
    assert imports.found == (
        'import torchvision: RuntimeError: operator torchvision::nms does not exist'
    )
    assert 'a CPU build of torch' in imports.advice
    assert accelerator.found == 'import deepspeed: ImportError: no deepspeed'


def test_an_import_that_aborts_is_a_line(tmp_path, only):
    only('imports', tmp_path, torch='import os\nprint("words")\nos.abort()')
    (finding,) = examine(tmp_path)
    assert (finding.topic, finding.verdict) == ('imports', ERROR)
    assert 'died of SIGABRT' in finding.found


def test_a_probe_that_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(examining, 'PROBES', {'limits': Probe('limits', 'probe', 0.01)})
    (finding,) = examine(tmp_path)
    assert (finding.verdict, finding.found) == (ERROR, 'no answer within 0.01 s')


def test_a_probe_that_raises_is_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(examining, 'PROBES', {'nonesuch': Probe('limits', 'probe', 30)})
    (finding,) = examine(tmp_path)
    assert finding.verdict == ERROR
    assert finding.found == "the probe failed: KeyError: 'nonesuch'"


def test_no_process_to_be_had_is_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'executable', str(tmp_path / 'no-python'))
    monkeypatch.setattr(examining, 'PROBES', {name: PROBES[name] for name in ('limits', 'OUTPUT')})
    findings = examine(tmp_path)
    assert [finding.topic for finding in findings] == ['limits', 'OUTPUT']
    assert all('no process can be started' in finding.found for finding in findings)


def test_the_screen_wraps_and_sums_up():
    long = 'word ' * 60
    lines = screen([ok('a', long), warn('b', 'x', 'y'), fault('c', 'z', long)]).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[-1] == '1 error: c (1 warning)'
    assert '-> y' in screen([warn('b', 'x', 'y')])
    assert summary([ok('a', '')]) == 'no errors (0 warnings)'
