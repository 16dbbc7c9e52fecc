"""One chunk as one safetensors file, read without trusting it.

    header length (8 bytes) | JSON header | token_ids int32 [N] | kv [L, 2, N, H, D]

Any safetensors reader opens these files. They are written and read here because the package's
reader maps the file: a bad sector or a file cut short would then kill the process with SIGBUS, and
the KV could change after it was checked. Its writer hides the error number and needs a second copy.

Shape legend: L layers, N tokens, H KV heads of this rank, D head size.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import struct
from typing import TYPE_CHECKING, NamedTuple

import xxhash

from cacheblend_rag.store.base import ChunkInfo, ChunkKV
from cacheblend_rag.store.files import write_all

if TYPE_CHECKING:
    import torch

FORMAT = "1"

_LENGTH = struct.Struct("<Q")
_LONGEST_HEADER = 4096  # ours are near 400 bytes
_ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
_TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_DTYPES = {f"torch.{name}": dtype for dtype, name in _TORCH_NAMES.items()}
_DAMAGE = {errno.EIO, errno.EISDIR}  # other failures to read are not the file's fault


class DamagedFileError(Exception):
    """The file is not the chunk that was written under this key."""


class ChunkHeader(NamedTuple):
    """Everything in the file but the two tensors' contents."""

    key: str
    base: int
    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]  # [L, 2, N, H, D]
    checksum: str

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.shape[2]

    @property
    def token_bytes(self) -> int:
        """Bytes of token ids."""
        return 4 * self.num_tokens

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]

    @property
    def file_bytes(self) -> int:
        """Bytes of the whole file."""
        return _LENGTH.size + len(self.encode()) + self.token_bytes + self.kv_bytes

    def encode(self) -> bytes:
        """The JSON header, padded so that the tensors start at a multiple of 8."""
        end = self.token_bytes
        content = {
            "__metadata__": {
                "format": FORMAT,
                "key": self.key,
                "base": str(self.base),
                "checksum": self.checksum,
            },
            "token_ids": {"dtype": "I32", "shape": [self.num_tokens], "data_offsets": [0, end]},
            "kv": {
                "dtype": self.dtype,
                "shape": list(self.shape),
                "data_offsets": [end, end + self.kv_bytes],
            },
        }
        text = json.dumps(content, separators=(",", ":")).encode()
        return text + b" " * (-len(text) % 8)


def header_of(key: str, chunk: ChunkKV) -> ChunkHeader:
    """The header of the file that keeps ``chunk`` under ``key``, without its checksum.

    Raises:
        ValueError: the KV has a dtype or shape that cannot be stored.
    """
    kv_L2NHD = chunk.kv_L2NHD
    dtype = _DTYPES.get(str(kv_L2NHD.dtype))
    if dtype is None:
        raise ValueError(f"KV of {kv_L2NHD.dtype} cannot be stored, only of {', '.join(_DTYPES)}")
    shape = tuple(kv_L2NHD.shape)
    if not _is_chunk_shape(shape) or shape[2] != len(chunk.token_ids):
        tokens = len(chunk.token_ids)
        raise ValueError(f"KV of {tokens} tokens must be [L, 2, {tokens}, H, D], not {shape}")
    return ChunkHeader(key, chunk.base, dtype, shape, checksum="0" * 32)


def write_chunk(descriptor: int, key: str, chunk: ChunkKV) -> None:
    """Write ``chunk`` to an empty file.

    Raises:
        OSError: the disk refuses.
    """
    tokens = struct.pack(f"<{len(chunk.token_ids)}i", *chunk.token_ids)
    kv = _bytes_of(chunk.kv_L2NHD.contiguous())
    header = header_of(key, chunk)
    text = header._replace(checksum=_checksum(header, tokens, kv)).encode()
    write_all(descriptor, _LENGTH.pack(len(text)) + text + tokens)
    write_all(descriptor, kv)


def read_chunk(descriptor: int, key: str) -> ChunkKV:
    """The chunk in the file, after every check.

    Raises:
        DamagedFileError: it is not what was written under ``key``.
        OSError: it cannot be read now.
    """
    import torch

    header = _read_header(descriptor, key)
    tokens = bytearray(header.token_bytes)
    kv_L2NHD = torch.empty(header.shape, dtype=getattr(torch, _TORCH_NAMES[header.dtype]))
    kv = _bytes_of(kv_L2NHD)
    _read_into(descriptor, memoryview(tokens))
    _read_into(descriptor, kv)
    if _checksum(header, tokens, kv) != header.checksum:
        raise DamagedFileError("checksum")
    return ChunkKV(_token_ids(tokens), header.base, kv_L2NHD)


def read_info(descriptor: int, key: str) -> ChunkInfo:
    """What the file says of its chunk; leaves the KV unread, so the checksum stays unchecked.

    Raises:
        DamagedFileError: it cannot be a chunk written under ``key``.
        OSError: it cannot be read now.
    """
    header = _read_header(descriptor, key)
    tokens = bytearray(header.token_bytes)
    _read_into(descriptor, memoryview(tokens))
    return ChunkInfo(key, _token_ids(tokens), header.base, header.kv_bytes)


def _read_header(descriptor: int, key: str) -> ChunkHeader:
    """The header, which fits the size of the file; leaves the position at the token ids."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise DamagedFileError("not a file")
    length_field = bytearray(_LENGTH.size)
    _read_into(descriptor, memoryview(length_field))
    (length,) = _LENGTH.unpack(length_field)
    if length > _LONGEST_HEADER:
        raise DamagedFileError("header length")
    text = bytearray(length)
    _read_into(descriptor, memoryview(text))
    header = _decode(bytes(text))
    if header.key != key:
        raise DamagedFileError("another chunk's file")
    if header.file_bytes != found.st_size:
        raise DamagedFileError("file size")
    return header


def _decode(text: bytes) -> ChunkHeader:
    try:
        content = json.loads(text)
        metadata, kv = content["__metadata__"], content["kv"]
        header = ChunkHeader(
            key=metadata["key"],
            base=int(metadata["base"]),
            dtype=kv["dtype"],
            shape=tuple(kv["shape"]),
            checksum=metadata["checksum"],
        )
        # One comparison instead of a check per field: we know the only bytes we would have written.
        intact = _is_chunk_shape(header.shape) and header.encode() == text
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedFileError("header") from error
    if not intact:
        raise DamagedFileError("header")
    return header


def _is_chunk_shape(shape: tuple[int, ...]) -> bool:
    is_positive = all(type(size) is int and size > 0 for size in shape)
    return len(shape) == 5 and shape[1] == 2 and is_positive


def _read_into(descriptor: int, target: memoryview) -> None:
    while target:
        try:
            count = os.readv(descriptor, [target])
        except OSError as error:
            if error.errno in _DAMAGE:
                raise DamagedFileError("unreadable") from error
            raise
        if count == 0:
            raise DamagedFileError("too short")
        target = target[count:]


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    import torch

    return tensor.view(-1).view(torch.uint8).numpy().data


def _token_ids(tokens: bytes | bytearray) -> tuple[int, ...]:
    return struct.unpack(f"<{len(tokens) // 4}i", tokens)


def _checksum(header: ChunkHeader, tokens: bytes | bytearray, kv: memoryview) -> str:
    # dtype and shape too: equal bytes under another shape are other KV.
    digest = xxhash.xxh3_128(repr((header.key, header.base, header.dtype, header.shape)).encode())
    digest.update(tokens)
    digest.update(kv)
    return digest.hexdigest()
