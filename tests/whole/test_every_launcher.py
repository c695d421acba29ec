"""The same training program, started by every launcher, on one host and on two: the same run."""

import functools
import json
import shutil

import pytest
import yaml

from internvl_ds.checkpoint.formats.zero_shards import TagShards
from internvl_ds.config.tree import find_config_file
from internvl_ds.dist.network import free_port
from internvl_ds.tools.cli.digits import write_digits
from tests.harness import hosts, mpich, training
from tests.harness.ranks import remove_shm_buffers, run_command, run_ranks
from tests.harness.starts import start_command

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

MPI = pytest.mark.skipif(not shutil.which('mpirun'), reason='the mpi extra is not installed')

# Two ranks under these are started by test_interrupts.py and test_launch_jobs.py too, and four on
# two hosts, below.
ELSEWHERE = pytest.mark.soak_only


@pytest.fixture(scope='module')
def cfgs(tmp_path_factory):
    """Number of ranks -> YAML file: an epoch of 5 updates of 64 digits each."""
    folder = tmp_path_factory.mktemp('cfg')
    digits = write_digits(folder / 'digits').root
    for split, left in (('train', 33), ('val', 9)):  # of each class
        for images in (digits / split).iterdir():
            for image in sorted(images.iterdir())[left:]:
                image.unlink()
    tree = yaml.safe_load(find_config_file('digits_quickstart').read_text())
    tree['DATA'].update(DATA_PATH=str(digits), BATCH_SIZE=16)
    tree['TRAIN'].update(EPOCHS=1, WARMUP_EPOCHS=0)
    found = {}
    for ranks in (2, 4):
        tree['TRAIN']['ACCUMULATION_STEPS'] = 4 // ranks
        found[ranks] = folder / f'on_{ranks}.yaml'
        found[ranks].write_text(yaml.safe_dump(tree))
    return found


@pytest.fixture(scope='module')
def expected(cfgs, tmp_path_factory):
    """Number of ranks -> what the run is on ranks that no launcher has started."""

    @functools.cache
    def of(ranks):
        output = tmp_path_factory.mktemp('expected')
        run_ranks(
            training.train_on_ranks, ranks, output,
            cfg=str(cfgs[ranks]), output=str(output), opts=[], ds_config=None,
        )  # fmt: skip
        return outcome(output / cfgs[ranks].stem)

    return of


def outcome(output):
    """The numbers of the epoch, as they were written, and the weights after it."""
    (record,) = map(json.loads, (output / 'metrics.jsonl').read_text().splitlines())
    del record['images_per_s'], record['seconds']
    return record, TagShards(output / 'ckpt_epoch_0').weights()


def require_same(output, expected):
    record, weights = outcome(output)
    assert record == expected[0]
    for name, tensor in expected[1].items():
        assert weights[name].equal(tensor), name


@pytest.fixture(scope='module')
def mpich_env(tmp_path_factory):
    return mpich.make_environment(tmp_path_factory.mktemp('mpich'))


@pytest.mark.parametrize(
    ('launcher', 'ranks'),
    [
        pytest.param('deepspeed', 2, marks=ELSEWHERE),
        pytest.param('deepspeed', 4, marks=ELSEWHERE),
        pytest.param('Open MPI', 2, marks=[MPI, ELSEWHERE]),
        pytest.param('Open MPI', 4, marks=[MPI, ELSEWHERE]),
        pytest.param('MPICH', 2, marks=ELSEWHERE),
        pytest.param('MPICH', 4, marks=ELSEWHERE),
        pytest.param('torchrun', 2, marks=ELSEWHERE),
    ],
)
def test_on_one_host(tmp_path, cfgs, expected, request, launcher, ranks):
    env = request.getfixturevalue('mpich_env') if launcher == 'MPICH' else {}
    port = str(free_port())
    command = start_command(launcher, ranks, port)
    command += ['--cfg', str(cfgs[ranks]), '--output', str(tmp_path)]
    try:
        job = run_command(command, 180, env=env, cwd=tmp_path)
    finally:
        remove_shm_buffers(port)
    assert job.returncode == 0, job.output[-5000:]
    by = {'deepspeed': 'deepspeed or torchrun', 'torchrun': 'deepspeed or torchrun'}
    by['MPICH'] = 'MPICH or Intel MPI'
    assert f'started by {by.get(launcher, launcher)}: {ranks} ranks' in job.output
    require_same(tmp_path / f'on_{ranks}', expected(ranks))


@pytest.fixture(scope='module')
def two_hosts(tmp_path_factory):
    reason = hosts.why_not()
    if reason is not None:
        pytest.skip(f'cannot make hosts: {reason}')
    with hosts.Hosts(2, tmp_path_factory.mktemp('net')) as made:
        yield made


@pytest.mark.parametrize(
    'launcher',
    [
        pytest.param('Open MPI', marks=MPI),
        'deepspeed',
        # test_faults.py starts its ranks, and ends them; on two hosts too, in the soak tier.
        pytest.param('MPICH', marks=ELSEWHERE),
    ],
)
def test_on_two_hosts(tmp_path, cfgs, expected, request, two_hosts, launcher):
    env = request.getfixturevalue('mpich_env') if launcher == 'MPICH' else {}
    command = start_command(launcher, 4, '', two_hosts.hostfile_for(launcher))
    command += ['--cfg', str(cfgs[4]), '--output', str(tmp_path)]
    job = two_hosts.run(0, command, 240, cwd=tmp_path, env=env)
    assert job.returncode == 0, job.output[-5000:]
    require_same(tmp_path / 'on_4', expected(4))
    assert [two_hosts.processes(host) for host in range(2)] == [[], []]
