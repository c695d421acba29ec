"""The train_*.sh scripts: the commands that they make, and real jobs that end well and badly."""

import itertools
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from internvl_ds.checkpoint.tag.discovery import read_header
from internvl_ds.dist.network import free_port
from tests.harness.ranks import (
    ROOT,
    base_env,
    processes_with,
    remove_shm_buffers,
    run_command,
    wait_for_words,
)
from tests.harness.training import small_config, write_folder

MPI = pytest.mark.skipif(not shutil.which('mpirun'), reason='the mpi extra is not installed')


def script(name, *arguments, timeout=60, **env):
    return run_command(['bash', str(ROOT / 'launch' / name), *arguments], timeout, env=env)


def dry(name, *arguments, **env):
    job = script(name, *arguments, '--dry-run', '--', '--cfg', 'digits', **env)
    assert job.returncode == 0, job.output
    return job.output.split()


@pytest.mark.parametrize('name', ['train_mpi.sh', 'train_deepspeed.sh'])
def test_help_is_the_comment_at_the_top(name):
    job = script(name, '--help')
    assert job.returncode == 0
    assert '--dry-run        print the command, and run nothing' in job.output
    assert '#' not in job.output


@pytest.mark.parametrize(
    ('name', 'arguments', 'words'),
    [
        ('train_mpi.sh', ['--'], '-n N is needed'),
        ('train_mpi.sh', ['-n', 'two', '--'], '-n N is needed'),
        ('train_mpi.sh', ['-n', '2', '--ppn', 'x', '--'], '--ppn x is no number'),
        (
            'train_mpi.sh',
            ['-n', '2', '--hostfile', '/none', '--'],
            '--hostfile /none cannot be read',
        ),
        ('train_mpi.sh', ['-n', '2', '--cfg', 'x'], 'unknown option --cfg'),
        ('train_deepspeed.sh', ['-n', 'x', '--'], '-n x is no number'),
        ('train_deepspeed.sh', ['--port', 'x', '--'], '--port x is no number'),
        ('train_deepspeed.sh', ['--hostfile', '/none', '--'], '/none cannot be read'),
    ],
)
def test_wrong_usage_is_named(name, arguments, words):
    job = script(name, *arguments)
    assert job.returncode == 2
    assert f'{name}: error: ' in job.output
    assert words in job.output


@MPI
def test_the_dialect_of_open_mpi(tmp_path):
    words = dry('train_mpi.sh', '-n', '4')
    assert words[:5] == ['mpirun', '-np', '4', '--bind-to', 'none']
    assert '--allow-run-as-root' not in words
    assert words[-5:] == ['python', '-m', 'internvl_ds.train', '--cfg', 'digits']
    hosts = tmp_path / 'hosts'
    hosts.write_text('a slots=2\n')
    words = dry('train_mpi.sh', '-n', '4', '--hostfile', str(hosts), '--ppn', '2', '--allow-root')
    assert words[5:10] == [
        '--allow-run-as-root',
        '--hostfile',
        str(hosts),
        '--map-by',
        'ppr:2:node',
    ]
    assert words[(at := words.index('OMP_NUM_THREADS')) - 1 : at + 1] == ['-x', 'OMP_NUM_THREADS']


@pytest.mark.parametrize(
    'version', ['HYDRA build details:', 'Intel(R) MPI Library for Linux* OS, Version 2021.13']
)
def test_the_dialect_of_mpich_and_intel(tmp_path, version):
    fake = tmp_path / 'mpirun'
    fake.write_text(f'#!/bin/sh\necho "{version}"\n')
    fake.chmod(0o755)
    hosts = tmp_path / 'hosts'
    hosts.write_text('a:2\n')
    env = base_env()
    env['PATH'] = f'{tmp_path}:{env["PATH"]}'
    command = ['bash', str(ROOT / 'launch' / 'train_mpi.sh'), '-n', '4', '--ppn', '2']
    command += ['--hostfile', str(hosts), '--dry-run', '--', '--cfg', 'x']
    words = subprocess.run(command, env=env, capture_output=True, text=True).stdout.split()
    assert words[:7] == ['mpirun', '-n', '4', '-f', str(hosts), '-ppn', '2']
    assert words[7] == '-genvlist'
    assert 'PATH' in words[8].replace('\\', '').split(',')


