"""The command over the real training program: trials that fail, interruptions, and its answer."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from internvl_ds.config.ds import resolve as ds
from internvl_ds.config.ds.load import load_ds_config
from internvl_ds.config.tree import default_config
from internvl_ds.tools.cli import build_parser, main
from internvl_ds.tools.cli.digits import write_digits
from internvl_ds.tools.tune.records import Records
from internvl_ds.tools.tune.trial import MARK
from tests.harness.ranks import ROOT, base_env, run_command, wait_for_words

# Virtual memory, in KiB: the program takes some 5 GB of it on a CPU.
LIMITED = ['bash', '-c', 'ulimit -v 32000000; exec "$@"', 'bash', sys.executable]
LOG_OF_FIRST = 'tune/trials/000/log.txt'
FATES = {fate: {'opts': {'MODEL.KWARGS': {'fate': fate}}} for fate in ('crash', 'eat', 'hang')}


def words(tmp_path, *more, launcher):
    """Of the command; few updates, and a space of fates."""
    space = tmp_path / 'space.json'
    space.write_text(json.dumps({'axes': {'fate': FATES}}))
    return [
        '--cfg', 'digits_quickstart', '--data-path', str(tmp_path / 'digits'),
        '--output', str(tmp_path / 'tune'), '--updates', '2', '--warmup', '1', *more,
        '--', *launcher,
    ]  # fmt: skip


def marked(folder):
    """The processes that belong to trials in this folder."""
    found = []
    for entry in Path('/proc').glob('[0-9]*'):
        try:
            if f'{MARK}={folder}/'.encode() in (entry / 'environ').read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def read(path):
    return path.read_text(errors='replace')


def start(command, log):
    with log.open('wb') as stream:
        return subprocess.Popen(command, env=base_env(), cwd=ROOT, stdout=stream, stderr=stream)


def stop(job):
    """Ends a tuner that a failed test leaves, and its trial."""
    if job.poll() is None:
        job.terminate()
        job.wait(30)


def wait_for(what, seconds, job):
    deadline = time.monotonic() + seconds
    while not what():
        assert job.poll() is None, 'it ended before'
        assert time.monotonic() < deadline, f'not within {seconds} s'
        time.sleep(0.2)


@pytest.mark.ranks
@pytest.mark.slow
def test_failing_trials_are_rows_and_an_interrupted_tuner_goes_on(tmp_path):
    write_digits(tmp_path / 'digits')

    def command(*more):
        factory = ['--opts', 'MODEL.FACTORY', 'tests.tools.tune.fates:model', 'AMP_OPT_LEVEL', 'O0']
        space = ['--space', str(tmp_path / 'space.json')]
        program = [sys.executable, '-m', 'tests.tools.tune.fates']
        return [*program, *words(tmp_path, *space, *more, *factory, launcher=LIMITED)]

    tune, log = tmp_path / 'tune', tmp_path / 'log.txt'

    first = start(command(), log)
    try:
        logs = tune / 'trials'
        wait_for(lambda: 'hanging' in ''.join(map(read, logs.glob('*/log.txt'))), 240, first)
        first.send_signal(signal.SIGINT)
        assert first.wait(30) == 130
    finally:
        stop(first)
    assert 'ended by a signal: what ran is stopped, and not recorded.' in log.read_text()
    assert marked(tune) == []
    before = Records(tune).rows
    assert 'hang' not in {row.status for row in before}
    made = {path: path.stat().st_mtime_ns for path in logs.glob('*/ds_config.json')}

    # By now it is known how long a trial takes here that does not hang.
    limit = max(20, round(5 * before[0].seconds))
    second = run_command(command('--limit', str(limit)), timeout=60 + 5 * limit)
    assert second.returncode == 0, second.output[-4000:]
    rows = Records(tune).rows
    assert rows[: len(before)] == before
    ran = {row.name: row for row in rows if row.started}
    assert len(ran) == sum(row.started for row in rows) == 4
    assert {name: row.status for name, row in ran.items()} == {
        'as configured': 'ok', 'fate=crash': 'crash', 'fate=hang': 'hang',
        'fate=eat': 'out of memory',
    }  # fmt: skip
    assert ran['fate=crash'].error == 'ValueError: a bad batch'
    assert "can't allocate memory" in ran['fate=eat'].error
    assert ran['fate=hang'].error.startswith(f'no end within {limit} s')
    assert {row.name for row in rows if row.status == 'no room'} == {
        'zero1', 'zero2', 'zero3', 'zero2_offload', 'zero3_offload_optimizer', 'zero3_offload',
    }  # fmt: skip
    for row in before:
        if row.started:
            path = logs / f'{row.trial:03d}' / 'ds_config.json'
            assert path.stat().st_mtime_ns == made[path]
    assert marked(tune) == []


@pytest.mark.ranks
@pytest.mark.slow
def test_two_ranks_under_the_deepspeed_launcher(tmp_path):
    write_digits(tmp_path / 'digits')
    command = words(
        tmp_path, '--trials', '1', '--ranks', '2', '--json', '--deepspeed_config', 'zero2',
        launcher=['deepspeed', '--num_gpus', '2'],
    )  # fmt: skip
    job = subprocess.run(
        [sys.executable, '-m', 'internvl_ds.tools.cli', 'tune', *command],
        env=base_env(), cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert job.returncode == 0, job.stderr[-4000:]
    answer = json.loads(job.stdout)
    assert answer['winner'] == 'zero2, as configured'
    assert answer['words'] == ['--deepspeed_config', str(tmp_path / 'tune/ds_config.tuned.json')]
    (row,) = Records(tmp_path / 'tune').rows
    assert (row.bench['ranks'], row.bench['global_batch']) == (2, 32)
    resolved = ds.resolve_or_raise(load_ds_config(answer['words'][1]), default_config(), 2)
    assert resolved['zero_optimization']['stage'] == 2
    port = re.search(r'rank 0 at 127\.0\.0\.1:(\d+)', (tmp_path / LOG_OF_FIRST).read_text())[1]
    assert not list(Path('/dev/shm').glob(f'deepspeed_allreduce_buffer_*_{port}_*'))


def test_a_second_tuner_is_refused_and_sigterm_ends_the_first(tmp_path, capsys):
    waiting = tmp_path / 'wait.sh'
    waiting.write_text('# in place of internvl_ds.train\necho here\nsetsid sleep 300 & sleep 300\n')
    command = words(tmp_path, launcher=['bash', str(waiting)])
    program = [sys.executable, '-m', 'internvl_ds.tools.cli', 'tune']
    job = start([*program, *command], tmp_path / 'log.txt')
    try:
        trial = tmp_path / LOG_OF_FIRST
        assert wait_for_words('here', trial, 60, job)
        assert main(['tune', *command]) == 2
        assert f'process {job.pid} is tuning there' in capsys.readouterr().err
        job.terminate()
        assert job.wait(30) == 143
    finally:
        stop(job)
    assert marked(tmp_path / 'tune') == []
    assert not (tmp_path / 'tune' / 'trials.jsonl').exists()


def test_what_follows_the_dashes_is_the_launcher_to_the_last_word(tmp_path):
    launcher = ['bash', 'launch/train_deepspeed.sh', '-n', '2', '--']
    command = words(tmp_path, '--opts', 'A', '1', launcher=launcher)
    args = build_parser().parse_args(['tune', *command])
    assert args.launcher == launcher
    assert args.opts == ['A', '1']


@pytest.mark.parametrize(
    ('more', 'text'),
    [
        (['--trials', '0'], 'has to be at least 1'),
        (['--budget', 'long'], "'long' is no number"),
        (['--budget', '0'], '0 is not above 0'),
    ],
)
def test_wrong_numbers_are_refused(tmp_path, capsys, more, text):
    with pytest.raises(SystemExit) as ended:
        main(['tune', *words(tmp_path, *more, launcher=['python'])])
    assert ended.value.code == 2
    assert text in capsys.readouterr().err


def test_without_a_launcher_it_says_what_is_missing(tmp_path, capsys):
    assert main(['tune', *words(tmp_path, launcher=[])]) == 2
    assert 'no launcher is given: end the command with its words' in capsys.readouterr().err
    assert not (tmp_path / 'tune').exists()
