"""Damaged, special and hostile files, made from good ones by a seed.

    python -m tests.harness.hostile --cases 20000 --seed 7      more of test_hostile_files.py

A case is a good file, or a folder of them, and what is done to it: noise in its bytes, something in
its place that is no file, an odd value in its JSON, YAML or pickle (with every checksum made right
again), or a file that somebody wrote to take memory, time or control.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import os
import pickle
import random
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from yacs.config import CfgNode

from internvl_ds.checkpoint.tag.discovery import read_manifest
from internvl_ds.checkpoint.tag.hashing import hash_file
from internvl_ds.checkpoint.tag.manifest import FILE_NAME, Manifest, _with_digest

Harm = Callable[[random.Random, Path], str]


class Code:
    """Pickles as a call that makes a file."""

    def __init__(self, target: Path, how: int) -> None:
        self.target, self.how = str(target), how

    def __reduce__(self) -> Any:
        return [
            (os.system, (f'touch {self.target}',)),
            (exec, (f'open({self.target!r}, "w")',)),
            (subprocess.check_call, (['touch', self.target],)),
            (Path.touch, (Path(self.target),)),
        ][self.how]


# --- noise in the bytes of any file


def flip(r: random.Random, path: Path) -> str:
    data, count = bytearray(path.read_bytes()), r.choice([1, 1, 8, 64])
    for _ in range(count if data else 0):
        data[r.randrange(len(data))] ^= 1 << r.randrange(8)
    path.write_bytes(data)
    return f'{count} bits flipped'


def cut(r: random.Random, path: Path) -> str:
    data = path.read_bytes()
    size = r.choice([0, 1, len(data) - 1, r.randrange(len(data) + 1)])
    path.write_bytes(data[:size])
    return f'cut to {size} bytes'


def extend(r: random.Random, path: Path) -> str:
    more = r.choice([b'\0', b'\n', b' ' * 100, b'}', b'PK\5\6' + bytes(18), r.randbytes(1000)])
    path.write_bytes(path.read_bytes() + more)
    return f'{len(more)} bytes more'


def swap(r: random.Random, path: Path) -> str:
    data = path.read_bytes()
    a, b = sorted((r.randrange(len(data) + 1), r.randrange(len(data) + 1)))
    path.write_bytes(data[b:] + data[a:b] + data[:a])
    return f'parts swapped at {a} and {b}'


def zero(r: random.Random, path: Path) -> str:
    data = bytearray(path.read_bytes())
    start, size = r.randrange(len(data) + 1), r.choice([16, 512, 4096])
    data[start : start + size] = bytes(len(data[start : start + size]))
    path.write_bytes(data)
    return f'zeros at {start}'


def noise(r: random.Random, path: Path) -> str:
    path.write_bytes(r.randbytes(r.choice([1, 100, 5000])))
    return 'noise'


NOISE: tuple[Harm, ...] = (flip, flip, flip, cut, cut, extend, swap, zero, noise)

# --- what is no file, or too much of one


def special(r: random.Random, path: Path) -> str:
    kinds = {
        'a FIFO': os.mkfifo,
        'a link to /dev/zero': lambda p: os.symlink('/dev/zero', p),
        'a link to /dev/urandom': lambda p: os.symlink('/dev/urandom', p),
        'a link to /dev/tty': lambda p: os.symlink('/dev/tty', p),
        'a link to /proc/kmsg': lambda p: os.symlink('/proc/kmsg', p),
        'a link to /proc/self/mem': lambda p: os.symlink('/proc/self/mem', p),
        'a link to nothing': lambda p: os.symlink('/nowhere/at all', p),
        'a link to itself': lambda p: os.symlink(p.name, p),
        'a link to a FIFO': _link_to_fifo,
        'a folder': os.mkdir,
        'a socket': _socket,
        'a sparse file of 1 TB': lambda p: os.truncate(os.open(p, os.O_CREAT | os.O_RDWR), 1 << 40),
        'a sparse file of 5 MB': lambda p: os.truncate(os.open(p, os.O_CREAT | os.O_RDWR), 5 << 20),
        '5 MB of text': lambda p: p.write_text('x' * (5 << 20)),
        '5 MB of lines': lambda p: p.write_text('a\n' * (5 << 19)),
    }
    kind = r.choice(sorted(kinds))
    path.unlink()
    kinds[kind](path)
    return kind


def _link_to_fifo(path: Path) -> None:
    fifo = path.with_name(f'.fifo-{path.name}')
    if not fifo.exists():
        os.mkfifo(fifo)
    path.symlink_to(fifo.name)


def _socket(path: Path) -> None:
    here = os.open('.', os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as bound:  # whose path must be short
        os.chdir(path.parent)
        bound.bind(path.name)
        os.fchdir(here)
    os.close(here)


# --- text

_DEEP: Any = []
for _ in range(300):
    _DEEP = [_DEEP]
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1.5, -0.0, 1 << 63, 1 << 70, 10**400, float('inf'), float('nan'), '',
    'x', 'x' * 100_000, '\x1b[31m\x07', '\u202e', '\ud800', '../../etc/passwd', '/dev/zero', 'a\0b',
    [], {}, [[]], {'': None}, [1, 'a', None], {'of': [], '__internvl_ds__': 'tuple'},
    {'__internvl_ds__': 'dict', 'of': [[[], 1]]}, {'__internvl_ds__': 'x'}, _DEEP,
    '9' * 5000, '1970-01-01', '0001-01-01T00:00:00', -(10**18), [0] * 1000,
)  # fmt: skip
TEXTS: tuple[tuple[str, Callable[[], str]], ...] = (
    ('deep lists', lambda: '[' * 1_000_000),
    ('deep objects', lambda: '{"a":' * 200_000),
    ('many lists', lambda: '[' + '[],' * 2_000_000 + '[]]'),
    ('a long integer', lambda: '1' + '0' * 3_000_000),
    ('10^400', lambda: '1' + '0' * 400),
    ('an empty object', lambda: '{}'),
    ('a list', lambda: '[1, 2]'),
    ('a long text', lambda: json.dumps('x' * 4_000_000)),
    ('one key again and again', lambda: '{' + '"a": 1, ' * 100_000 + '"a": 1}'),
    ('many keys', lambda: json.dumps({str(i): i for i in range(200_000)})),
    ('NUL', lambda: '\0' * 1000),
    ('a BOM', lambda: '\ufeff{}'),
    (
        'aliases of aliases',
        lambda: (
            'a0: &a0 [x, x]\n'
            + ''.join(f'a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n' for i in range(1, 40))
        ),
    ),
    (
        'merges of merges',
        lambda: (
            'a0: &a0 {k: 1}\n'
            + ''.join(f'a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n' for i in range(1, 40))
        ),
    ),
    ('itself', lambda: 'MODEL: &a [*a]'),
    ('no date', lambda: 'OUTPUT: 2001-99-99'),
    ('no integer', lambda: 'SEED: !!int x'),
    ('digits of 60', lambda: 'SEED: 1' + ':1' * 100_000),
    ('code in YAML', lambda: 'OUTPUT: !!python/object/apply:os.system ["touch MARK"]'),
    ('a text that is deep Python', lambda: 'SEED: "' + '-' * 100_000 + '1"'),
    ('brackets', lambda: 'SEED: "' + '(' * 100_000 + '"'),
    ('BASE of itself', lambda: 'BASE: [run.yaml, run.yaml]'),
    ('BASE a number', lambda: 'BASE: 5'),
    ('BASE a folder', lambda: 'BASE: [..]'),
)


def text(r: random.Random, path: Path) -> str:
    what, make = r.choice(TEXTS)
    path.write_text(make().replace('MARK', str(mark_of(path))))
    return what


def mark_of(path: Path) -> Path:
    """What appears where code of a file runs."""
    return Path(os.environ.get('HOSTILE_MARK', path.parent / 'ran'))


def place_in(r: random.Random, tree: Any) -> tuple[Any, Any] | None:
    """A random container inside of nested ones, and a key or index of it."""
    places = []
    level = [tree]
    while level:
        inner = []
        for node in level:
            keys = list(node) if isinstance(node, dict) else range(len(node))
            places += [(node, key) for key in list(keys)[:200]]
            inner += [node[key] for key in keys if isinstance(node[key], dict | list)]
        level = inner
    return r.choice(places) if places else None


def alter(r: random.Random, tree: Any, odd: tuple[Any, ...] = ODD) -> str:
    """Puts an odd value somewhere into nested containers, or takes one out."""
    found = place_in(r, tree)
    if found is None:
        return 'nothing to alter'
    node, key = found
    if r.random() < 0.2:
        del node[key]
        return f'without {key!r}'
    value = r.choice(odd)
    node[key] = copy.deepcopy(value) if isinstance(value, list | dict) else value
    return f'{str(key)[:40]!r} is {repr(value)[:60]}'


def json_altered(r: random.Random, path: Path) -> str:
    lines = path.suffix == '.jsonl'
    content = path.read_text()
    tree = list(map(json.loads, content.splitlines())) if lines else json.loads(content)
    what = alter(r, tree)
    dumped = [json.dumps(t) + '\n' for t in tree] if lines else [json.dumps(tree, indent=1) + '\n']
    path.write_text(''.join(dumped))
    return what


def manifest_altered(r: random.Random, path: Path) -> str:
    """With its own digest right again."""
    tree = json.loads(path.read_text())
    tree.pop('xxh3_128')
    what = alter(r, tree)
    path.write_text(_with_digest(json.dumps(tree, indent=1).removesuffix('\n}')))
    return what


def yaml_altered(r: random.Random, path: Path) -> str:
    tree = yaml.safe_load(path.read_text())
    what = alter(r, tree, tuple(v for v in ODD if v != '\ud800'))
    path.write_text(yaml.safe_dump(tree))
    return what


# --- pickles


def zip_of(data: bytes, path: Path, compress: bool = False, more: bytes = b'') -> None:
    kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, 'w', kind) as archive:
        archive.writestr('archive/data.pkl', data)
        archive.writestr('archive/version', b'3\n')
        archive.writestr('archive/byteorder', more or b'little')


def nested(make: Callable[[Any], Any], levels: int) -> Any:
    value: Any = make(0)
    for _ in range(levels):
        value = make(value)
    return value


def _ops(*parts: bytes) -> bytes:
    return b'\x80\x02' + b''.join(parts) + b'.'


def _doubled(levels: int) -> bytes:
    """bytes whose hex is taken again and again: twice as long each time."""
    text = b'X' + struct.pack('<I', 64) + b'a' * 64
    hexed = b'X' + struct.pack('<I', 3) + b'hex'
    start = b'c_codecs\nencode\n' + text + b'X' + struct.pack('<I', 6) + b'latin1' + b'\x86R'
    again = b'q\x01' + b'0' * 0 + b'c_codecs\nencode\nh\x01' + hexed + b'\x86R'
    return _ops(b'(', start, *[again] * levels, b't')


def _int(value: int) -> bytes:
    data = value.to_bytes(9, 'little')
    return b'\x8a' + bytes([len(data)]) + data


PICKLES: tuple[tuple[str, Callable[[], bytes]], ...] = (
    ('bytearray(6e9)', lambda: _ops(b'c__builtin__\nbytearray\n', _int(6_000_000_000), b'\x85R')),
    ('hex of hex', lambda: _doubled(30)),
    ('a memo of 4 billion', lambda: _ops(b'Nr\xff\xff\xff\x7f')),
    ('BYTEARRAY8', lambda: _ops(b'\x96', struct.pack('<Q', 6_000_000_000))),
    ('three million steps', lambda: _ops(b'N0' * 1_500_000, b'N')),
    ('a list of three million', lambda: _ops(b'](', b'K\x01' * 3_000_000, b'e')),
    ('tuples in tuples as a key', lambda: _ops(b'}', b')', b'q\0h\0\x86' * 60, b'Ns')),
    ('deep tuples as a key', lambda: _ops(b'}', b')', b'\x85' * 200_000, b'Ns')),
    ('deep lists', lambda: _ops(b']' * 100_000, b'a' * 99_999)),
    ('a list of itself', lambda: _ops(b']q\0h\0a')),
    ('a tensor of 10^12', lambda: _ops(b'ctorch\nFloatTensor\n', _int(10**12), b'\x85R')),
    ('a set of a set', lambda: _ops(b'c__builtin__\nset\n]\x85R')),
    ('sys.exit', lambda: _ops(b'csys\nexit\n)R')),
    ('getattr', lambda: _ops(b'c__builtin__\ngetattr\nctorch\nTensor\nX\4\0\0\0load\x86R')),
    ('a storage of nothing', lambda: _ops(b'(X\7\0\0\0storageNNNNtQ')),
    ('nothing', lambda: b''),
    ('only a stop', lambda: b'.'),
    ('None', lambda: _ops(b'N')),
)


def pickled(r: random.Random, path: Path) -> str:
    what, make = r.choice(PICKLES)
    how = r.choice(['zip', 'zip', 'compressed', 'bare', 'a gigabyte beside'])
    if how == 'bare':
        path.write_bytes(make())
    elif how == 'a gigabyte beside':
        zip_of(make(), path, more=bytes(64 << 20))
    else:
        zip_of(make(), path, compress=how == 'compressed')
    return f'{what}, {how}'


def compressed(r: random.Random, path: Path) -> str:
    """The same, packed by a thousand: zeros that are no tensor's."""
    zip_of(_ops(b'X' + struct.pack('<I', 200 << 20) + bytes(200 << 20)), path, compress=True)
    return 'a compressed pickle of 200 MB'


