"""The scripts in launch/, run against a stand-in for Python that installs and trains nothing."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Answers what the scripts ask of Python, pip and the launcher, and notes down the two that cost.
PYTHON = r"""#!/usr/bin/env bash
case "$*" in
  -) cat "$0.answer" 2>/dev/null || echo "${FAKE_PYTHON:-compiles}" ;;
  --version) echo 'Python 3.12.0' ;;
  '-m venv '*)
    mkdir -p "${*: -1}/bin"
    cp "$0" "${*: -1}/bin/python"
    printf '#!/bin/sh\necho digits\n' >"${*: -1}/bin/internvl-ds"
    cp "$FAKE_DEEPSPEED" "${*: -1}/bin/deepspeed"
    chmod +x "${*: -1}"/bin/*
    ;;
  *sysconfig*) echo "$FAKE_INCLUDE" ;;
  '-m pip '*)
    echo "pip ${*: -1}" >>"$FAKE_CALLS"
    echo "${FAKE_PIP:-}"
    [[ -z ${FAKE_PIP:-} ]]
    ;;
  *build_shm_op*)
    echo op >>"$FAKE_CALLS"
    echo "${FAKE_OP:-}"
    [[ -z ${FAKE_OP:-} ]]
    ;;
  *torch.cuda*) echo 2 ;;
  '-m pytest'*)
    echo "$*" >>"$FAKE_CALLS"
    exit "${FAKE_TESTS:-0}"
    ;;
  '-I -'*) ;;
  *) exec "$REAL_PYTHON" "$@" ;;
esac
"""

# Trains in no time: leaves what the real one leaves, then does as FAKE_TRAINING says.
DEEPSPEED = r"""#!/usr/bin/env bash
port=$(sed 's/.*--master_port \([0-9]*\).*/\1/' <<<"$*")
: >"/dev/shm/deepspeed_allreduce_buffer_$(id -u)_127.0.0.1_${port}_0"
run=.demo/output/digits_quickstart
mkdir -p "$run/ckpt_epoch_1"
echo ckpt_epoch_1 >"$run/latest"
echo '{"epoch": 0, "acc1": 99.0}' >"$run/metrics.jsonl"
echo "{\"epoch\": 1, \"acc1\": ${FAKE_ACCURACY:-97.5}}" >>"$run/metrics.jsonl"
echo "trained with: $*"
case ${FAKE_TRAINING:-} in
  fails) exit 3 ;;
  hangs) sleep 300 & echo "$!" >"$FAKE_CALLS.rank"; echo training; wait ;;
