"""Addresses of weights, and their form without secrets."""

from __future__ import annotations

import os
import re
import string
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from internvl_ds.errors import PretrainedError

BLANK = re.compile(r'[\s\x00-\x1f\x7f]')
# A name that ends as a file does is one.
_REPOSITORY = re.compile(
    r'[\w-][\w.-]*/[\w-][\w.-]*(?<!\.pth)(?<!\.pt)(?<!\.bin)(?<!\.safetensors)'
)
_SCHEME = re.compile(r'(hf-hub:|[a-z][a-z0-9+.-]*://)', re.IGNORECASE)
# Up to the last @ of the host; or of all where what follows the user is no port but a password
# with a slash in it, which no address may have.
_PASSWORD = re.compile(r'://(?:[^/?#\s\'"]*@|[^/\s:@]*:(?!\d*(?:[/?#\s]|$))\S*@)')
_QUERY = re.compile(r'(://[^\s?#\'"<>]*)[?#][^\s\'"<>]*?(?=[:;,.)]*(?:[\s\'"<>]|$))')


def is_address(path: str) -> bool:
    """Whether MODEL.PRETRAINED or MODEL.RESUME names something to download, and not a path."""
    return _SCHEME.match(path) is not None


def repository_at(path: str) -> str | None:
    """The address of ORG/REPO of the hub, as transformers takes it; None for any other path."""
    named = _REPOSITORY.fullmatch(path) and not os.path.exists(path)
    return f'hf-hub:{path}' if named else None


def redacted(text: str) -> str:
    """A text without the secrets in its addresses: user, password, and all after a question mark.

    Whatever is logged, raised or saved with an address in it goes through this or `shown`.
    """
    return _QUERY.sub(r'\1?...', _PASSWORD.sub('://', text))


def shown(address: str) -> str:
    """An address or a path, `redacted`; nothing of an address with a blank in it."""
    if is_address(address) and BLANK.search(address):
        return 'an address with a blank in it'
    return redacted(address)


def split_address(address: str) -> tuple[str, str]:
    """Splits an https address: the address without user, password and fragment; ``user:password``.

    Letters that an address may not have are percent-encoded, as browsers do.

    Raises PretrainedError where it is none; nothing of it is in the text.
    """
    parts = urlsplit(address)
    try:
        usable = bool(parts.hostname) and parts.port != 0
    except ValueError:  # its text would show what follows the colon
        usable = False
    if not usable or BLANK.search(address):
        raise PretrainedError('is no valid address (a password in one is percent-encoded)')
    if parts.scheme.lower() == 'http':
        raise PretrainedError('plain http can be altered on its way; use https')
    if parts.scheme.lower() != 'https':
        raise PretrainedError(f'nothing is downloaded from {parts.scheme}; use https')
    user, _, host = parts.netloc.rpartition('@')
    path, query = (quote(part, string.punctuation) for part in (parts.path, parts.query))
    return urlunsplit(('https', host, path, query, '')), unquote(user)