def code(r: random.Random, path: Path) -> str:
    how = r.randrange(4)
    payload = Code(mark_of(path), how)
    tree = torch.load(path, weights_only=False)
    tree = {**tree, 'x': payload} if isinstance(tree, dict) else payload
    if r.random() < 0.3:
        path.write_bytes(pickle.dumps(payload, protocol=r.choice([0, 2, 4])))
    else:
        torch.save(tree, path, _use_new_zipfile_serialization=r.random() < 0.7)
    return f'code, way {how}'


def _shared(levels: int) -> list[tuple[str, Any]]:
    return [
        ('CfgNodes', nested(lambda v: CfgNode({'a': 1}) if v == 0 else _pair(v), levels)),
        ('dicts', nested(lambda v: {'a': v, 'b': v}, levels)),
        ('lists', nested(lambda v: [v, v], levels)),
        ('tuples', nested(lambda v: (v, v), levels)),
    ]


def _pair(value: CfgNode) -> CfgNode:
    node = CfgNode()
    dict.__setitem__(node, 'a', value)
    dict.__setitem__(node, 'b', value)
    return node


def torch_altered(r: random.Random, path: Path) -> str:
    tree = torch.load(path, weights_only=False)
    choice = r.random()
    if choice < 0.3:
        what, value = r.choice(_shared(28))
        tree[r.choice(['config', 'x', *list(map(str, tree))[:5]])] = value
        what = f'2^28 {what}'
    elif choice < 0.4:
        what = 'an expanded tensor'
        tree['module'] = tree['model'] = {'stem.weight': torch.zeros(1).expand(10**10)}
    else:
        tensors = (torch.zeros(0), torch.zeros(3), torch.full((), float('nan')), torch.zeros(2, 2))
        what = alter(r, tree, (*(v for v in ODD if v is not _DEEP), *tensors))
    torch.save(tree, path, _use_new_zipfile_serialization=r.random() < 0.9)
    return what


