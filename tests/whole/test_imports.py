"""Importing the package's modules changes nothing in a program."""

import json
import re
import subprocess
import sys

import pytest

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


HEAVY = ['torch', 'deepspeed', 'timm', 'numpy']
TRAIN, CLI = 'internvl_ds.train', 'internvl_ds.tools.cli'
# What it says, and a module that it may not have, which a listing has no use for.
ANSWERS = [
    (TRAIN, ['--help'], 'usage: internvl_ds.train', 'yaml'),
    (TRAIN, ['--cfg', 'digits_quickstart', '--sead', '3'], 'unrecognized arguments', 'yaml'),
    (TRAIN, ['--cfg', 'nowhere'], 'rank 0 on .* ends the job: ConfigError: .*nowhere', ''),
    (
        TRAIN, ['--cfg', 'digits_quickstart', '--opts', 'TRIAN.EPOCHS', '1'],
        'rank 0 on .* ends the job: ConfigError: .*TRIAN', '',
    ),
    (TRAIN, ['--cfg', 'digits_quickstart', '--batch-size', '0'], 'DATA.BATCH_SIZE is 0', ''),
    (TRAIN, ['--cfg', 'digits_quickstart', '--deepspeed_config', 'zero7'], 'ds_config zero7', ''),
    (CLI, ['--help'], 'usage: internvl-ds', 'yaml'),
    (CLI, ['--version'], 'torch ', 'yaml'),
    (CLI, ['ckpt', 'list', '.'], 'no checkpoint tag', 'yaml'),
    (CLI, ['config', 'keys'], 'TRAIN', ''),
]  # fmt: skip


@pytest.mark.parametrize(('module', 'words', 'says', 'without'), ANSWERS)
def test_help_and_wrong_arguments_are_answered_before_anything_heavy_is_imported(
    tmp_path, module, words, says, without
):
    """Torch alone takes seconds, for which nobody waits who has mistyped a setting."""
    code = (
        'import atexit, json, runpy, sys; names = sys.argv.pop(1).split(); module = sys.argv[1]; '
        'atexit.register(lambda: print(json.dumps([n for n in names if n in sys.modules]))); '
        'del sys.argv[1]; runpy.run_module(module, run_name="__main__", alter_sys=True)'
    )
    command = [sys.executable, '-c', code, ' '.join([*HEAVY, without]), module, *words]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=base_env(), cwd=tmp_path
    )
    assert re.search(says, done.stdout + done.stderr), done
    assert 'Traceback' not in done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
    assert list(tmp_path.iterdir()) == []