@MPI
def test_variables_are_forwarded_by_prefix_and_secrets_are_not():
    env = {
        'NCCL_ALGO': 'Ring', 'TORCH_NCCL_BLOCKING_WAIT': '1', 'GLOO_SOCKET_IFNAME': 'lo',
        'CUDA_DEVICE_ORDER': 'PCI_BUS_ID', 'TRITON_CACHE_DIR': '/t', 'HF_HOME': '/h',
        'HF_TOKEN': 'secret', 'INTERNVL_DS_VENV': '/v', 'EDITOR': 'vi', 'NCCL_EMPTY': '',
    }  # fmt: skip
    words = dry('train_mpi.sh', '-n', '2', **env)
    names = {name for option, name in itertools.pairwise(words) if option == '-x'}
    left = {'HF_TOKEN', 'INTERNVL_DS_VENV', 'EDITOR', 'NCCL_EMPTY'}
    assert not names & left, names
    assert names >= env.keys() - left


@pytest.mark.parametrize('given', ['', '7'])
def test_sbatch_without_cpus_per_task_says_what_a_rank_gets(tmp_path, given):
    (tmp_path / 'srun').write_text('#!/bin/bash\necho "cores $SRUN_CPUS_PER_TASK"\n')
    (tmp_path / 'srun').chmod(0o755)
    more = {'SLURM_CPUS_PER_TASK': given} if given else {}
    env = base_env(SLURM_JOB_ID='1', INTERNVL_DS_RESULT=str(tmp_path / 'result'), **more)
    env['PATH'] = f'{tmp_path}:{env["PATH"]}'
    job = subprocess.run(
        ['bash', str(ROOT / 'launch' / 'train_slurm.sbatch')], env=env, capture_output=True,
        text=True, timeout=60, cwd=tmp_path,
    )  # fmt: skip
    assert f'cores {given}\n' in job.stdout
    assert ('each rank may get a single core' in job.stdout + job.stderr) == (not given)


def test_a_pod_has_shared_memory_for_loaders_and_nccl():
    (job,) = yaml.safe_load_all((ROOT / 'launch' / 'mpijob.yaml').read_text())
    pod = job['spec']['mpiReplicaSpecs']['Worker']['template']['spec']
    volumes = {volume['name']: volume for volume in pod['volumes']}
    paths = {mount['mountPath']: mount for mount in pod['containers'][0]['volumeMounts']}
    memory = volumes[paths['/dev/shm']['name']]['emptyDir']
    assert memory['medium'] == 'Memory'
    assert memory['sizeLimit'].endswith('Gi')


def test_values_reach_the_other_hosts_as_they_are(tmp_path):
    value = "{0},{1}; echo $HOME 'x'"
    stub = tmp_path / 'deepspeed'  # as pdsh's runner, which writes: export NAME=VALUE;
    stub.write_text(
        "#!/bin/bash\ncommand=$(sed 's/^/export /; s/$/;/' .deepspeed_env)\n"
        'env -i bash -c "$command printf %s \\"\\$OMP_PLACES\\""\n'
    )
    stub.chmod(0o755)
    (tmp_path / 'hosts').write_text('a slots=2\n')
    command = ['bash', str(ROOT / 'launch' / 'train_deepspeed.sh'), '--hostfile', 'hosts', '--']
    env = base_env(OMP_PLACES=value)
    env['PATH'] = f'{tmp_path}:{env["PATH"]}'
    job = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert job.stdout == value, job.stderr
    assert not (tmp_path / '.deepspeed_env').exists()


def test_the_deepspeed_launcher_gets_a_free_port(tmp_path):
    words = dry('train_deepspeed.sh', '-n', '2')
    assert words[:3] == ['deepspeed', '--num_gpus', '2']
    assert 1024 < int(words[words.index('--master_port') + 1]) < 65536
    hosts = tmp_path / 'hosts'
    hosts.write_text('a slots=2\n')
    words = dry('train_deepspeed.sh', '--hostfile', str(hosts), '--port', '4242')
    assert words[:6] == [
        'deepspeed',
        '--hostfile',
        str(hosts),
        '--force_multi',
        '--master_port',
        '4242',
    ]


