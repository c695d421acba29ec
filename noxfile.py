"""The checks under each Python that is installed, and the core of them under older packages.

nox -s tests-3.12 -- tests/config
nox -s versions
"""

import nox

PYTHONS = ['3.10', '3.11', '3.12', '3.13']

# Python, torch, torchvision, DeepSpeed.
VERSIONS = [
    ('3.10', '2.9.1', '0.24.1', '0.17.6'),
    ('3.10', '2.9.1', '0.24.1', '0.18.9'),
    ('3.12', '2.9.1', '0.24.1', '0.18.9'),
    ('3.10', '2.9.1', '0.24.1', '0.19.8'),
    ('3.13', '2.12.1', '0.27.1', '0.19.8'),
    ('3.11', '2.14.1', '0.29.1', '0.18.9'),
    ('3.11', '2.14.1', '0.29.1', '0.19.8'),
]

nox.options.error_on_missing_interpreters = False
nox.options.sessions = ['tests']


@nox.session(python=PYTHONS, venv_backend='venv')
def tests(session: nox.Session) -> None:
    """What launch/test.sh runs without arguments; arguments after -- go to it."""
    session.run(
        'bash', 'launch/test.sh', *session.posargs,
        env={'INTERNVL_DS_VENV': session.virtualenv.location}, external=True,
    )  # fmt: skip


@nox.session(venv_backend='venv')
@nox.parametrize(
    ('python', 'torch', 'vision', 'deepspeed'), VERSIONS, ids=['-'.join(v) for v in VERSIONS]
)
def versions(session: nox.Session, torch: str, vision: str, deepspeed: str) -> None:
    """The core: a test on ranks of every subject. Arguments after -- go to pytest."""
    session.install(f'torch=={torch}', f'torchvision=={vision}', 'numpy', 'setuptools', 'wheel')
    session.install('--no-build-isolation', f'deepspeed=={deepspeed}')
    session.install('-e', '.[test,mpi]')
    session.run(
        'python', '-m', 'pytest', *(session.posargs or ['-m', 'first', '-n', '2', 'tests']),
        env={
            'OMP_NUM_THREADS': '1',
            'TORCH_EXTENSIONS_DIR': f'{session.virtualenv.location}/torch_extensions',
        },
    )  # fmt: skip
