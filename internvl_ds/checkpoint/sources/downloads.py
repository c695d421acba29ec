"""Weights at an address: downloaded once per host, kept by the whole address, hashed at every use.

A kept file lies in torch.hub's directory as ``internvl_ds/KEY/DIGEST-NAME``: KEY is of the whole
address, so that two files of one name are two, and DIGEST is of the content, so that one that was
damaged later is seen. Addresses of the Hugging Face Hub go through its own client: see `hub`.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import logging
import os
import re
import shutil
import tempfile
import threading
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urljoin, urlsplit

import torch
from safetensors import SafetensorError
from yacs.config import CfgNode

from internvl_ds.checkpoint.formats.tensor_files import open_safetensors
from internvl_ds.checkpoint.sources import hub
from internvl_ds.config.tree import default_of, get_option
from internvl_ds.errors import ConfigError, PretrainedError
from internvl_ds.files import flush, open_own
from internvl_ds.files.addresses import BLANK, is_address, redacted, shown, split_address
from internvl_ds.files.locks import try_lock
from internvl_ds.files.reading import Unreadable, open_data

_T = TypeVar('_T')

_LEAST = 1 << 16  # bytes that a download must bring, or end, within MODEL.DOWNLOAD_TIMEOUT
_SHARE = 0.95  # of a disk's free space that a download takes at most
_GRACE = 5.0  # seconds that a process which downloads has to end, beyond its own limit
# torch.hub's convention, name-0123abcd.pth, of eight digits or more: vit-b.pth has no hash.
_NAMED_HASH = re.compile(r'-([a-f0-9]{8,64})\.')
_log = logging.getLogger(__name__)


def local(path: str, config: CfgNode) -> str:
    """``path`` (MODEL.PRETRAINED or MODEL.RESUME); of an address, what `fetch` gives."""
    if not is_address(path):
        return path
    return str(fetch(path, get_option(config, 'MODEL.DOWNLOAD_TIMEOUT', None)))


def fetch(address: str, timeout: float | None = None) -> Path:
    """The file of an address, from the cache or downloaded by one process of a host.

    A file is kept once all of it has come, and looks like weights; the hash that its name ends in
    (``name-0123abcd.pth``) is checked.

    Args:
        address: ``https://...``, redirected to https only; a user and password in it are sent to
            its host only. Or ``hf-hub:ORG/REPO[@revision][:file]``.
        timeout: MODEL.DOWNLOAD_TIMEOUT: seconds within which 64 KiB more must come (of the hub,
            10 MiB), or the rest; its default where it is None.

    Raises:
        PretrainedError: one line that names the address, without secrets, and the reason.
        ConfigError: for a timeout that is not above 0.
    """
    timeout = float(default_of('MODEL.DOWNLOAD_TIMEOUT') if timeout is None else timeout)
    if not timeout > 0:
        raise ConfigError(f'MODEL.DOWNLOAD_TIMEOUT is {timeout:g}; it must be above 0')
    try:
        uri = None if BLANK.search(address) else hub.parse(address)
        if uri is None:
            return _fetch(address, timeout)
        measure = functools.partial(hub.arriving, uri)
        with _turn(_folder(address), timeout, measure):
            run = functools.partial(_progressing, measure=measure, timeout=timeout)
            return hub.download(uri, run, sha256)
    except PretrainedError as error:
        raise PretrainedError(f'{shown(address)}: {error}') from None
    except Exception as error:  # of two HTTP clients, and of files; a chain would show the address
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())
        raise PretrainedError(
            f'{shown(address)}: cannot be downloaded ({redacted(reason)})'
        ) from None


def is_in_cache(path: Path) -> bool:
    """Whether a file came by `fetch`, so that it can be removed and downloaded again."""
    return path.parent.parent == _root()


def sha256(path: Path) -> str:
    """The hexadecimal digest of a file."""
    digest = hashlib.sha256()
    with open_data(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _fetch(address: str, timeout: float) -> Path:
    url, user = split_address(address)
    name, folder = unquote(Path(urlsplit(url).path).name), _folder(url)
    match = _NAMED_HASH.search(name)
    digest = match.group(1) if match else ''
    if file := _file_in(folder, digest):
        return file
    folder.mkdir(parents=True, exist_ok=True)
    with _turn(folder, timeout, lambda: hub.total_size(folder.glob('.*.part'))):
        if file := _file_in(folder, digest):  # by the process that was waited for
            return file
        old = Path(torch.hub.get_dir(), 'checkpoints', name)
        # A name alone says nothing: model.safetensors is a hundred different files.
        if digest and old.is_file() and sha256(old).startswith(digest):
            return old
        if not digest:
            reason = 'its name ends in no hash, so what comes cannot be checked'
            _log.warning(f'{redacted(url)}: {reason}')
        name = re.sub(r'[^\w.-]', '_', name, flags=re.ASCII)[-100:]
        return _download(url, user, folder, name, digest, timeout)


def _root() -> Path:
    return Path(torch.hub.get_dir(), 'internvl_ds')


def _folder(url: str) -> Path:
    return _root() / hashlib.sha256(url.encode()).hexdigest()[:32]


def _file_in(folder: Path, start: str) -> Path | None:
    """The whole file in a folder of the cache; one that is damaged is removed."""
    for path in sorted(folder.glob('[0-9a-f]' * 16 + '-*')):
        try:
            digest = sha256(path)
        except (Unreadable, IsADirectoryError):
            digest = ''
        if path.name.startswith(f'{digest[:16]}-') and digest.startswith(start):
            return path
        _log.warning(f'{path}: is damaged since it was downloaded: it is downloaded again')
        path.unlink(missing_ok=True)
    return None


def _download(url: str, user: str, folder: Path, name: str, start: str, timeout: float) -> Path:
    for part in folder.glob('.*.part'):  # of a killed process: a living one gets on
        if part.stat().st_mtime < time.time() - 2 * timeout - 60:
            part.unlink(missing_ok=True)
    descriptor, aside = tempfile.mkstemp('.part', '.', folder)
    stop = threading.Event()
    try:
        os.fchmod(descriptor, 0o644)
        digest = _progressing(
            lambda: _receive(url, user, descriptor, bool(start), timeout, stop),
            lambda: hub.total_size(folder.glob('.*.part')),
            timeout,
        )
        if not digest.startswith(start):
            raise PretrainedError(
                f'its sha256 begins with {digest[: len(start)]}, and its name says {start}: '
                'it is not kept'
            )
        if not _goes_to_its_end(Path(aside)):
            raise PretrainedError('it was cut off, and its server states the length of the part')
        flush(Path(aside))
        path = folder / f'{digest[:16]}-{name}'
        os.replace(aside, path)
    finally:
        stop.set()
        Path(aside).unlink(missing_ok=True)
    flush(folder)
    return path


def _receive(
    url: str, user: str, descriptor: int, has_hash: bool, timeout: float, stop: threading.Event
) -> str:
    """Writes the body of a response and returns its digest; refuses it if cut off or no weights."""
    request = urllib.request.Request(url, headers={'User-Agent': 'internvl_ds'})
    if user:
        words = base64.b64encode(user.encode()).decode()
        request.add_unredirected_header('Authorization', f'Basic {words}')
    digest, count = hashlib.sha256(), 0
    opener = urllib.request.build_opener(_HttpsOnly)
    with (
        os.fdopen(descriptor, 'w+b', buffering=0) as file,
        opener.open(request, timeout=timeout) as answer,
    ):
        if answer.status != 200:  # a part, or something else in place of it
            raise PretrainedError(
                f'its server answers {answer.status} {answer.reason}, and not 200'
            )
        length = answer.headers.get('Content-Length')
        if length is None and not answer.chunked and not has_hash:
            raise PretrainedError('its server says no length, so a part could pass for the whole')
        room = _SHARE * shutil.disk_usage(torch.hub.get_dir()).free
        while int(length or 0) <= room >= count:
            block = answer.read1(1 << 16)
            if not block or stop.is_set():
                break
            digest.update(block)
            count += file.write(block)
        else:
            raise PretrainedError(
                f'it has {max(int(length or 0), count) / 2**30:.1f} GiB or more, and '
                f'{torch.hub.get_dir()} has room for {room / 2**30:.1f} GiB: free some, or set '
                'TORCH_HOME to a larger disk'
            )
        if length is not None and count != int(length):
            raise PretrainedError(f'it was cut off: {count} of {length} bytes came; try again')
        file.seek(0)
        head = file.read(9)
        # A zip archive, a pickle, or a safetensors header: how every file of weights begins.
        if not head.startswith((b'PK\x03\x04', b'\x80')) and head[8:] != b'{':
            kind = answer.headers.get('Content-Type', 'no type')
            raise PretrainedError(
                f'what came is no file of weights ({kind!r}, {count} bytes): an error or a login '
                'page? It is not kept'
            )
    return digest.hexdigest()


def _goes_to_its_end(path: Path) -> bool:
    """Whether a file that begins as a zip archive or safetensors file is complete."""
    with open_data(path) as file:
        head = file.read(9)
        if not head.endswith(b'{'):
            return not head.startswith(b'PK') or zipfile.is_zipfile(file)
    try:
        with open_safetensors(path):
            return True
    except SafetensorError:
        return False


class _HttpsOnly(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https only, and sends a password to its own host only."""

    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> Any:
        target = urljoin(req.full_url, headers.get('Location', ''))
        if not target.lower().startswith('https://') or '@' in urlsplit(target).netloc:
            raise PretrainedError(f'it is redirected to {redacted(target)}: only https is followed')
        code = 307 if code == 308 else code  # Python 3.10 does not know 308
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is not None and new.host == req.host and req.has_header('Authorization'):
            new.add_unredirected_header('Authorization', req.get_header('Authorization'))
        return new


