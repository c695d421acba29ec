"""The order of the test files: those that take longest come first, and none is left to the end."""

_FIRST = ('test_preemption.py', 'test_faults.py', 'test_every_launcher.py', 'test_launch_jobs.py')


def pytest_collection_modifyitems(items):
    """Moves these files to the front; the others stay in their order."""
    items.sort(key=lambda item: _FIRST.index(item.path.name) if item.path.name in _FIRST else 99)
