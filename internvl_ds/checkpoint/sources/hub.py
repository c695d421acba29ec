"""Files of the Hugging Face Hub by its own client: revisions, etags, tokens, mirrors, offline mode.

What the client reads from the environment holds: HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from internvl_ds.errors import PretrainedError
from internvl_ds.files.reading import read_json

if TYPE_CHECKING:
    from huggingface_hub import HfUri

_log = logging.getLogger(__name__)

_INDEX = '.index.json'
# Where an address names a repository only: what timm and transformers save, in one file or several.
_FILES = (
    'model.safetensors', f'model.safetensors{_INDEX}', f'pytorch_model.bin{_INDEX}',
    'pytorch_model.bin',
)  # fmt: skip


def parse(address: str) -> HfUri | None:
    """The file or repository of the hub that an address names; None for any other address.

    Raises:
        PretrainedError: for an ``hf-hub:`` or ``hf://`` address that names none.
    """
    scheme, _, rest = address.partition(':')
    scheme = scheme.lower()
    if scheme not in ('https', 'hf', 'hf-hub'):
        return None
    from huggingface_hub import constants, parse_hf_uri
    from huggingface_hub.errors import HfUriError

    if scheme == 'hf-hub':
        repository, _, file = rest.partition(':')
        rest = f'//{repository}/{file}'
    try:
        kind = 'https' if scheme == 'https' else 'hf'
        return parse_hf_uri(f'{kind}:{rest}', endpoint=constants.ENDPOINT)
    except HfUriError:
        if scheme == 'https':
            return None
        raise PretrainedError(
            'names no file of the Hugging Face Hub: hf-hub:ORG/REPO[@revision][:file]'
        ) from None


def arriving(uri: HfUri) -> int:
    """Bytes received so far of unfinished downloads from a repository."""
    from huggingface_hub import constants

    repository = f'{uri.type}s--{uri.id.replace("/", "--")}'
    return total_size(Path(constants.HF_HUB_CACHE, repository, 'blobs').glob('*.incomplete'))


def total_size(paths: Iterable[Path]) -> int:
    """The total size of files, of which some may vanish meanwhile."""
    total = 0
    for path in paths:
        with contextlib.suppress(OSError):  # it is whole now, and has its own name
            total += path.stat().st_size
    return total


def download(
    uri: HfUri, run: Callable[[Callable[[], str]], str], digest_of: Callable[[Path], str]
) -> Path:
    """The file in the client's cache, downloaded if the hub has a newer one; its hash is checked.

    Beside an index the files that it names are in the cache then too.

    Args:
        run: runs what it is given, and ends it at its limit.
        digest_of: the sha256 of a file, by which the cache names it.
    """
    from huggingface_hub.errors import EntryNotFoundError

    files = [uri.path_in_repo] if uri.path_in_repo else list(_FILES)
    while True:
        try:
            path = _whole(uri, files[0], run, digest_of)
            break
        except EntryNotFoundError:
            if not files[1:]:
                raise
            del files[0]
    for file in _named_by(path) if path.name.endswith(_INDEX) else ():
        _whole(uri, str(PurePosixPath(files[0]).with_name(file)), run, digest_of)
    return path


def _whole(
    uri: HfUri,
    file: str,
    run: Callable[[Callable[[], str]], str],
    digest_of: Callable[[Path], str],
) -> Path:
    for force in (False, True):
        path = Path(run(lambda: _get(uri, file, force)))  # noqa: B023
        digest = Path(os.readlink(path)).name if path.is_symlink() else ''
        if len(digest) != 64 or digest_of(path) == digest:
            return path
        _log.warning(f'{path}: is damaged: it is not what its name {digest} says')
    raise PretrainedError(f'{path}: is damaged, and was again when it was downloaded again')


def _named_by(index: Path) -> list[str]:
    """The files that an index names; a faulty index is left to its reader."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        files = {str(file) for file in read_json(index)['weight_map'].values()}
        return sorted(f for f in files if PurePosixPath(f).name == f and not f.endswith('.json'))
    return []


def _get(uri: HfUri, file: str, force: bool) -> str:
    from huggingface_hub import get_session, hf_hub_download

    session, thread = get_session(), threading.get_ident()

    def require_https(request: Any) -> None:
        if request.url.scheme != 'https' and threading.get_ident() == thread:
            raise PretrainedError(
                f'it is redirected to {request.url.scheme}: only https is followed'
            )

    hooks = session.event_hooks
    session.event_hooks = {**hooks, 'request': [*hooks['request'], require_https]}
    # They log whole addresses, signed ones too.
    loggers = [logging.getLogger(name) for name in ('huggingface_hub', 'httpx2', 'httpcore2')]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        return hf_hub_download(
            uri.id, file, repo_type=uri.type, revision=uri.revision, force_download=force,
            library_name='internvl_ds',
        )  # fmt: skip
    finally:
        session.event_hooks = hooks
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
