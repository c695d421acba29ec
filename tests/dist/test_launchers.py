"""Who started a process, from recorded environments."""

import pytest

from internvl_ds.dist.launchers import (
    ENVIRONMENT,
    MPICH,
    OPEN_MPI,
    SINGLE,
    SLURM,
    Launch,
    detect,
    expand_nodes,
    expand_tasks,
)
from internvl_ds.errors import ConfigError

MASTER = {'MASTER_ADDR': '10.1.2.3', 'MASTER_PORT': '4242'}
TORCHRUN = {'RANK': '3', 'WORLD_SIZE': '8', 'LOCAL_RANK': '1', **MASTER}
OMPI = {
    'OMPI_COMM_WORLD_SIZE': '4', 'OMPI_COMM_WORLD_RANK': '2', 'OMPI_COMM_WORLD_LOCAL_RANK': '0',
}  # fmt: skip
HYDRA = {'PMI_RANK': '1', 'PMI_SIZE': '2', 'MPI_LOCALRANKID': '1', 'MPI_LOCALNRANKS': '2'}
SRUN = {
    'SLURM_JOB_ID': '4711', 'SLURM_STEP_ID': '0', 'SLURM_PROCID': '9', 'SLURM_LOCALID': '1',
    'SLURM_STEP_NUM_TASKS': '16', 'SLURM_NTASKS': '16', 'SLURM_STEP_NODELIST': 'gpu[03-04]',
    'SLURM_JOB_NODELIST': 'gpu[03-04]', 'SLURM_STEP_TASKS_PER_NODE': '8(x2)',
}  # fmt: skip


@pytest.mark.parametrize(
    ('environ', 'expected'),
    [
        ({}, Launch(SINGLE)),
        (MASTER, Launch(SINGLE, master=('10.1.2.3', 4242))),
        ({'RANK': '0', 'WORLD_SIZE': '1'}, Launch(ENVIRONMENT)),
        (TORCHRUN, Launch(ENVIRONMENT, 3, 8, 1, ('10.1.2.3', 4242))),
        (OMPI, Launch(OPEN_MPI, 2, 4, None, None)),
        (OMPI | MASTER, Launch(OPEN_MPI, 2, 4, None, ('10.1.2.3', 4242))),
        (HYDRA, Launch(MPICH, 1, 2, None, None)),
        (SRUN, Launch(SLURM, 9, 16, 1, ('gpu03', 20000 + 4711 * 7 % 12000))),
        (SRUN | MASTER, Launch(SLURM, 9, 16, 1, ('10.1.2.3', 4242))),
        # what is closer to the process wins
        (SRUN | OMPI, Launch(OPEN_MPI, 2, 4, None, None)),
        (SRUN | OMPI | TORCHRUN, Launch(ENVIRONMENT, 3, 8, 1, ('10.1.2.3', 4242))),
        # a batch script is no rank
        ({k: v for k, v in SRUN.items() if 'STEP' not in k}, Launch(SINGLE)),
    ],
)
def test_what_each_launcher_sets(environ, expected):
    assert detect(environ) == expected


BATCH = {key: value for key, value in SRUN.items() if 'STEP' not in key}
OF_SRUN = Launch(SLURM, 9, 16, 1, ('gpu03', 20000 + 4711 * 7 % 12000))


@pytest.mark.parametrize(
    ('environ', 'launcher', 'local_rank', 'expected'),
    [
        (SRUN, 'slurm', 0, OF_SRUN),  # the original's scripts give --local-rank 0 to all
        # what a batch script has exported, and srun's own PMI, are not asked
        (SRUN | {'RANK': '0', 'WORLD_SIZE': '1'} | HYDRA, 'slurm', None, OF_SRUN),
        (SRUN | {'MASTER_PORT': '4242'}, 'slurm', None, Launch(SLURM, 9, 16, 1, ('gpu03', 4242))),
        (TORCHRUN, 'pytorch', None, Launch(ENVIRONMENT, 3, 8, 1, ('10.1.2.3', 4242))),
        (TORCHRUN, 'pytorch', 0, Launch(ENVIRONMENT, 3, 8, 1, ('10.1.2.3', 4242))),
        ({'RANK': '3', 'WORLD_SIZE': '8'}, None, 2, Launch(ENVIRONMENT, 3, 8, 2)),
        ({}, 'pytorch', 1, Launch(SINGLE, local_rank=1)),
    ],
)
def test_the_originals_flags(environ, launcher, local_rank, expected):
    assert detect(environ, launcher, local_rank) == expected


