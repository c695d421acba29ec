"""A Slurm cluster of one host on the loopback interface, without systemd, cgroups or accounting.

    with Slurm(tmp_path) as slurm:
        slurm.call('sbatch', '--ntasks', '2', ...)

It takes root and Debian's slurm-wlm and munge (written for 22.05 and later).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from internvl_ds.dist.network import free_port
from tests.harness.beds import Bed, missing
from tests.harness.ranks import base_env

_DAEMONS = ('munged', 'slurmctld', 'slurmd')
_SBIN = '/usr/sbin'


def why_not() -> str | None:
    """What is missing to start one; None where it can be started."""
    if os.geteuid() != 0:
        return 'not root'
    path = os.pathsep.join([os.environ.get('PATH', ''), _SBIN])
    return missing((*_DAEMONS, 'sbatch'), path)


class Slurm(Bed):
    """The cluster: one node of 8 CPUs, whatever the machine has; its name is localhost.

    Attributes:
        env: with which Slurm's commands find it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / 'slurm'
        self.config = self.folder / 'slurm.conf'
        # munged wants every folder above its socket to be open to all, and the path to be short.
        self._run = Path(tempfile.mkdtemp(prefix='slurm-', dir='/tmp'))
        self._run.chmod(0o755)
        self.env = base_env(SLURM_CONF=str(self.config))
        self.env['PATH'] += os.pathsep + _SBIN

    def up(self) -> None:
        """Starts the daemons, and waits until the node takes jobs."""
        self._write_files()
        key, run = self.folder / 'key', self._run
        self._start(
            'munged', f'--key-file={key}', f'--socket={run}/socket', '--num-threads=2',
            f'--pid-file={run}/munged.pid', f'--log-file={self.folder}/munged.log',
            f'--seed-file={run}/seed', '--origin=127.0.0.1',
        )  # fmt: skip
        self._start('slurmctld', '-f', str(self.config), '-c')
        self._start('slurmd', '-f', str(self.config))
        self._wait_until_idle()

    def call(self, *command: str, cwd: Path | None = None, **env: str) -> str:
        """Runs one of Slurm's commands, and returns what it prints."""
        done = subprocess.run(
            command, env={**self.env, **env}, cwd=cwd, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f'{command}: {done.stdout}{done.stderr}'
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What the controller knows of a job: JobState, ExitCode, Restarts, ..."""
        text = self.call('scontrol', '--oneliner', 'show', 'job', number)
        return dict(word.split('=', 1) for word in text.split() if '=' in word)

    def wait_for(self, number: str, states: set[str], seconds: float) -> dict[str, str]:
        """Waits until a job is in one of these states."""
        deadline = time.monotonic() + seconds
        while (job := self.job(number))['JobState'] not in states:
            assert time.monotonic() < deadline, job
            time.sleep(0.5)
        return job

    def _write_files(self) -> None:
        run = self._run
        for name in ('state', 'spool'):
            (self.folder / name).mkdir(parents=True)
        key = self.folder / 'key'
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        (self.folder / 'plugstack.conf').touch()
        version = subprocess.run(
            ['slurmd', '-V'], env=self.env, capture_output=True, text=True
        ).stdout
        number = tuple(int(part) for part in version.split()[1].split('.')[:2])
        # 'disabled' is of 23.11; before, this one is loaded and makes no group.
        plugin = 'disabled' if number >= (23, 11) else 'cgroup/v1'
        (self.folder / 'cgroup.conf').write_text(f'CgroupPlugin={plugin}\n')
        host = socket.gethostname()
        settings = {
            'ClusterName': 'test',
            'SlurmctldHost': f'{host}(127.0.0.1)',
            'SlurmctldPort': free_port(),
            'SlurmdPort': free_port(),
            'CommunicationParameters': 'NoCtldInAddrAny,NoInAddrAny',  # loopback only
            'SlurmUser': 'root',
            'SlurmdUser': 'root',
            'AuthType': 'auth/munge',
            # A requeued job is held until its credential has expired.
            'AuthInfo': f'socket={run}/socket,cred_expire=5',
            'StateSaveLocation': self.folder / 'state',
            'SlurmdSpoolDir': self.folder / 'spool',
            'SlurmctldPidFile': run / 'slurmctld.pid',
            'SlurmdPidFile': run / 'slurmd.pid',
            'SlurmctldLogFile': self.folder / 'slurmctld.log',
            'SlurmdLogFile': self.folder / 'slurmd.log',
            'PlugStackConfig': self.folder / 'plugstack.conf',
            'ProctrackType': 'proctrack/linuxproc',
            'TaskPlugin': 'task/none',
            'SelectType': 'select/cons_tres',
            'SelectTypeParameters': 'CR_CPU',
            'SwitchType': 'switch/none',
            'MpiDefault': 'none',
            'JobAcctGatherType': 'jobacct_gather/none',
            'AccountingStorageType': 'accounting_storage/none',
            'SchedulerParameters': 'bf_interval=1,sched_interval=2,batch_sched_delay=0',
            'SlurmdParameters': 'config_overrides',
            'ReturnToService': 2,
            'KillWait': 30,
            'MailProg': '/bin/true',
            'NodeName': f'localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=4000',
            'PartitionName': 'all Nodes=localhost Default=YES MaxTime=INFINITE State=UP',
        }
        self.config.write_text(''.join(f'{key}={value}\n' for key, value in settings.items()))

    def _start(self, *command: str) -> None:
        with (self.folder / f'{command[0]}.out').open('wb') as log:
            done = subprocess.run(
                command, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                cwd=self.folder, timeout=30, start_new_session=True,
            )  # fmt: skip
        assert done.returncode == 0, f'{command}: {Path(log.name).read_text()}'

    def _wait_until_idle(self) -> None:
        deadline = time.monotonic() + 30
        while self.call('sinfo', '--noheader', '--format=%T') != 'idle':
            assert time.monotonic() < deadline, (self.folder / 'slurmctld.log').read_text()[-3000:]
            time.sleep(0.2)

    def down(self) -> None:
        """Ends the daemons, and all that they have started."""
        # The daemons first, so that nothing is started any more.
        for name in ('slurmctld', 'slurmd', 'munged'):
            file = self._run / f'{name}.pid'
            if file.exists():
                _end(int(file.read_text()))
        for directory in Path('/proc').glob('[0-9]*'):
            with contextlib.suppress(OSError):
                # Steps and what they started have it; this process and its shells do not.
                if f'SLURM_CONF={self.config}\0'.encode() in (directory / 'environ').read_bytes():
                    _end(int(directory.name))
        shutil.rmtree(self._run)


def _end(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            os.kill(pid, 0)
            time.sleep(0.05)
        os.kill(pid, signal.SIGKILL)
