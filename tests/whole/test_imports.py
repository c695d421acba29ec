"""Importing the package's modules changes nothing in a program."""

import json
import subprocess
import sys

from tests.harness.ranks import ROOT, base_env


def importing(*words):
    command = [sys.executable, '-m', 'tests.whole.importing', *words]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=base_env(), cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_every_module_registers_patches_and_starts_nothing():
    libraries = importing()
    assert 'deepspeed' in libraries
    found = importing(json.dumps(libraries))
    assert found['changed'] == []
    assert found['imported'] > 100