@pytest.fixture(scope='module')
def cfg(tmp_path_factory):
    folder = tmp_path_factory.mktemp('job')
    data = write_folder(folder / 'images', classes=3, train=12, val=6)
    path = folder / 'small.yaml'
    values = {'TRAIN__EPOCHS': 1, 'TRAIN__WARMUP_EPOCHS': 0, 'DATA__BATCH_SIZE': 2}
    path.write_text(small_config(data, **values).dump())
    return path


STARTS = [
    pytest.param('train_mpi.sh', ['-n', '2', '--allow-root'], marks=MPI),
    ('train_deepspeed.sh', ['-n', '2']),
]


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize(('name', 'options'), STARTS)
def test_a_job_that_fails(tmp_path, cfg, name, options):
    port = str(free_port())
    if name == 'train_deepspeed.sh':
        options = [*options, '--port', port]
    program = ['--', '--cfg', str(cfg), '--output', str(tmp_path / 'out')]
    try:
        job = script(name, *options, *program, '--opts', 'DATA.DATA_PATH', '/none', timeout=240)
    finally:
        remove_shm_buffers(port)
    assert job.returncode != 0
    assert '/none' in job.output
    assert not [p for p in ROOT.iterdir() if p.name.startswith('.internvl_ds-result')]


@pytest.mark.ranks
@pytest.mark.slow
def test_a_launcher_that_returns_0_for_a_failed_job_is_not_believed(tmp_path):
    fake = tmp_path / 'deepspeed'
    fake.write_text('#!/bin/sh\nexit 0\n')
    fake.chmod(0o755)
    env = base_env()
    env['PATH'] = f'{tmp_path}:{env["PATH"]}'
    command = ['bash', str(ROOT / 'launch' / 'train_deepspeed.sh'), '--', '--cfg', 'x']
    job = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert job.returncode == 1
    assert 'returned 0, but rank 0 did not reach the end of the program' in job.stderr


class Running:
    """A script's job that trains for ever, under a name by which its processes are found."""

    def __init__(self, folder, name, options, cfg, factory='', **env):
        self.port = str(free_port())
        self.mark = f'marks-{os.getpid()}-{time.monotonic_ns()}'
        self.output = folder / self.mark
        if name == 'train_deepspeed.sh':
            options = [*options, '--port', self.port]
        command = ['bash', str(ROOT / 'launch' / name), *options, '--', '--cfg', str(cfg)]
        command += ['--output', str(self.output), '--opts', 'TRAIN.EPOCHS', '10000']
        command += ['TRAIN.PREEMPT_EXIT_CODE', '75', 'DATA.NUM_WORKERS', '1']
        self.data = write_folder(folder / f'images-{self.mark}', classes=3, train=12, val=6)
        command += ['DATA.DATA_PATH', str(self.data), 'MODEL.FACTORY', factory]
        self.log = folder / f'log-{self.mark}'
        with self.log.open('wb') as log:
            self.process = subprocess.Popen(
                command, env=base_env(**env), cwd=folder, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def wait_for(self, words, seconds=120):
        seen = wait_for_words(words, self.log, seconds, self.process)
        assert seen, self.log.read_text()[-3000:]

    def processes(self):
        return processes_with(self.mark)

    def ranks(self):
        """The ranks' processes, without launchers, scripts and the workers of their loaders."""

        def is_of_a_rank(pid):
            return b'\0RANK=' in Path(f'/proc/{pid}/environ').read_bytes()

        def parent(pid):
            return int(Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[1])

        return [p for p in self.processes() if is_of_a_rank(p) and not is_of_a_rank(parent(p))]

    def end(self):
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        self.process.wait(timeout=30)
        remove_shm_buffers(self.port)


@pytest.fixture
def start(tmp_path, cfg):
    jobs = []

    def begin(name, options, **more):
        jobs.append(Running(tmp_path, name, options, cfg, **more))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.end()


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'options'),
    # The other script is stopped below and in test_interrupts.py, without a second run.
    [STARTS[0], pytest.param(*STARTS[1], marks=pytest.mark.soak_only)],
)
def test_a_script_that_is_stopped_saves_and_goes_on(start, cfg, name, options):
    job = start(name, options)
    job.wait_for('epoch 1:')
    job.process.send_signal(signal.SIGTERM)
    assert job.process.wait(timeout=90) == 75
    assert job.processes() == []
    text = job.log.read_text()
    assert 'the launch script was asked to stop' in text
    assert 'saved and stopped, as asked' in text
    output = job.output / 'small'
    tag = (output / 'latest').read_text()
    assert '_step_' in tag
    saved = read_header(output / tag)
    again = script(
        name, *options, '--', '--cfg', str(cfg), '--output', str(job.output),
        '--opts', 'TRAIN.EPOCHS', str(saved.epoch + 1), timeout=240,
    )  # fmt: skip
    assert again.returncode == 0, again.output
    assert f'resuming from {output / tag}' in again.output
    # 12 images, 2 ranks, batches of 2
    assert f'epoch {saved.epoch} goes on after micro-batch {saved.step} of 3' in again.output