@pytest.mark.parametrize(
    ('environ', 'launcher', 'named'),
    [
        ({}, 'slurm', '--launcher slurm: srun did not start this process'),
        (BATCH, 'slurm', '--launcher slurm: srun did not start this process'),
        (SRUN, 'pytorch', '--launcher pytorch: Slurm started this process'),
        (OMPI, 'pytorch', '--launcher pytorch: Open MPI started this process'),
    ],
)
def test_another_launcher_than_the_flag_names_is_an_error(environ, launcher, named):
    with pytest.raises(ConfigError, match=named):
        detect(environ, launcher)


def test_two_steps_of_slurm_have_other_ports():
    ports = {detect(SRUN | {'SLURM_STEP_ID': str(n)}).master[1] for n in range(5)}
    ports |= {detect(SRUN | {'SLURM_JOB_ID': str(n)}).master[1] for n in range(5000, 5050)}
    assert len(ports) == 55
    assert all(20000 <= port < 32000 for port in ports)


@pytest.mark.parametrize(
    ('environ', 'named'),
    [
        ({'RANK': 'x', 'WORLD_SIZE': '2'}, "RANK is 'x'"),
        ({'RANK': '1', 'WORLD_SIZE': '2'}, 'LOCAL_RANK is None'),
        ({'OMPI_COMM_WORLD_SIZE': '2'}, 'OMPI_COMM_WORLD_RANK is None'),
        ({'PMI_SIZE': '2', 'PMI_RANK': '-1'}, "PMI_RANK is '-1'"),
        ({**TORCHRUN, 'MASTER_PORT': 'http'}, "MASTER_PORT is 'http'"),
        ({**TORCHRUN, 'MASTER_PORT': '99999'}, "MASTER_PORT is '99999'"),
        ({**TORCHRUN, 'MASTER_PORT': '0'}, 'MASTER_PORT is 0, .* --standalone'),
        ({**SRUN, 'MASTER_PORT': '0'}, 'MASTER_PORT is 0, .* name a free one'),
        ({**TORCHRUN, 'MASTER_PORT': '\u00b2'}, 'MASTER_PORT is '),
        ({**TORCHRUN, 'MASTER_PORT': '9' * 5000}, 'MASTER_PORT is '),
        ({**TORCHRUN, 'RANK': '8', 'WORLD_SIZE': '8'}, 'RANK is 8 and WORLD_SIZE is 8'),
        ({**SRUN, 'SLURM_STEP_NODELIST': '', 'SLURM_JOB_NODELIST': ''}, 'SLURM_STEP_NODELIST'),
    ],
)
def test_what_is_incomplete_is_named(environ, named):
    with pytest.raises(ConfigError, match=named):
        detect(environ)


@pytest.mark.parametrize(
    ('text', 'hosts'),
    [
        ('login', ['login']),
        ('gpu[01-03,7]', ['gpu01', 'gpu02', 'gpu03', 'gpu7']),
        ('a1,b[9-11],c', ['a1', 'b9', 'b10', 'b11', 'c']),
        ('rack[1-2]-node[08-09]', ['rack1-node08', 'rack1-node09', 'rack2-node08', 'rack2-node09']),
        ('nid[000998-001001]', ['nid000998', 'nid000999', 'nid001000', 'nid001001']),
    ],
)
def test_node_lists(text, hosts):
    assert expand_nodes(text) == hosts


def test_tasks_per_node():
    assert expand_tasks('8(x2)') == [8, 8]
    assert expand_tasks('4,2(x3),1') == [4, 2, 2, 2, 1]
    assert expand_tasks('16') == [16]


@pytest.mark.parametrize('text', ['', 'gpu[a-b]', 'gpu[1-]x['])
def test_what_is_no_node_list(text):
    with pytest.raises(ConfigError, match='Slurm node list'):
        expand_nodes(text)
    with pytest.raises(ConfigError, match='no list of tasks'):
        expand_tasks(text)
