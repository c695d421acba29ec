"""What importing the package changes in a process, beside what the libraries that it imports do.

    python -m tests.whole.importing [LIBRARIES]    prints JSON

LIBRARIES is a JSON list of modules to import before: without one the modules are printed that the
package's own bring along.
"""

from __future__ import annotations

import atexit
import importlib
import json
import locale
import logging
import os
import pkgutil
import random
import signal
import sys
import threading
import warnings
from typing import Any

fork_hooks: list[Any] = []


def own_modules() -> list[str]:
    import internvl_ds

    found = pkgutil.walk_packages(internvl_ds.__path__, 'internvl_ds.')
    return ['internvl_ds', *(module.name for module in found)]


def state() -> dict[str, Any]:
    """What a program has one of; each value under a name by which it can be told."""
    import numpy as np
    import torch

    loggers = {'root': logging.root, **logging.root.manager.loggerDict}
    seen: dict[str, Any] = {
        'exit functions': atexit._ncallbacks(),
        'excepthook': sys.excepthook,
        'threading.excepthook': threading.excepthook,
        'unraisablehook': sys.unraisablehook,
        'threads': [thread.name for thread in threading.enumerate()],
        'functions at fork': len(fork_hooks),
        'warnings': list(warnings.filters),
        'showwarning': warnings.showwarning,
        'wakeup fd': signal.set_wakeup_fd(-1),
        'locale': locale.setlocale(locale.LC_ALL),
        'directory': os.getcwd(),
        'umask': os.umask(0o022),
        'path': list(sys.path),
        'finders': list(sys.meta_path),
        'streams': [sys.stdout, sys.stderr],
        'logging disabled': logging.root.manager.disable,
        'random': random.getstate(),
        'np.random': repr(np.random.get_state()),
        'np.seterr': np.geterr(),
        'torch random': torch.get_rng_state().tolist(),
        'torch dtype': torch.get_default_dtype(),
        'torch threads': torch.get_num_threads(),
        'torch grad': torch.is_grad_enabled(),
        'torch deterministic': torch.are_deterministic_algorithms_enabled(),
        'torch safe globals': list(torch.serialization.get_safe_globals()),
    }
    os.umask(seen['umask'])
    seen.update({f'signal {n.name}': signal.getsignal(n) for n in signal.Signals})
    seen.update({f'environ {name}': value for name, value in os.environ.items()})
    for name, logger in loggers.items():
        if isinstance(logger, logging.Logger) and not logger.name.startswith('internvl_ds.'):
            settings = logger.level, list(logger.handlers), logger.propagate, list(logger.filters)
            seen[f'logger {name}'] = settings
    own = logging.getLogger('internvl_ds')
    seen['logger internvl_ds'] = own.level, list(own.handlers), own.propagate
    return seen


def attributes() -> dict[str, int]:
    """The identity of every function, class and value of every library, and of its classes."""
    found: dict[str, int] = {}
    for name, module in list(sys.modules.items()):
        if name.startswith(('internvl_ds', '__main__', 'tests')):
            continue
        for key, value in list(vars(module).items()) if hasattr(module, '__dict__') else ():
            found[f'{name}.{key}'] = id(value)
            if isinstance(value, type) and value.__module__ == name:
                items = list(vars(value).items())
                found.update({f'{name}.{key}.{k}': id(v) for k, v in items if k[:5] != '_abc_'})
    return found


def main(libraries: list[str] | None) -> None:
    if libraries is None:
        for name in own_modules():
            importlib.import_module(name)
        own = ('internvl_ds', 'tests', '__main__', '__mp_main__')
        json.dump([name for name in sys.modules if not name.startswith(own)], sys.stdout)
        return
    for name in libraries:
        importlib.import_module(name)
    register = os.register_at_fork
    os.register_at_fork = lambda **functions: (fork_hooks.append(functions), register(**functions))
    before, had = state(), attributes()
    for name in own_modules():
        importlib.import_module(name)
    after, has = state(), attributes()
    changed = [key for key in {*before, *after} if before.get(key) != after.get(key)]
    changed += [key for key in had if has.get(key) != had[key]]
    json.dump({'changed': sorted(changed), 'imported': len(own_modules())}, sys.stdout)


if __name__ == '__main__':
    main(json.loads(sys.argv[1]) if len(sys.argv) > 1 else None)
