"""The probes by name, in the order of the screen, each with its limit."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import NamedTuple

from internvl_ds.tools.doctor.probe_result import ProbeResult


class Probe(NamedTuple):
    """A function that looks at one part of the machine, in a process of its own."""

    module: str  # of this package; imported in that process only
    function: str  # of the module; returns results
    seconds: float  # after which it is ended, and said to hang
    slow: bool = False  # whether others run beside it
    # whether it is given OUTPUT; it then runs after the others, which would falsify the rate that
    # it measures
    of_output: bool = False


PROBES = {
    'versions': Probe('versions', 'probe', 30),
    'imports': Probe('imports', 'probe', 180, slow=True),
    'compilers': Probe('compilers', 'probe', 40),
    'MPI': Probe('mpi', 'probe', 60),
    'shared memory': Probe('shm', 'probe', 30),
    'limits': Probe('limits', 'probe', 30),
    'OUTPUT': Probe('disk', 'probe', 60, of_output=True),
    'network': Probe('network', 'probe', 30),
    'host name': Probe('network', 'probe_name', 15),
}


def run_probe(name: str, output: Path) -> list[ProbeResult]:
    """Runs one probe here and now."""
    probe = PROBES[name]
    module = importlib.import_module(f'internvl_ds.tools.doctor.{probe.module}')
    function = getattr(module, probe.function)
    return function(output) if probe.of_output else function()