# --- safetensors


def header_altered(r: random.Random, path: Path) -> str:
    data = path.read_bytes()
    (length,) = struct.unpack('<Q', data[:8])
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    metadata = header.get('__metadata__')
    if r.random() < 0.4 and metadata:
        key = r.choice(sorted(metadata))
        value = r.choice(['', 'x', 'nan', '-1', '[' * 100_000, '{}', '[]', '1e999', '9' * 5000])
        metadata[key], what = value, f'metadata {key} is {value[:40]!r}'
    else:
        what = alter(r, header, tuple(v for v in ODD if v != '\ud800'))
    content = json.dumps(header).encode()
    if r.random() < 0.1:
        content, what = content + b' ' * (20 << 20), f'{what}, 20 MB of spaces'
    size = len(content) if r.random() < 0.9 else r.choice([1 << 62, (1 << 64) - 1, 90 << 20])
    path.write_bytes(struct.pack('<Q', size) + content + rest)
    return what


# --- folders


def entry(r: random.Random, path: Path) -> str:
    """Puts something odd in the place of a tag, beside it, or into it."""
    kind = r.choice(['in its place', 'beside it', 'in it'])
    if kind == 'in its place':
        kept = path.with_name(f'.kept-{path.name}')
        shutil.rmtree(kept, ignore_errors=True)
        path.rename(kept)
        target = path
    elif kind == 'beside it':
        names = [
            'ckpt_epoch_7',
            'ckpt_epoch_\x1b[2Jx',
            b'ckpt_epoch_\xff'.decode(errors='surrogateescape'),
        ]
        target = path.with_name(
            r.choice([*names, 'ckpt_epoch_\u202ex', 'a\nb', 'x.pth', 'metrics'])
        )
    else:
        target = path / r.choice(['x', 'mp_rank_01_model_states.pt', 'a\x1b]0;b\n'])
    target.parent.mkdir(exist_ok=True)
    target.touch()
    what = special(r, target)
    return f'{what} {kind}, as {target.name!r}'


