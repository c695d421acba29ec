"""A core of the suite under the oldest DeepSpeed that setup.cfg allows, beside the rest as it is.

`nox -s versions` runs the whole core, in an environment for each combination of versions.
"""

import os
import re
import subprocess
import sys

import pytest
from packaging.specifiers import SpecifierSet

from internvl_ds.config.ds.unsupported import SUPPORTED
from tests.harness.ranks import BESIDE, ROOT, base_env, run_command

# A test on ranks of the bridge, of averages and of all that zero/ knows.
CORE = ('tests/zero', 'tests/engine', 'tests/checkpoint/test_reshard.py')
# DeepSpeed would take most of a minute to compile its op for CPU ranks.
QUICK = {'TESTS_WITHOUT_SHM_OP': '1'}


def allowed():
    return re.search(r'^ *deepspeed(\S+)', (ROOT / 'setup.cfg').read_text(), re.M).group(1)


def oldest():
    return re.search(r'>=([^,]+)', allowed()).group(1)


def test_what_setup_cfg_allows_is_what_is_not_refused():
    assert SpecifierSet(allowed()) == SUPPORTED


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_core_passes_under_the_oldest_deepspeed(tmp_path):
    home = tmp_path / 'deepspeed'
    install = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-input', '--no-deps']
    install += ['--no-build-isolation', '--target', str(home), f'deepspeed=={oldest()}']
    done = subprocess.run(install, capture_output=True, text=True, timeout=300, env=base_env())
    assert done.returncode == 0, done.stderr
    env = QUICK | {BESIDE: str(home), 'PYTHONPATH': os.pathsep.join([str(home), str(ROOT)])}
    version = [sys.executable, '-c', 'import deepspeed; print(deepspeed.__version__)']
    assert run_command(version, 60, env=env).output.split()[-1] == oldest()
    tests = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-m', 'first', *CORE]
    job = run_command(tests, 800, env=env, cwd=ROOT)
    assert job.returncode == 0, job.output[-8000:]
    assert int(re.search(r'(\d+) passed', job.output).group(1)) > 15, job.output[-2000:]
