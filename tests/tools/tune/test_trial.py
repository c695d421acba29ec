"""A trial: how its end is told, and that nothing of it is left."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from internvl_ds.tools.tune.records import CRASH, HANG, MEMORY, OK
from internvl_ds.tools.tune.trial import MARK, classify, end, error_line, run_trial

HOST_LINE = 'rank 1 on host ends the job: ValueError: a bad batch'


@pytest.mark.parametrize(
    ('code', 'log', 'measured', 'status'),
    [
        (0, '', True, OK),
        (0, '', False, CRASH),  # some launchers return 0 for a job that failed
        (1, '', True, CRASH),
        (None, 'torch.OutOfMemoryError', False, HANG),
        (1, HOST_LINE, False, CRASH),
        (1, 'Killing subprocess 7\nKilling subprocess 8', False, CRASH),
        (1, 'torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20 MiB', False, MEMORY),
        (1, "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory", False,
         MEMORY),
        (1, 'numpy._core._exceptions._ArrayMemoryError: Unable to allocate 8 GiB', False, MEMORY),
        (1, 'OSError: [Errno 12] Cannot allocate memory', False, MEMORY),
        (1, 'RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `c`', False, MEMORY),
        (1, 'RuntimeError: cuDNN error: CUDNN_STATUS_ALLOC_FAILED', False, MEMORY),
        (1, 'CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY', False, MEMORY),
        (1, "ncclUnhandledCudaError: Failed to CUDA calloc 4194304 bytes", False, MEMORY),
        (1, 'RuntimeError: CUDA error: CUBLAS_STATUS_EXECUTION_FAILED', False, CRASH),
        (1, "terminate called after throwing an instance of 'std::bad_alloc'", False, MEMORY),
        (-9, '', False, MEMORY),
        (137, '', False, MEMORY),
        (247, '', False, MEMORY),  # what the deepspeed launcher returns
        (1, 'Process 71 exits with return code = -9', False, MEMORY),
        (1, '  exitcode  : -9 (pid: 71)', False, MEMORY),
        (1, 'process rank 1 with PID 7 on node h exited on signal 9 (Killed).', False, MEMORY),
        (1, 'Signal 9 (SIGKILL) received by PID 71', False, MEMORY),
        (1, 'x.sh: line 3:    71 Killed                  python', False, MEMORY),
        (1, 'Unable to shutdown process 71 via SIGTERM, forcefully exiting via SIGKILL', False,
         CRASH),
        (-15, '', False, CRASH),
    ],
)  # fmt: skip
def test_how_a_trial_ended(code, log, measured, status):
    assert classify(code, log, measured) == status


@pytest.mark.parametrize(
    ('log', 'line'),
    [
        ('', 'nothing was written'),
        ('one\ntwo\n\n', 'two'),
        (f'Traceback\n{HOST_LINE}\nrank 0 on host ends the job: lost\nend',
         'ValueError: a bad batch'),
        ('a\nRuntimeError: first\nException ignored in\nsome.Error: later\nKilling 7',
         'some.Error: later'),
        ('RuntimeError: CUDA out of memory\nSystemError: after',
         'RuntimeError: CUDA out of memory'),
        ('error: DATA.X: unknown key\nlast', 'error: DATA.X: unknown key'),
    ],
)  # fmt: skip
def test_the_line_that_says_why(log, line):
    assert error_line(log) == line


def test_a_trial_that_ends_well_gives_what_it_measured(tmp_path):
    bench = tmp_path / 'out' / 'name' / 'bench.json'
    text = json.dumps({'images_per_s': 3.0})
    command = ['sh', '-c', f"mkdir -p {bench.parent}; echo '{text}' > {bench}; echo done"]
    outcome = run_trial(command, tmp_path, 20)
    assert (outcome.status, outcome.bench, outcome.error) == (OK, {'images_per_s': 3.0}, '')
    assert (tmp_path / 'log.txt').read_text() == 'done\n'


def test_a_launcher_that_returns_0_without_a_measurement_is_not_believed(tmp_path):
    outcome = run_trial(['echo', 'bye'], tmp_path, 20)
    assert outcome.status == CRASH
    assert outcome.error == (
        f'it returned 0, but there is no bench.json below {tmp_path}; last line: bye'
    )


def test_a_hanging_trial_is_ended_with_what_left_its_group(tmp_path):
    port = 65535
    buffer = Path(f'/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_{port}_0')
    buffer.write_text('')
    # One process that SIGTERM does not end, and one in a session of its own.
    stubborn = f'{sys.executable} -c "import signal, time; signal.signal(15, 1); time.sleep(99)"'
    script = f'setsid sleep 99 & {stubborn} & echo waiting; wait'
    outcome = run_trial(['sh', '-c', script], tmp_path, 1.5, port)
    assert outcome.status == HANG
    assert outcome.error == 'no end within 2 s; last line: waiting'
    assert marked(tmp_path) == []
    assert not buffer.exists()


def test_what_a_killed_tuner_left_is_ended_and_nothing_else(tmp_path):
    def start(folder):
        return subprocess.Popen(['sleep', '99'], env={**os.environ, MARK: str(folder)})

    mine, other = start(tmp_path / 'a' / 'trials' / '003'), start(tmp_path / 'b' / 'trials' / '003')
    try:
        end(None, tmp_path / 'a' / 'trials')
        assert mine.wait(5) == -signal.SIGTERM
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_an_interruption_ends_the_trial_too(tmp_path):
    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_trial(['sh', '-c', 'setsid sleep 99 & sleep 99'], tmp_path, 60)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert marked(tmp_path) == []


def marked(folder):
    """The processes that have this folder in their environments."""
    found = []
    for entry in Path('/proc').glob('[0-9]*'):
        try:
            if f'{MARK}={folder}'.encode() in (entry / 'environ').read_bytes():
                found.append(entry.name)
        except OSError:
            continue
    return found
