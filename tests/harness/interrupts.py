"""Jobs of the training program that are interrupted as a user does it, and what they leave."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from tests.harness.ranks import base_env, processes_with, remove_shm_buffers, wait_for_words
from tests.harness.training import small_config, write_folder

STOPPED = 75  # TRAIN.PREEMPT_EXIT_CODE of these jobs


@dataclass(frozen=True)
class End:
    """How a job ended.

    Attributes:
        status: of what was started; None where it had to be ended.
        output: all that it printed.
        logged: the log file of rank 0.
        latest: the tag that the run would go on from; '' for none.
        seconds: until no process of the job was left.
        left: processes that were left at the limit.
    """

    status: int | None
    output: str
    logged: str
    latest: str
    seconds: float
    left: list[int]


class Interrupted:
    """One job, in a session of its own: the foreground job of a terminal, which it may have."""

    def __init__(
        self,
        folder: Path,
        command: list[str],
        port: str = '',
        terminal: bool = False,
        opts: tuple[str, ...] = (),
        **env: str,
    ) -> None:
        """Starts it.

        Args:
            folder: for all that it reads and writes; its name tells its processes from others.
            command: what the training program's arguments follow.
            port: whose shared memory is to be removed.
            terminal: whether it has one for its input and output, that can be closed.
            opts: further words of --opts.
            env: further variables.
        """
        self.data = write_folder(folder / 'images', classes=3, train=12, val=6)
        self._port, self._name, self._closing = port, str(folder), threading.Event()
        self._output = folder / 'out' / 'small'
        cfg = folder / 'small.yaml'
        cfg.write_text(
            small_config(
                self.data, TRAIN__EPOCHS=100000, TRAIN__WARMUP_EPOCHS=0, DATA__BATCH_SIZE=2,
                DATA__NUM_WORKERS=1, TRAIN__PREEMPT_EXIT_CODE=STOPPED, SAVE_FREQ=100000,
                EVAL_FREQ=100000, MODEL__FACTORY='tests.harness.faulty:model',
            ).dump()
        )  # fmt: skip
        self.log = folder / 'log'
        command = [*command, '--cfg', str(cfg), '--output', str(folder / 'out'), '--opts']
        command += ['DATA.NUM_WORKERS', '1', *opts]
        variables = base_env(INTERNVL_DS_RESULT=str(folder / 'result'), **env)
        self.terminal, inner = pty.openpty() if terminal else (-1, -1)
        with self.log.open('wb') as log:
            self.process = subprocess.Popen(
                ['setsid', '--ctty', *command] if terminal else command,
                env=variables, cwd=folder,
                stdin=inner if terminal else subprocess.DEVNULL,
                stdout=inner if terminal else log,
                stderr=inner if terminal else subprocess.STDOUT,
                start_new_session=not terminal,
            )  # fmt: skip
        if terminal:
            os.close(inner)
            self._reader = threading.Thread(target=self._read_terminal, daemon=True)
            self._reader.start()

    def wait_until_it_trains(self) -> None:
        """Waits for the third epoch."""
        seen = wait_for_words('Train: [2/', self._output / 'log_rank0.txt', 240, self.process)
        if not seen:
            self.end(limit=0)
        assert seen, self.log.read_text()[-3000:]

    def hang(self, ranks: int = 1) -> None:
        """Makes all ranks compute for ever, and waits until they do."""
        (self.data / 'hang').touch()
        for rank in range(ranks):
            came = wait_for_words('', self.data / f'hangs_{rank}', 60, self.process)
            if not came:
                self.end(limit=0)
            assert came, self.log.read_text()[-3000:]

    def press_ctrl_c(self) -> None:
        """Signals its whole process group, as a terminal does."""
        if self.terminal >= 0:
            os.write(self.terminal, b'\x03')
        else:
            os.killpg(self.process.pid, signal.SIGINT)

    def close_terminal(self) -> None:
        """Hangs up."""
        self._closing.set()
        self._reader.join()
        os.close(self.terminal)

    def end(self, limit: float = 60) -> End:
        """Waits for the end of all of its processes."""
        start, status = time.monotonic(), None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = self.process.wait(limit)
            while (left := processes_with(self._name)) and time.monotonic() < start + limit:
                time.sleep(0.1)
            seconds = time.monotonic() - start
        finally:
            for pid in processes_with(self._name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait(30)
            remove_shm_buffers(self._port)
        output, logged, latest = (
            path.read_text(errors='replace') if path.exists() else ''
            for path in (self.log, self._output / 'log_rank0.txt', self._output / 'latest')
        )
        return End(status, output, logged, latest, seconds, left)

    def _read_terminal(self) -> None:
        with self.log.open('ab', buffering=0) as log:
            while not self._closing.is_set():
                if select.select([self.terminal], [], [], 0.1)[0]:
                    try:
                        log.write(os.read(self.terminal, 65536))
                    except OSError:  # nobody has it open any more
                        return
