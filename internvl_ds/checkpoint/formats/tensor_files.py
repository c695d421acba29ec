"""Opens PyTorch and safetensors files as data: no code runs, and memory is bounded by file size.

A small file may ask for much when it is read: a compressed entry, a call that makes bytes of any
number, values that contain each other. All of that is refused before, or while, it is read; with
the errors of `internvl_ds.files.reading`, or of the library.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import pickletools
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from internvl_ds.checkpoint.formats.allowed import allowing
from internvl_ds.files.reading import Unreadable, open_data, require_bounded

SAFETENSORS_DTYPES = {
    torch.float64: 'F64', torch.float32: 'F32', torch.float16: 'F16', torch.bfloat16: 'BF16',
    torch.int64: 'I64', torch.int32: 'I32', torch.int16: 'I16', torch.int8: 'I8',
    torch.uint8: 'U8', torch.bool: 'BOOL', torch.complex64: 'C64', torch.uint16: 'U16',
    torch.uint32: 'U32', torch.uint64: 'U64', torch.float8_e4m3fn: 'F8_E4M3',
    torch.float8_e5m2: 'F8_E5M2',
}  # fmt: skip
_ZIP_MAGIC = b'PK\x03\x04'
_LOCAL_HEADER = struct.Struct('<26xHH')
# The largest pickle of a file, its steps (50,000 tensors have so many), the largest header.
_PICKLE_BYTES, _PICKLE_STEPS, _HEADER_BYTES = 32 << 20, 1_500_000, 8 << 20
# How far tensors may repeat memory (expanded ones do), beyond the size of their file.
_REPEATED_BYTES = 64 << 20
# The weight of a tuple is that of its items, and 1.25 times that of the heaviest: a limit of both
# size and depth, which the hash of a tuple goes through each time.
_TUPLE_WEIGHT, _PER_LEVEL = 1e6, 1.25
# How many bytes follow an operation of a pickle; negative: in how many bytes their number stands.
# torch reads no other operations as data.
_WIDTHS = {
    **dict.fromkeys(b'\x81Rbaesu(t\x85\x86\x87N\x89\x88)]}\x8fQ.', 0),
    **dict.fromkeys(b'Khq\x80', 1), ord('M'): 2, **dict.fromkeys(b'Jjr', 4),
    ord('G'): 8, ord('U'): -1, 0x8A: -1, ord('X'): -4,
}  # fmt: skip


def load_torch(path: Path | str, *, mapped: bool | None = None) -> Any:
    """`torch.load` on the CPU, of what `allowed` lists.

    ``mapped``: whether tensors are mapped; by default where they can be (files since torch 1.6).
    """
    with open_data(path) as file:
        size = os.fstat(file.fileno()).st_size
        if not size:  # /proc has such files, and some keep a reader waiting
            raise Unreadable('is empty')
        is_zip = _require_bounded_pickle(file)
    with allowing():
        content = torch.load(
            path, map_location='cpu', weights_only=True, mmap=is_zip if mapped is None else mapped
        )
    tensors_by_id = {id(v): v for v in require_bounded(content) if isinstance(v, torch.Tensor)}
    tensors = [t for t in tensors_by_id.values() if t.layout is torch.strided]
    # To copy an expanded tensor would make all of it.
    surplus = sum(max(0, t.numel() * t.itemsize - t.untyped_storage().nbytes()) for t in tensors)
    if surplus > size + _REPEATED_BYTES:
        raise Unreadable(f'has tensors of {surplus} bytes more than it holds')
    return content


@contextmanager
def open_safetensors(path: Path | str) -> Iterator[Any]:
    """`safetensors.safe_open`, after a check of the header's size."""
    with open_data(path) as file:
        length = int.from_bytes(file.read(8) or b'', 'little')
        if not length or length > min(_HEADER_BYTES, os.fstat(file.fileno()).st_size):
            raise Unreadable(f'its header has {length} bytes, and up to {_HEADER_BYTES} are read')
    with safe_open(path, 'pt') as tensors:
        yield tensors