esac
"""


@pytest.fixture
def repo(tmp_path):
    """A copy of the scripts and of what they install from."""
    root = tmp_path / 'a repo'
    shutil.copytree(ROOT / 'launch', root / 'launch')
    shutil.copy(ROOT / 'setup.cfg', root)
    shutil.copy(ROOT / 'pyproject.toml', root)
    return root


@pytest.fixture
def env(tmp_path):
    """An environment in which all is well; a test changes what it is about."""
    include = tmp_path / 'include' / 'python3.12'
    include.mkdir(parents=True)
    (include / 'Python.h').touch()
    tools = tmp_path / 'tools'
    tools.mkdir()
    for name, text in (('python3.12', PYTHON), ('c++', '#!/bin/sh\n'), ('deepspeed', DEEPSPEED)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    for name in (
        *('bash', 'env', 'sh', 'cat', 'cp', 'cksum', 'chmod', 'cut', 'dirname', 'basename', 'id'),
        *('uname', 'df', 'awk', 'tail', 'sed', 'grep', 'flock', 'rm', 'ls', 'mkdir', 'tee'),
        *('sleep',),
    ):
        (tools / name).symlink_to(shutil.which(name))
    (tools / 'deepspeed').rename(tmp_path / 'deepspeed')
    temp = tmp_path / 'temp'
    temp.mkdir()
    return {
        'PATH': str(tools),
        'HOME': str(tmp_path),
        'TMPDIR': str(temp),
        'REAL_PYTHON': sys.executable,
        'FAKE_CALLS': str(tmp_path / 'calls'),
        'FAKE_INCLUDE': str(include),
        'FAKE_DEEPSPEED': str(tmp_path / 'deepspeed'),
    }


def run(repo, env, script, *words, cwd=None):
    return subprocess.run(
        ['bash', str(repo / 'launch' / script), *words],
        env=env,
        cwd=cwd or repo,
        capture_output=True,
        text=True,
        timeout=60,
    )


def set_up(repo, env, extras='demo'):
    """Runs the set-up alone, and returns what it did that costs time."""
    calls = Path(env['FAKE_CALLS'])
    calls.unlink(missing_ok=True)
    code = f'set -euo pipefail; source "{repo}/launch/common.sh"; set_up {extras}; echo ready'
    done = subprocess.run(
        ['bash', '-c', code], env=env, cwd=repo, capture_output=True, text=True, timeout=60
    )
    done.calls = calls.read_text().split('\n')[:-1] if calls.exists() else []
    return done


def have_gpu():
    return Path('/dev/nvidiactl').exists() or shutil.which('nvidia-smi') is not None


class TestOptions:
    def test_help_sets_nothing_up(self, repo, env):
        done = run(repo, env, 'quickstart.sh', '--help')

        assert done.returncode == 0
        assert '--fresh' in done.stdout
        assert 'INTERNVL_DS_VENV' in done.stdout
        assert not (repo / '.venv').exists()

    @pytest.mark.parametrize(
        ('words', 'message'),
        [
            (['--frsh'], "unknown option '--frsh'"),
            (['--epochs'], "--epochs takes a number, not ''"),
            (['--epochs', 'ten'], "--epochs takes a number, not 'ten'"),
            (['--epochs=0'], "--epochs takes a number, not '0'"),
        ],
    )
    def test_wrong_ones_are_status_2_with_the_usage(self, repo, env, words, message):
        done = run(repo, env, 'quickstart.sh', *words)

        assert done.returncode == 2
        assert message in done.stderr
        assert 'Usage:' in done.stderr


class TestSetUp:
    def test_is_done_once_per_extras(self, repo, env):
        first, second = set_up(repo, env), set_up(repo, env)
        other = set_up(repo, env, 'dev,mpi')
        again = set_up(repo, env)

        assert first.calls == ['pip .[demo]', 'op']
        assert second.calls == []
        assert second.stdout == 'ready\n'
        assert other.calls == ['pip .[dev,mpi]', 'op']
        assert again.calls == []

    def test_is_done_again_when_the_dependencies_change(self, repo, env):
        set_up(repo, env)
        with (repo / 'setup.cfg').open('a') as file:
            file.write('\n# changed')

        done = set_up(repo, env)

        assert done.calls == ['pip .[demo]', 'op']
        assert 'making the virtual environment' not in done.stdout

    def test_goes_where_it_is_told(self, repo, env, tmp_path):
        done = set_up(repo, env | {'INTERNVL_DS_VENV': str(tmp_path / 'here')})

        assert done.returncode == 0
        assert (tmp_path / 'here' / 'bin' / 'python').exists()
        assert not (repo / '.venv').exists()

    @pytest.mark.parametrize('damage', ['python', 'interrupted', 'moved', 'half-made'])
    def test_makes_a_broken_environment_anew(self, repo, env, damage):
        set_up(repo, env)
        venv = repo / '.venv'
        (venv / 'old').touch()
        if damage == 'python':
            (venv / 'bin' / 'python').unlink()
        elif damage == 'interrupted':
            (venv / '.internvl_ds-unfinished').touch()
        elif damage == 'moved':
            repo = repo.rename(repo.with_name('elsewhere'))
            venv = repo / '.venv'
        else:
            shutil.rmtree(venv / 'bin')

        done = set_up(repo, env)

        assert done.returncode == 0
        assert 'is broken or half made: making it anew' in done.stdout
        assert done.calls == ['pip .[demo]', 'op']
        assert not (venv / 'old').exists()

    def test_does_not_touch_a_directory_of_someone_else(self, repo, env, tmp_path):
        (tmp_path / 'mine').mkdir()
        (tmp_path / 'mine' / 'thesis.txt').touch()

        done = set_up(repo, env | {'INTERNVL_DS_VENV': str(tmp_path / 'mine')})

        assert done.returncode == 1
        assert 'is no virtual environment that works' in done.stderr
        assert [path.name for path in (tmp_path / 'mine').iterdir()] == ['thesis.txt']

    def test_of_two_at_a_time_installs_once(self, repo, env):
        code = f'set -euo pipefail; source "{repo}/launch/common.sh"; set_up demo'
        both = [subprocess.Popen(['bash', '-c', code], env=env, cwd=repo) for _ in range(2)]

        assert [process.wait(60) for process in both] == [0, 0]
        assert Path(env['FAKE_CALLS']).read_text() == 'pip .[demo]\nop\n'


class TestWhichPython:
    """A Python answers 'compiles', 'runs' (it has no headers), or why it does not suit."""

    def of(self, repo, env, answers, **more):
        tools = Path(env['PATH'])
        (tools / 'python3.12').unlink()
        for minor, answer in answers.items():
            python = tools / f'python3{minor}'
            python.write_text(PYTHON)
            python.chmod(0o755)
            (tools / f'{python.name}.answer').write_text(f'{answer}\n')
        done = set_up(repo, env | more)
        assert done.returncode == 0, done.stderr
        return re.search(r'with Python \S+ \((.*)\)', done.stdout)[1].removeprefix(f'{tools}/')

    @pytest.mark.parametrize(
        ('answers', 'taken'),
        [
            ({'': 'compiles', '.13': 'compiles', '.11': 'compiles'}, 'python3'),
            ({'': 'is 3.9', '.11': 'compiles', '.13': 'compiles'}, 'python3.13'),
            ({'': 'has no venv module', '.10': 'compiles'}, 'python3.10'),
            ({'': 'runs', '.12': 'compiles'}, 'python3.12'),
            ({'': 'runs', '.12': 'runs', '.13': 'is 3.9'}, 'python3'),
        ],
    )
    def test_the_users_own_goes_first_where_it_suits(self, repo, env, answers, taken):
        assert self.of(repo, env, answers) == taken

    def test_the_one_that_is_named_goes_before_all(self, repo, env):
        answers = {'': 'compiles', '.11': 'compiles'}

        assert self.of(repo, env, answers, INTERNVL_DS_PYTHON='python3.11') == 'python3.11'


class TestSetUpFails:
    def test_without_python(self, repo, env):
        (Path(env['PATH']) / 'python3.12').unlink()

        done = set_up(repo, env)

        assert done.returncode == 1
        assert 'no suitable Python was found: it takes 3.10 or newer' in done.stderr
        assert 'none of these is on PATH: python3 python3.13 python3.12' in done.stderr

    @pytest.mark.parametrize('reason', ['is 3.9', 'has no venv module'])
    def test_without_a_suitable_python(self, repo, env, reason):
        done = set_up(repo, env | {'FAKE_PYTHON': reason})

        assert done.returncode == 1
        assert f'python3.12 {reason}' in done.stderr

    @pytest.mark.skipif(have_gpu(), reason='a GPU machine needs no compiler')
    def test_without_a_compiler(self, repo, env):
        (Path(env['PATH']) / 'c++').unlink()

        done = set_up(repo, env)

        assert done.returncode == 1
        assert 'there is no C++ compiler (c++)' in done.stderr
        assert 'apt-get install g++' in done.stderr
        assert done.calls == []

    @pytest.mark.skipif(have_gpu(), reason='a GPU machine needs no compiler')
    def test_without_pythons_headers(self, repo, env):
        (Path(env['FAKE_INCLUDE']) / 'Python.h').unlink()

        done = set_up(repo, env | {'FAKE_PYTHON': 'runs'})

        assert done.returncode == 1
        assert 'apt-get install python3.12-dev' in done.stderr

    def test_without_disk_space(self, repo, env):
        df = Path(env['PATH']) / 'df'
        df.unlink()
        df.write_text('#!/bin/sh\nprintf "Filesystem\\n/dev/x 9 9 5242880 9%% /\\n"\n')
        df.chmod(0o755)

        done = set_up(repo, env)

        assert done.returncode == 1
        assert '5 GiB are free, and it takes 10 GiB' in done.stderr
        assert not (repo / '.venv').exists()

    @pytest.mark.parametrize(
        ('output', 'message'),
        [
            ('WARNING: Retrying ... NewConnectionError(...)', 'could not reach the package index'),
            ('ERROR: [Errno 28] No space left on device', 'ran out of disk space'),
            ('ERROR: No matching distribution found for torch', 'could not install the package'),
        ],
    )
    def test_when_pip_does(self, repo, env, output, message):
        done = set_up(repo, env | {'FAKE_PIP': output})

        assert done.returncode == 1
        assert message in done.stderr
        assert output in done.stderr  # the end of its log
        after = set_up(repo, env)
        assert after.calls == ['pip .[demo]', 'op']
        assert 'anew' not in after.stdout  # nothing had been installed

    def test_when_pip_does_half_way_and_starts_anew_after(self, repo, env):
        set_up(repo, env | {'FAKE_PIP': 'Installing collected packages: torch'})

        assert 'making it anew' in set_up(repo, env).stdout

    def test_when_the_op_does_not_compile(self, repo, env):
        done = set_up(repo, env | {'FAKE_OP': 'fatal error: omp.h'})

        assert done.returncode == 1
        assert 'fatal error: omp.h' in done.stderr
        assert set_up(repo, env).calls == ['pip .[demo]', 'op']


class TestQuickstart:
    def test_trains_and_reports(self, repo, env, tmp_path):
        done = run(repo, env, 'quickstart.sh', '--epochs', '2', cwd=tmp_path)

        assert done.returncode == 0, done.stderr
        assert re.search(r'accuracy +97\.50 % of \d+ validation images', done.stdout)
        assert 'best: 99.00 % after epoch 0' in done.stdout
        assert 'digits_quickstart/: ckpt_epoch_1' in done.stdout
        assert 'digits_quickstart/log_rank0.txt' in done.stdout
        assert 'digits_quickstart/curves.png' in done.stdout
        assert '--cfg digits_quickstart --data-path .demo/digits' in done.stdout
        assert '--opts TRAIN.EPOCHS 2' in done.stdout
        assert 'trained with:' in (repo / '.demo' / 'console.log').read_text()

    def test_says_that_it_resumes(self, repo, env):
        first = run(repo, env, 'quickstart.sh')
        second = run(repo, env, 'quickstart.sh')
        fresh = run(repo, env, 'quickstart.sh', '--fresh')

        assert [first.returncode, second.returncode, fresh.returncode] == [0, 0, 0]
        assert 'found checkpoint' not in first.stdout
        assert 'found checkpoint ckpt_epoch_1: this run resumes from it' in second.stdout
        assert 'found checkpoint' not in fresh.stdout

    def test_fails_below_95_percent(self, repo, env):
        done = run(repo, env | {'FAKE_ACCURACY': '94.9'}, 'quickstart.sh')

        assert done.returncode == 1
        assert '94.90 %' in done.stdout
        assert 'the accuracy is under 95 %' in done.stderr

    def test_points_to_the_log_when_training_fails(self, repo, env):
        done = run(repo, env | {'FAKE_TRAINING': 'fails'}, 'quickstart.sh')

        assert done.returncode == 1
        assert 'training failed (status 3)' in done.stderr
        assert '.demo/console.log' in done.stderr
        assert 'accuracy ' not in done.stdout

    @pytest.mark.parametrize(
        ('number', 'status'), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
    )
    def test_takes_its_ranks_and_shared_memory_with_it(self, repo, env, tmp_path, number, status):
        process = subprocess.Popen(
            ['bash', 'launch/quickstart.sh'],
            env=env | {'FAKE_TRAINING': 'hangs'},
            cwd=repo,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=default_signals,
        )
        output = ''
        for line in process.stdout:
            output += line
            if line == 'training\n':
                break
        port = re.search(r'--master_port (\d+)', output)[1]
        rank = int(Path(env['FAKE_CALLS'] + '.rank').read_text())
        assert buffers(port)

        process.send_signal(number)
        process.communicate(timeout=30)

        assert process.returncode == status
        assert not buffers(port)
        assert not alive(rank)


class TestTest:
    @pytest.fixture
    def env(self, env):
        for name in ('ruff', 'mypy'):
            tool = Path(env['PATH']) / name
            tool.write_text(f'#!/bin/sh\necho {name} "$*" >>"$FAKE_CALLS"\n')
            tool.chmod(0o755)
        return env

    @pytest.mark.parametrize('script', ['launch/test.sh', '.ci/run'])
    def test_runs_every_check_and_keeps_the_status(self, repo, env, tmp_path, script):
        shutil.copytree(ROOT / '.ci', repo / '.ci')

        done = subprocess.run(
            ['bash', str(repo / script), '-k', 'a b'],
            env=env | {'FAKE_TESTS': '5'},
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            timeout=60,
        )

        assert done.returncode == 5
        calls = Path(env['FAKE_CALLS']).read_text().splitlines()
        assert calls[2:] == ['ruff check', 'ruff format --check', 'mypy ', '-m pytest -k a b']

    def test_stops_at_the_first_check_that_fails(self, repo, env):
        (Path(env['PATH']) / 'mypy').write_text('#!/bin/sh\nexit 4\n')

        done = run(repo, env, 'test.sh')

        assert done.returncode == 4
        assert 'pytest' not in Path(env['FAKE_CALLS']).read_text()


def default_signals():
    """A shell cannot trap a signal that it was started to ignore, as by nohup or behind an &."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def buffers(port):
    return list(Path('/dev/shm').glob(f'deepspeed_allreduce_buffer_{os.getuid()}_*_{port}_*'))


def alive(pid):
    for _ in range(50):
        try:
            stat = Path(f'/proc/{pid}/stat').read_text()
        except FileNotFoundError:
            return False
        if stat.rpartition(')')[2].split()[0] == 'Z':
            return False
        time.sleep(0.1)
    return True
