"""Versions of what a run stands on, against the ranges that this package asks for.

Read from metadata; nothing is imported, since what does not fit may not be importable.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
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
    """Python, the packages, their ranges, and whether torch and torchvision fit."""
    versions = {name: installed(name) for name in _SHOWN}
    shown = ', '.join(f'{name} {version or "none"}' for name, version in versions.items())
    findings = [_python(), ok('packages', shown)]
    try:
        requirements = metadata.requires('internvl_ds') or []
    except metadata.PackageNotFoundError:
        findings.append(
            warn('version ranges', 'not known: internvl_ds is not installed here', 'pip install .')
        )
    else:
        findings.append(_ranges(requirements))
    torch, vision = versions['torch'], versions['torchvision']
    if torch and vision:
        findings.append(pair(torch, vision, metadata.requires('torchvision') or []))
    return findings


def installed(name: str) -> str | None:
    """The version of a distribution; None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def unmet(requirements: Iterable[str]) -> list[str]:
    """What is asked for and is not there, or is of another version: ``torch 2.9.0 (<2.16)``."""
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
    """Whether a torchvision was built for the torch that is there.

    Args:
        torch: version, with a local part such as ``+cpu`` where the wheel's name has one.
        vision: torchvision's version.
        requirements: torchvision's own; its binary fits the torch that they name.
    """
    topic = 'torch pair'
    for text in requirements:
        requirement = Requirement(text)
        if requirement.name == 'torch' and not requirement.specifier.contains(torch, True):
            return fault(
                topic,
                f'torchvision {vision} was built for torch{requirement.specifier}, not {torch}',
                'import torchvision, and so timm, dies. Install both in one pip command',
            )
    kinds = [_is_cpu(torch), _is_cpu(vision)]
    found = f'torch {torch} with torchvision {vision}'
    if kinds[0] != kinds[1]:
        return warn(
            topic,
            f'{found}: one is a CPU build by its version, the other is not',
            "a CUDA build of torchvision dies beside a CPU build of torch ('operator "
            "torchvision::nms does not exist'). Install both from one index",
        )
    return ok(topic, found)


def _is_cpu(version: str) -> bool:
    return Version(version).local == 'cpu'


def _python() -> ProbeResult:
    found = f'{platform.python_version()}, {sys.executable}'
    try:
        asked = metadata.metadata('internvl_ds').json.get('requires_python', '')
    except metadata.PackageNotFoundError:
        asked = ''
    if asked and platform.python_version() not in SpecifierSet(asked, prereleases=True):
        return fault('python', found, f'this package needs Python {asked}')
    first = shutil.which('python')
    if first is None or _prefix_of(first) != sys.prefix:
        return warn(
            'python',
            f'{found}; `python` on PATH is {first or "not there"}',
            'what starts `python` or `deepspeed` by name takes another environment: activate this',
        )
    return ok('python', found)


def _prefix_of(python: str) -> str:
    """The environment of a Python, as it says itself: a path may be a link or a wrapper."""
    try:
        return ask(python, '-c', 'import sys; print(sys.prefix)').strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)


def _ranges(requirements: list[str]) -> ProbeResult:
    wrong = unmet(requirements)
    if wrong:
        return fault(
            'version ranges',
            '; '.join(wrong),
            'this package was never run on it, and leans on internals that change. Run pip install '
            "with the ranges named: pip install 'internvl_ds' in a fresh environment",
        )
    return ok('version ranges', 'all that internvl_ds requires is there, within its ranges')
