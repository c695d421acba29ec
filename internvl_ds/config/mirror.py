"""CHECKPOINT.MIRROR: the address of a second place for tags."""

from __future__ import annotations

import importlib.util
import os

from yacs.config import CfgNode

from internvl_ds.config.tree import checkpoint_option, get_option
from internvl_ds.errors import ConfigError
from internvl_ds.files.addresses import redacted

# Scheme -> the package of its file system, and how to install it.
_PACKAGES = {
    'file': ('fsspec', "pip install 'internvl_ds[mirror]'"),
    's3': ('s3fs', "pip install 'internvl_ds[mirror]'"),
    'gs': ('gcsfs', 'pip install gcsfs'),
}


def mirror_of(config: CfgNode) -> str:
    """CHECKPOINT.MIRROR without a slash at its end; '' for none.

    Raises:
        ConfigError: for an unknown scheme, a package that is not installed, a user or an option in
            the address, OUTPUT itself or a place inside it, or CHECKPOINT.SHARED_OUTPUT beside it.
    """
    address = checkpoint_option(config, 'MIRROR')
    if address == '':
        return ''
    fault = _fault(address, str(get_option(config, 'OUTPUT', '')))
    if fault is None and checkpoint_option(config, 'SHARED_OUTPUT'):
        fault = 'it is of one job, and CHECKPOINT.SHARED_OUTPUT lets several write'
    if fault is not None:
        raise ConfigError(f'CHECKPOINT.MIRROR is {redacted(str(address))!r}: {fault}')
    return str(address).rstrip('/')


def _fault(address: object, output: str) -> str | None:
    scheme, found, path = str(address).partition('://')
    if not isinstance(address, str) or not found or scheme not in _PACKAGES:
        return f'it takes {", ".join(f"{name}://..." for name in _PACKAGES)}, or nothing'
    package, installation = _PACKAGES[scheme]
    if importlib.util.find_spec(package) is None:
        return f'{scheme}:// takes the package {package}, which is not installed: {installation}'
    if scheme != 'file':
        bucket = path.split('/')[0]
        is_plain = bucket and not set(bucket) & set('@:?#') and not set(path) & set('?#')
        return None if is_plain else 'it takes a bucket; credentials come from the environment'
    if not path.startswith('/'):
        return 'a path begins with a slash: file:///DIR'
    own, place = os.path.realpath(output), os.path.realpath(path)
    if output and os.path.commonpath([own, place]) == own:
        return f'it is OUTPUT {output}, or lies in it, and would be lost with it'
    return None
