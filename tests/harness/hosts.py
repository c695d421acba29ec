"""Hosts on one machine: network namespaces with an address, a name and an sshd each.

    with Hosts(2, tmp_path) as hosts:
        hosts.run(0, ['mpirun', '--hostfile', str(hosts.hostfile_for('Open MPI')), ...], 120, cwd)

The hosts share the file system, except /dev/shm, /etc/hosts and root's .ssh, and reach each other
through a switch in a namespace of its own: nothing outside is changed. It takes root, iproute2 and
OpenSSH's server (and pdsh, for the launcher that uses it).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

from tests.harness.beds import Bed, missing
from tests.harness.ranks import Job, run_command

_NETWORK = '10.99.0'
_SSHD = '/usr/sbin/sshd'
_made = itertools.count()  # of this process; each has a network of its own


def why_not() -> str | None:
    """What is missing to make hosts; None where they can be made."""
    if os.geteuid() != 0:
        return 'not root'
    if reason := missing(('ip', 'nsenter', 'unshare', 'ssh', 'ssh-keygen', _SSHD)):
        return reason
    trial = ['unshare', '--net', '--mount', '--uts', 'ip', 'link', 'add', 'br0', 'type', 'bridge']
    made = subprocess.run(trial, capture_output=True, text=True)
    return None if made.returncode == 0 else f'no network namespaces: {made.stderr.strip()}'


class Hosts(Bed):
    """So many hosts, named host0, host1, ...; each is counted with two ranks in the hostfiles."""

    def __init__(self, count: int, folder: Path) -> None:
        self.count, self.folder = count, folder / 'hosts'
        self._tag = f'ids{os.getpid()}.{next(_made)}'

    def hostfile_for(self, launcher: str) -> Path:
        """The hosts as MPICH reads them, or as Open MPI and deepspeed do."""
        return self.folder / ('machinefile' if launcher == 'MPICH' else 'hostfile')

    def pid(self, host: int) -> int:
        """A process on a host, whose namespaces are the host's."""
        return int((self.folder / f'pid{host}').read_text())

    def command(self, host: int, command: list[str], cwd: Path) -> list[str]:
        """What runs a command on a host."""
        return [
            'nsenter',
            '-t',
            str(self.pid(host)),
            '-n',
            '-u',
            '-m',
            '--',
            'env',
            '-C',
            str(cwd),
            *command,
        ]

    def run(
        self,
        host: int,
        command: list[str],
        timeout: float,
        cwd: Path,
        env: dict[str, str] | None = None,
    ) -> Job:
        """Runs a command on a host, as `run_command` does."""
        return run_command(self.command(host, command, cwd), timeout, env)

    def processes(self, host: int) -> list[int]:
        """The processes on a host, its sshd and that one's sessions left out."""
        found = []
        for pid in _call('ip', 'netns', 'pids', self._name(host)).split():
            with contextlib.suppress(FileNotFoundError):
                if Path(f'/proc/{pid}/comm').read_text().strip() != 'sshd':
                    found.append(int(pid))
        return found

    def plug(self, host: int, plugged: bool) -> None:
        """Takes a host off the switch, or puts it back."""
        _ip(self._name('switch'), 'link', 'set', f'port{host}', 'up' if plugged else 'down')

    def _name(self, what: object) -> str:
        return f'{self._tag}-{what}'

    def _write_files(self) -> None:
        ssh = self.folder / 'ssh'
        ssh.mkdir(parents=True, mode=0o700)
        for key in (ssh / 'id_ed25519', self.folder / 'hostkey'):
            _call('ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f', str(key))
        (ssh / 'authorized_keys').write_bytes((ssh / 'id_ed25519.pub').read_bytes())
        (ssh / 'config').write_text(
            'Host *\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n'
        )
        (self.folder / 'sshd_config').write_text(
            f'HostKey {self.folder}/hostkey\n'
            f'AuthorizedKeysFile {ssh}/authorized_keys\n'
            'PasswordAuthentication no\nUsePAM no\nStrictModes no\nPidFile none\n'
            'PermitRootLogin prohibit-password\nMaxStartups 100\n'
        )
        names = [f'host{host}' for host in range(self.count)]
        lines = ['127.0.0.1 localhost', *(f'{_NETWORK}.{h + 1} {n}' for h, n in enumerate(names))]
        (self.folder / 'hosts').write_text('\n'.join(lines) + '\n')
        # Names are those of the file: a name server that does not answer keeps ssh for minutes.
        (self.folder / 'nsswitch').write_text('hosts: files\npasswd: files\ngroup: files\n')
        self.hostfile_for('Open MPI').write_text(''.join(f'{name} slots=2\n' for name in names))
        self.hostfile_for('MPICH').write_text(''.join(f'{name}:2\n' for name in names))

    def up(self) -> None:
        """Makes the hosts, and waits for their sshd."""
        self._write_files()
        Path('/run/sshd').mkdir(exist_ok=True)
        home = Path('~root/.ssh').expanduser()
        home.mkdir(exist_ok=True, mode=0o700)
        switch = self._name('switch')
        _call('ip', 'netns', 'add', switch)
        _ip(switch, 'link', 'add', 'bridge', 'type', 'bridge')
        _ip(switch, 'link', 'set', 'bridge', 'up')
        for host in range(self.count):
            name = self._name(host)
            _call('ip', 'netns', 'add', name)
            _ip(switch, 'link', 'add', f'port{host}', 'type', 'veth', 'peer', 'name', 'eth0',
                'netns', name)  # fmt: skip
            _ip(switch, 'link', 'set', f'port{host}', 'master', 'bridge', 'up')
            _ip(name, 'addr', 'add', f'{_NETWORK}.{host + 1}/24', 'dev', 'eth0')
            _ip(name, 'link', 'set', 'eth0', 'up')
            _ip(name, 'link', 'set', 'lo', 'up')
            script = f"""
                hostname host{host}
                mount -t tmpfs -o size=4g tmpfs /dev/shm
                mount --bind {shlex.quote(str(self.folder / 'hosts'))} /etc/hosts
                mount --bind {shlex.quote(str(self.folder / 'nsswitch'))} /etc/nsswitch.conf
                mount --bind {shlex.quote(str(self.folder / 'ssh'))} {home}
                echo $$ > {shlex.quote(str(self.folder / f'pid{host}'))}
                exec {_SSHD} -D -e -f {shlex.quote(str(self.folder / 'sshd_config'))}"""
            command = ['ip', 'netns', 'exec', name, 'unshare', '--uts', '--mount']
            command += ['--propagation', 'private', 'bash', '-ec', script]
            with (self.folder / f'sshd{host}.log').open('wb') as log:
                subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    start_new_session=True,
                )  # fmt: skip
        for host in range(self.count):
            self._wait_for_sshd(host)

    def _wait_for_sshd(self, host: int) -> None:
        log = self.folder / f'sshd{host}.log'
        deadline = time.monotonic() + 15
        while 'Server listening' not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)

    def down(self) -> None:
        """Ends every process on the hosts, and removes them."""
        for what in (*range(self.count), 'switch'):
            name = self._name(what)
            deadline = time.monotonic() + 15
            while pids := _call('ip', 'netns', 'pids', name, check=False).split():
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                assert time.monotonic() < deadline, f'{name}: {pids} cannot be ended'
                time.sleep(0.05)
            _call('ip', 'netns', 'del', name, check=False)


def _ip(namespace: str, *words: str) -> None:
    _call('ip', '-n', namespace, *words)


def _call(*command: str, check: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert not check or done.returncode == 0, f'{shlex.join(command)}: {done.stderr}'
    return done.stdout
