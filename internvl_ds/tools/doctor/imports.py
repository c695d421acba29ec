"""Imports torch, torchvision, timm and DeepSpeed, then looks at the device that DeepSpeed chose.

An import may kill the process: a probe has a process of its own.
"""

from __future__ import annotations

import importlib
import time

from internvl_ds.tools.doctor.probe_result import ProbeResult, fault, ok

_NAMES = ('torch', 'torchvision', 'timm')


def probe() -> list[ProbeResult]:
    """Imports what the training program imports, in its order, then asks for the device."""
    results, start = [], time.monotonic()
    try:
        for name in _NAMES:
            importlib.import_module(name)
    except Exception as error:  # whatever a broken installation raises
        results.append(fault('imports', f'import {name}: {_first_line(error)}', _advice(error)))
    else:
        seconds = time.monotonic() - start
        results.append(ok('imports', f'{", ".join(_NAMES)}: {seconds:.1f} s'))
    try:
        accelerator = importlib.import_module('deepspeed.accelerator').get_accelerator()
    except Exception as error:
        text = f'import deepspeed: {_first_line(error)}'
        return [*results, fault('accelerator', text, _advice(error))]
    from internvl_ds.tools.doctor import devices

    return results + devices.describe(accelerator)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ['']
    return f'{type(error).__name__}: {lines[0]}'


def _advice(error: Exception) -> str:
    if 'torchvision::nms' in str(error):
        return (
            "torchvision's extension was built for another torch (a CPU build of torch beside "
            "PyPI's torchvision, which links CUDA). Install both in one command from one index"
        )
    return 'no run can start. Reinstall it, with what it stands on, in one pip command'