def _progressing(work: Callable[[], _T], measure: Callable[[], int], timeout: float) -> _T:
    """Runs ``work`` in a thread; abandons it if ``measure`` grows too slowly.

    The limits of sockets do not end a server that sends a byte a second, in a body or a header.
    """
    future: Future[_T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    grows = _growth(measure, timeout)
    while not wait([future], 0.05).done:
        if not next(grows):
            raise PretrainedError(
                f'stalled: less than {_LEAST >> 10} KiB came in {timeout:g} s '
                '(MODEL.DOWNLOAD_TIMEOUT)'
            )
    return future.result()


def _growth(measure: Callable[[], int], timeout: float) -> Iterator[bool]:
    """Whether a measured size grows fast enough; called repeatedly."""
    size, start = measure(), time.monotonic()
    while True:
        now = measure()
        if now >= size + _LEAST:
            size, start = now, time.monotonic()
        yield time.monotonic() < start + timeout


@contextlib.contextmanager
def _turn(folder: Path, timeout: float, measure: Callable[[], int]) -> Iterator[None]:
    """Waits while another process downloads the same file, as long as it makes progress.

    Only a courtesy: two that download at once, as where files cannot be locked, are right as well.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = open_own(folder / 'lock', os.O_RDWR)
            stack.callback(os.close, descriptor)
            grows = _growth(measure, timeout + _GRACE)
            while not (is_held := try_lock(descriptor)):
                if is_held is None:
                    raise OSError('the file system has no locks')
                if not next(grows):
                    _log.warning(f'{folder}: its download by another process stands still')
                    break
                time.sleep(0.1)
        except OSError as error:
            _log.info(f'{folder}: is not locked ({error})')
        yield