def rehash(tag: Path) -> None:
    """Makes the manifest of a tag right for the files that lie there."""
    manifest = read_manifest(tag)
    assert manifest is not None
    files = {n: hash_file(tag / n) for n in manifest.files if (tag / n).is_file()}
    (tag / FILE_NAME).write_text(Manifest(manifest.header, files).to_text())


def restart_peak() -> int:
    """Begins to count the most memory anew; tells what is in use, bytes."""
    Path('/proc/self/clear_refs').write_text('5')
    return peak()


def peak() -> int:
    """The most memory since `restart_peak`, bytes."""
    status = Path('/proc/self/status').read_text()
    return int(re.search(r'VmHWM:\s+(\d+) kB', status)[1]) << 10  # type: ignore[index]


def main() -> None:
    from tests.harness.ranks import run_ranks

    parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    parser.add_argument('--cases', type=int, default=2000)
    parser.add_argument('--seed', type=int, default=random.randrange(1 << 32))
    parser.add_argument('--stage', type=int, default=1, choices=(1, 2, 3))
    args = parser.parse_args()
    fuzzing = importlib.import_module('tests.whole.fuzzing')  # it imports this module
    with tempfile.TemporaryDirectory() as folder:
        (result,) = run_ranks(
            fuzzing.fuzz, 1, Path(folder), timeout=60 + args.cases,
            root=folder, stage=args.stage, cases=args.cases, seed=args.seed,
        )  # fmt: skip
    print(json.dumps(result, indent=1))
    sys.exit(bool(result['failures']))


if __name__ == '__main__':
    main()
