"""The order of the test files, and an end that leaves no shared memory of killed ranks behind."""

import os
import signal

import pytest

from tests.harness.counts import SOAK, trials
from tests.harness.shared_memory import remove_unused, shared_files

# Whoever starts the tests in the background, or with nohup, has these ignored, and so would ranks.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Of test_sequences.py, here so that every run says them: another seed draws other sequences.
_SEQUENCES = {
    'INTERNVL_DS_SEQUENCES': str(trials('INTERNVL_DS_SEQUENCES', 40, soak=2000)),
    'INTERNVL_DS_SEQUENCE_SEED': '20261128',
}
for _name, _default in _SEQUENCES.items():
    os.environ.setdefault(_name, _default)

# Those that take longest come first, and none is left to the end.
_FIRST = (
    'test_preemption.py', 'test_faults.py', 'test_every_launcher.py', 'test_quickstart.py',
    'test_launch_jobs.py', 'test_kills.py', 'test_sequences.py', 'test_interrupts.py',
    'tools/cli/test_tune.py', 'test_hostile_files.py',
)  # fmt: skip


def pytest_report_header():
    """The seed of the random sequences."""
    return ' '.join(f'{name}={os.environ[name]}' for name in _SEQUENCES)


def pytest_collection_modifyitems(config, items):
    """Moves these files to the front; leaves out what `pytest` alone does not run."""
    whole = config.option.markexpr or config.args_source == pytest.Config.ArgsSource.ARGS
    if not whole:
        _keep(config, items, _is_quick)
    if not SOAK:
        _keep(config, items, lambda item: not item.get_closest_marker('soak_only'))
    items.sort(key=lambda item: _place(str(item.path)))


def _keep(config, items, wanted):
    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = [item for item in items if wanted(item)]


def _place(path):
    return next((n for n, name in enumerate(_FIRST) if path.endswith(name)), len(_FIRST))


def _is_quick(item):
    markers = {marker.name for marker in item.iter_markers()}
    return 'first' in markers or not markers & {'ranks', 'slow', 'soak'}


def pytest_sessionstart(session):
    """Notes what is in /dev/shm, in the process that ends last."""
    if not hasattr(session.config, 'workerinput'):
        session.config.shared_before = shared_files()


def pytest_sessionfinish(session):
    """Removes what the session's ranks left there and no process uses any more."""
    before = getattr(session.config, 'shared_before', None)
    if before is not None:
        remove_unused(before)
