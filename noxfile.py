"""The checks under each Python that is installed: ``nox -s tests-3.12 -- tests/config``."""

import nox

PYTHONS = ['3.10', '3.11', '3.12', '3.13']

nox.options.error_on_missing_interpreters = False


@nox.session(python=PYTHONS, venv_backend='venv')
def tests(session: nox.Session) -> None:
    """All that launch/test.sh runs; arguments after -- go to it."""
    session.run(
        'bash', 'launch/test.sh', *session.posargs,
        env={'INTERNVL_DS_VENV': session.virtualenv.location}, external=True,
    )  # fmt: skip