def safetensors_header(
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str]
) -> bytes:
    """The header of a file; the tensors' bytes follow it, one after another.

    It is 8 bytes of length and JSON. The same arguments give the same bytes.

    Args:
        tensors: name -> dtype and shape, in the order of their bytes.
        metadata: text only.
    """
    header: dict[str, Any] = {'__metadata__': dict(metadata)}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + math.prod(shape) * dtype.itemsize
        kind = SAFETENSORS_DTYPES[dtype]
        header[name] = {'dtype': kind, 'shape': list(shape), 'data_offsets': [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    return struct.pack('<Q', len(text)) + text


def load_safetensors(path: Path | str) -> dict[str, torch.Tensor]:
    """All tensors of a file, mapped."""
    with open_safetensors(path) as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118


def _require_bounded_pickle(file: Any) -> bool:
    """Refuses a file that unpacks to more bytes than it has; returns whether it is a zip."""
    is_zip = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
    if is_zip:
        require_bounded_steps(_pickle_of_zip(file))
    else:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            start = 0
            for _ in range(5):  # magic, version, the system's sizes, the object, names of storages
                before, start = start, require_bounded_steps(mapped, start)
                if start == before:
                    break
    return is_zip


def pickle_of(file: Any) -> bytes:
    """The pickle in a file of torch.save, for an unpickler that takes any operation and number.

    Raises:
        Unreadable: where it is out of proportion.
        ValueError: where torch would not read it as data.
        zipfile.BadZipFile: where it is no zip.
    """
    data = _pickle_of_zip(file)
    if not require_bounded_steps(data):
        raise ValueError('is no pickle that is read as data')
    return data


def _pickle_of_zip(file: Any) -> bytes:
    """The pickle in an archive of torch.save, which compresses nothing."""
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if archive.comment:
            raise Unreadable('its archive has a comment, which torch.save never writes')
    wrong = next((e for e in entries if e.compress_type != zipfile.ZIP_STORED), None)
    if wrong is not None:
        raise Unreadable(
            f'{wrong.filename} in it is compressed, and says that it has {wrong.file_size} bytes'
        )
    total = sum(e.file_size for e in entries)
    if total > size:
        raise Unreadable(f'its entries say that they have {total} bytes, and the file has {size}')
    rest = sum(e.file_size for e in entries if '/data/' not in e.filename)
    if rest > _PICKLE_BYTES:
        raise Unreadable(f'has {rest} bytes beside its tensors, of {_PICKLE_BYTES} at most')
    entry = next((e for e in entries if e.filename.endswith('/data.pkl')), None)
    if entry is None:
        raise Unreadable('has no data.pkl in it')
    # Read as it lies there: our own files have no CRC, which zipfile would look at.
    file.seek(entry.header_offset)
    name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    file.seek(name + extra, os.SEEK_CUR)
    return file.read(entry.file_size)


# How many values an operation takes (-1: down to a mark), and how many it leaves.
_EFFECTS = {
    ord(op.code): (
        -1 if pickletools.markobject in op.stack_before else len(op.stack_before),
        len(op.stack_after),
    )
    for op in pickletools.opcodes
}


def require_bounded_steps(data: Any, start: int = 0) -> int:
    """Walks a pickle's operations without executing them; refuses one of unbounded cost.

    Returns:
        Where it ends: for what torch would not read as data, or is cut off, ``start``.

    Raises:
        Unreadable: for too many steps, names of values out of order, or tuples in tuples.
    """
    at, steps = start, 0
    stack: list[float] = []
    marks: list[list[float]] = []
    names: dict[int, float] = {}
    try:
        while True:
            op = data[at]
            width, steps, at = _WIDTHS.get(op), steps + 1, at + 1
            if steps > _PICKLE_STEPS:
                raise Unreadable(f'takes more than {_PICKLE_STEPS} steps to read')
            if op == 0x63:  # GLOBAL: two lines
                at = data.find(b'\n', data.find(b'\n', at) + 1) + 1
                if at == 0:
                    return start
                stack.append(1.0)
                continue
            if width is None:
                return start
            if width < 0:
                at, width = at - width, int.from_bytes(data[at : at - width], 'little')
            argument, at = data[at : at + 4 if op in b'rj' else at + 1], at + width
            if op == 0x28:  # MARK
                marks.append(stack)
                stack = []
            elif op in b'qr':  # PUT
                name = int.from_bytes(argument, 'little')
                if name > _PICKLE_STEPS:
                    raise Unreadable(f'numbers a value {name}, after {steps} steps')
                names[name] = stack[-1]
            elif op in b'hj':  # GET
                stack.append(names[int.from_bytes(argument, 'little')])
            else:
                takes, leaves = _EFFECTS[op]
                if takes < 0:
                    items, stack = stack, marks.pop()
                    if leaves and op != 0x74:  # the container below the mark
                        stack.pop()
                else:
                    items = stack[len(stack) - takes :]
                    del stack[len(stack) - takes :]
                weight = 1.0
                if op in b't\x85\x86\x87' and items:
                    weight = 1 + max(sum(items), _PER_LEVEL * max(items))
                    if weight > _TUPLE_WEIGHT:
                        raise Unreadable('holds tuples in tuples without measure')
                stack += [weight] * leaves
                if op == 0x2E:  # STOP
                    return at
    except (IndexError, KeyError, ValueError) as error:
        if isinstance(error, Unreadable):
            raise
        return start  # cut off or damaged: torch says how
