"""One chunk as one safetensors file, read without trusting it.

    header length (8 bytes) | JSON header | token_ids int32 [N] | kv [L, 2, N, H, D]

or, stored in eight bits, with what each head's keys and values were divided by::

    header length (8 bytes) | JSON header | token_ids int32 [N] | scales float32 [L, 2, H] | kv

Any safetensors reader opens these files. They are written and read here because the package's
reader maps the file: a bad sector or a file cut short would then kill the process with SIGBUS, and
the KV could change after it was checked. Its writer hides the error number and needs a second copy.

Models of multi-head latent attention keep one row a token: there 2 is 1.

Shape legend: L layers, N tokens, H KV heads (all of the model's), D head size.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import xxhash

from cacheblend_rag.keys import FORMAT
from cacheblend_rag.store.base import ChunkInfo, ChunkKV
from cacheblend_rag.store.host import empty
from cacheblend_rag.store.seal import Cipher, SealedSource, sealed_bytes, sealed_parts
from cacheblend_rag.store.source import DamagedFileError, Source

if TYPE_CHECKING:
    import torch

__all__ = ["ChunkHeader", "DamagedFileError", "Encoding", "decode", "decode_info", "encode"]

FP8 = "F8_E4M3"

_LENGTH = struct.Struct("<Q")
_LONGEST_HEADER = 4096  # ours are near 400 bytes
_MOST_TOKENS = 1 << 22
LARGEST = 16 << 30  # bytes of a chunk; what a file declares is not allocated before it is believed
_ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, FP8: 1}
_TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_DTYPES = {f"torch.{name}": dtype for dtype, name in _TORCH_NAMES.items()}
_LARGEST_FP8 = 448.0


class Encoding(NamedTuple):
    """How a store writes its chunks."""

    fp8: bool = False  # KV in eight bits, rounded: half the bytes
    cipher: Cipher | None = None  # encrypted

    @property
    def suffix(self) -> str:
        """What files end in."""
        return ".safetensors" if self.cipher is None else ".sealed"

    @property
    def folder_suffix(self) -> str:
        """Keeps what is written differently apart: the same key would name different bytes."""
        sealed = "" if self.cipher is None else f"-sealed-{self.cipher.name}"
        return ("-fp8" if self.fp8 else "") + sealed


class ChunkHeader(NamedTuple):
    """Everything in the file but the tensors' contents."""

    key: str
    base: int
    dtype: str  # of the KV that is handed out, as safetensors spells it
    shape: tuple[int, ...]  # [L, 2, N, H, D]
    checksum: str
    stored: str  # the dtype it is stored in: the same, or FP8

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.shape[2]

    @property
    def token_bytes(self) -> int:
        """Bytes of token ids."""
        return 4 * self.num_tokens

    @property
    def scales_shape(self) -> tuple[int, int, int]:
        """[L, 2, H], of latents [L, 1, H]."""
        return (self.shape[0], self.shape[1], self.shape[3])

    @property
    def scale_bytes(self) -> int:
        """Bytes of scales."""
        return 4 * math.prod(self.scales_shape) if self.stored == FP8 else 0

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV, as stored."""
        return math.prod(self.shape) * _ITEM_BYTES[self.stored]

    @property
    def head_bytes(self) -> int:
        """Bytes before the KV."""
        return _LENGTH.size + len(self.encode()) + self.token_bytes + self.scale_bytes

    @property
    def file_bytes(self) -> int:
        """Bytes of the whole file, if it is not sealed."""
        return self.head_bytes + self.kv_bytes

    def encode(self) -> bytes:
        """The JSON header, padded so that the tensors start at a multiple of 8."""
        metadata = {
            "format": str(FORMAT),
            "key": self.key,
            "base": str(self.base),
            "checksum": self.checksum,
        }
        end = self.token_bytes
        content: dict[str, Any] = {"__metadata__": metadata}
        content["token_ids"] = _tensor("I32", (self.num_tokens,), 0, end)
        if self.stored != self.dtype:
            metadata["dtype"] = self.dtype
            scales_end = end + self.scale_bytes
            content["scales"] = _tensor("F32", self.scales_shape, end, scales_end)
            end = scales_end
        content["kv"] = _tensor(self.stored, self.shape, end, end + self.kv_bytes)
        text = json.dumps(content, separators=(",", ":")).encode()
        return text + b" " * (-len(text) % 8)


def _tensor(dtype: str, shape: tuple[int, ...], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def header_of(key: str, chunk: ChunkKV, *, fp8: bool = False) -> ChunkHeader:
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
    return ChunkHeader(key, chunk.base, dtype, shape, "0" * 32, FP8 if fp8 else dtype)


def possible_sizes(key: str, chunk: ChunkKV, encoding: Encoding) -> set[int]:
    """Bytes that the file of ``chunk`` may have: in eight bits only what is finite is stored."""
    headers = [header_of(key, chunk)]
    if encoding.fp8:
        headers.append(header_of(key, chunk, fp8=True))
    if encoding.cipher is None:
        return {header.file_bytes for header in headers}
    return {sealed_bytes(header.head_bytes, header.kv_bytes) for header in headers}


def encode(key: str, chunk: ChunkKV, encoding: Encoding) -> Iterator[bytes | memoryview]:
    """The file of ``chunk`` under ``key``, in order.

    Raises:
        ValueError: the KV has a dtype or shape that cannot be stored.
    """
    header = header_of(key, chunk)
    kv_L2NHD, scales = chunk.kv_L2NHD.contiguous(), b""
    if encoding.fp8 and (small := _quantized(kv_L2NHD)) is not None:
        kv_L2NHD, scales_L2H = small
        header, scales = header._replace(stored=FP8), bytes(_bytes_of(scales_L2H))
    tokens = struct.pack(f"<{len(chunk.token_ids)}i", *chunk.token_ids)
    kv = _bytes_of(kv_L2NHD)
    text = header._replace(checksum=_checksum(header, tokens + scales, kv)).encode()
    head = _LENGTH.pack(len(text)) + text + tokens + scales
    if encoding.cipher is None:
        yield head
        yield kv
    else:
        yield from sealed_parts(encoding.cipher, key, head, kv)


def decode(source: Source, key: str, cipher: Cipher | None = None) -> ChunkKV:
    """The chunk in ``source``, after every check.

    Raises:
        DamagedFileError: it is not what was written under ``key``.
        OSError: it cannot be read now.
    """
    import torch

    header, source = _read_header(source, key, cipher)
    rest = bytearray(header.token_bytes + header.scale_bytes)
    is_small = header.stored == FP8
    dtype = torch.float8_e4m3fn if is_small else getattr(torch, _TORCH_NAMES[header.dtype])
    # eight bits are widened afterwards: only what is handed out is worth page-locking
    if is_small:
        kv_L2NHD = torch.empty(header.shape, dtype=dtype)
    else:
        kv_L2NHD = empty(header.shape, dtype, at=header.head_bytes)
    kv = _bytes_of(kv_L2NHD)
    source.read_into(memoryview(rest))
    source.read_into(kv)
    if _checksum(header, rest, kv) != header.checksum:
        raise DamagedFileError("checksum")
    tokens, scales = rest[: header.token_bytes], rest[header.token_bytes :]
    if is_small:
        scales_L2H = torch.frombuffer(scales, dtype=torch.float32).view(header.scales_shape)
        kv_L2NHD = _widened(kv_L2NHD, scales_L2H, getattr(torch, _TORCH_NAMES[header.dtype]))
    chunk = ChunkKV(_token_ids(tokens), header.base, kv_L2NHD)
    # A checksum shows that these are the bytes that were written, by whomever. One NaN would spoil
    # every answer that reads it.
    if not chunk.is_finite:
        raise DamagedFileError("KV that is not finite")
    return chunk


def decode_info(source: Source, key: str, cipher: Cipher | None = None) -> ChunkInfo:
    """What ``source`` says of its chunk; leaves the KV unread, so the checksum stays unchecked.

    Raises:
        DamagedFileError: it cannot be a chunk written under ``key``.
        OSError: it cannot be read now.
    """
    header, source = _read_header(source, key, cipher)
    tokens = bytearray(header.token_bytes)
    source.read_into(memoryview(tokens))
    return ChunkInfo(key, _token_ids(tokens), header.base, header.kv_bytes)


def _read_header(source: Source, key: str, cipher: Cipher | None) -> tuple[ChunkHeader, Source]:
    """The header, which fits the size of the source, and the source behind it."""
    if cipher is not None:
        source = SealedSource(source, cipher, key)
    length_field = bytearray(_LENGTH.size)
    source.read_into(memoryview(length_field))
    (length,) = _LENGTH.unpack(length_field)
    if length > _LONGEST_HEADER:
        raise DamagedFileError("header length")
    text = bytearray(length)
    source.read_into(memoryview(text))
    header = _decode(bytes(text))
    # A file that was renamed, or put under another key by whoever can write there, is not this
    # chunk.
    if header.key != key:
        raise DamagedFileError("another chunk's file")
    # Before anything of its size is allocated: what a header declares must be there.
    if header.file_bytes != source.size:
        raise DamagedFileError("file size")
    return header, source


def _decode(text: bytes) -> ChunkHeader:
    try:
        content = json.loads(text)
        metadata, kv = content["__metadata__"], content["kv"]
        header = ChunkHeader(
            key=metadata["key"],
            base=int(metadata["base"]),
            dtype=metadata.get("dtype", kv["dtype"]),
            shape=tuple(kv["shape"]),
            checksum=metadata["checksum"],
            stored=kv["dtype"],
        )
        # One comparison instead of a check per field: we know the only bytes we would have written.
        intact = _is_possible(header) and header.encode() == text
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedFileError("header") from error
    if not intact:
        raise DamagedFileError("header")
    return header


def _is_possible(header: ChunkHeader) -> bool:
    fits = header.dtype in _TORCH_NAMES and header.stored in (header.dtype, FP8)
    return fits and _is_chunk_shape(header.shape)


def _is_chunk_shape(shape: tuple[int, ...]) -> bool:
    is_positive = all(type(size) is int and size > 0 for size in shape)
    if len(shape) != 5 or shape[1] not in (1, 2) or not is_positive:
        return False
    return shape[2] <= _MOST_TOKENS and math.prod(shape) <= LARGEST


def _quantized(kv_L2NHD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """KV over its scales [L, 2, H], in eight bits; None where it holds what is not finite.

    A scale for each head's keys and one for its values: rotation leaves a head's range as it is,
    so they fit rotated keys too, which a scale for each channel would not.
    """
    import torch

    small_L2NHD = torch.empty_like(kv_L2NHD, dtype=torch.float8_e4m3fn)
    scales = []
    for kv_2NHD, out_2NHD in zip(kv_L2NHD, small_L2NHD, strict=True):
        wide_2NHD = kv_2NHD.float()
        scale_2H = wide_2NHD.abs().amax(dim=(1, 3)) / _LARGEST_FP8
        if not bool(scale_2H.isfinite().all()):
            return None
        scale_2H = scale_2H.clamp(min=torch.finfo(torch.float32).tiny)
        # Clamped, since rounding may pass the largest number, which this format has no infinity
        # for.
        scaled = (wide_2NHD / scale_2H[:, None, :, None]).clamp(-_LARGEST_FP8, _LARGEST_FP8)
        out_2NHD.copy_(scaled)
        scales.append(scale_2H)
    return small_L2NHD, torch.stack(scales)


def _widened(
    small_L2NHD: torch.Tensor, scales_L2H: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    kv_L2NHD = empty(small_L2NHD.shape, dtype)
    # A layer at a time: the whole in float32 would take four times the bytes that were stored.
    for small_2NHD, scale_2H, out_2NHD in zip(small_L2NHD, scales_L2H, kv_L2NHD, strict=True):
        out_2NHD.copy_(small_2NHD.float() * scale_2H[:, None, :, None])
    return kv_L2NHD


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    import torch

    return tensor.view(-1).view(torch.uint8).numpy().data


def _token_ids(tokens: bytes | bytearray) -> tuple[int, ...]:
    return struct.unpack(f"<{len(tokens) // 4}i", tokens)


def _checksum(header: ChunkHeader, tokens: bytes | bytearray, kv: memoryview) -> str:
    # dtype and shape too: equal bytes under another shape are other KV.
    meaning = [header.key, header.base, header.dtype, header.shape]
    if header.stored != header.dtype:
        meaning.append(header.stored)
    digest = xxhash.xxh3_128(repr(tuple(meaning)).encode())
    digest.update(tokens)
    digest.update(kv)
    return digest.hexdigest()
