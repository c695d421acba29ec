"""Versions of the packages that a run needs, against the ranges that this package requires.

Read from metadata: a package of a wrong version may not be importable.
"""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Iterable
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from internvl_ds.tools.doctor.compilers import ask
from internvl_ds.tools.doctor.probe_result import ProbeResult, fault, ok, warn

_SHOWN = ('internvl_ds', 'torch', 'torchvision', 'deepspeed', 'timm', 'mpi4py', 'numpy')


def probe() -> list[ProbeResult]:
    """Python, the packages, their ranges, and whether torch and torchvision match."""
    versions = {name: installed(name) for name in _SHOWN}
    packages = ', '.join(f'{name} {version or "none"}' for name, version in versions.items())
    results = [_python(), ok('packages', packages), _ranges()]
    torch, vision = versions['torch'], versions['torchvision']
    if torch and vision:
        results.append(pair(torch, vision, metadata.requires('torchvision') or []))
    return results


def installed(name: str) -> str | None:
    """The version of a distribution; None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def unmet(requirements: Iterable[str]) -> list[str]:
    """The requirements that are not met, each as ``torch 2.9.0 (needs <2.16)``."""
    wrong = []
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({'extra': ''}):
            continue
        version = installed(requirement.name)
        if version is None:
            wrong.append(f'{requirement.name} is not installed')
        elif not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f'{requirement.name} {version} (needs {requirement.specifier})')
    return wrong


def pair(torch: str, vision: str, requirements: Iterable[str]) -> ProbeResult:
    """Whether a torchvision was built for the installed torch.

    Args:
        torch: version, with a local part such as ``+cpu`` where the wheel's name has one.
        vision: torchvision's version.
        requirements: torchvision's own; its binary fits the torch that they name.
    """
    topic = 'torch pair'
    for text in requirements:
        requirement = Requirement(text)
        if requirement.name == 'torch' and not requirement.specifier.contains(torch, True):
            text = f'torchvision {vision} was built for torch{requirement.specifier}, not {torch}'
            advice = 'import torchvision, and so timm, dies. Install both in one pip command'
            return fault(topic, text, advice)
    text = f'torch {torch} with torchvision {vision}'
    if (Version(torch).local == 'cpu') != (Version(vision).local == 'cpu'):
        advice = (
            "a CUDA build of torchvision dies beside a CPU build of torch ('operator "
            "torchvision::nms does not exist'). Install both from one index"
        )
        return warn(topic, f'{text}: one is a CPU build by its version, the other is not', advice)
    return ok(topic, text)


def _python() -> ProbeResult:
    text = f'{platform.python_version()}, {sys.executable}'
    try:
        pythons = metadata.metadata('internvl_ds').json.get('requires_python', '')
    except metadata.PackageNotFoundError:
        pythons = ''
    if pythons and platform.python_version() not in SpecifierSet(pythons, prereleases=True):
        return fault('python', text, f'this package needs Python {pythons}')
    first = shutil.which('python')
    # Python itself says its environment: a path may be a link or a wrapper.
    if first is None or ask(first, '-c', 'import sys; print(sys.prefix)').strip() != sys.prefix:
        advice = (
            'what starts `python` or `deepspeed` by name takes another environment: activate this'
        )
        return warn('python', f'{text}; `python` on PATH is {first or "not there"}', advice)
    return ok('python', text)


def _ranges() -> ProbeResult:
    topic = 'version ranges'
    try:
        wrong = unmet(metadata.requires('internvl_ds') or [])
    except metadata.PackageNotFoundError:
        return warn(topic, 'not known: internvl_ds is not installed here', 'pip install .')
    if wrong:
        advice = (
            'this package was never run on it, and leans on internals that change. Run pip install '
            "with the ranges named: pip install 'internvl_ds' in a fresh environment"
        )
        return fault(topic, '; '.join(wrong), advice)
    return ok(topic, 'all that internvl_ds requires is there, within its ranges')