@pytest.mark.ranks
@pytest.mark.slow
def test_a_second_signal_ends_the_job_at_once(start):
    job = start('train_deepspeed.sh', ['-n', '2'], factory='tests.harness.faulty:model')
    job.wait_for('epoch 1:')
    (job.data / 'hang').touch()  # so that no boundary comes any more
    for rank in range(2):
        assert wait_for_words('', job.data / f'hangs_{rank}', 60, job.process)
    job.process.send_signal(signal.SIGTERM)
    job.wait_for('a second signal ends it at once')
    job.process.send_signal(signal.SIGTERM)
    assert job.process.wait(timeout=90) not in (0, 75)
    assert job.processes() == []


@pytest.mark.ranks
@pytest.mark.slow
# They have one handler: tests/dist/test_signals.py.
@pytest.mark.parametrize(
    'number', [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.soak_only)]
)
def test_a_signal_to_one_rank_stops_all_with_a_tag(start, number):
    job = start('train_deepspeed.sh', ['-n', '2'])
    job.wait_for('epoch 1:')
    os.kill(max(job.ranks()), number)
    assert job.process.wait(timeout=90) == 75
    assert job.processes() == []
    assert f'({number.name})' in job.log.read_text()
    assert '_step_' in (job.output / 'small' / 'latest').read_text()


def listens(port):
    """Whether a socket of this host listens on a TCP port."""
    rows = [row.split() for row in Path('/proc/net/tcp').read_text().splitlines()[1:]]
    rows += [row.split() for row in Path('/proc/net/tcp6').read_text().splitlines()[1:]]
    return any(int(row[1].rpartition(':')[2], 16) == port and row[3] == '0A' for row in rows)


@MPI
@pytest.mark.ranks
@pytest.mark.slow
def test_two_jobs_on_one_host_do_not_meet_and_a_given_port_is_used(start):
    port = free_port()
    options = ['-n', '2', '--allow-root']
    given = start('train_mpi.sh', options, MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    agreed = start('train_mpi.sh', options)
    given.wait_for('epoch 1:')
    agreed.wait_for('epoch 1:')
    assert listens(port)
    assert f'started by Open MPI: 2 ranks, 2 on its host, rank 0 at 127.0.0.1:{port}' in (
        given.log.read_text()
    )
    assert f':{port}' not in agreed.log.read_text()
    # mpirun hands SIGUSR1 on to the ranks.
    children = subprocess.run(['pgrep', '-P', str(given.process.pid)], capture_output=True)
    (mpirun,) = children.stdout.split()
    os.kill(int(mpirun), signal.SIGUSR1)
    assert given.process.wait(timeout=90) == 75
    assert '(SIGUSR1)' in given.log.read_text()
    agreed.process.send_signal(signal.SIGUSR1)
    assert agreed.process.wait(timeout=90) == 75
    assert given.processes() == agreed.processes() == []
