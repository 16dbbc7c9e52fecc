"""Encryption at rest: AES-256-GCM, the key from the environment.

A sealed chunk, of which an attacker can change nothing unnoticed, nor rename it::

    magic (8 bytes) | length of the head (4) | sealed head | sealed pieces of KV

Each sealed part is nonce (12 bytes) | ciphertext | tag (16), bound to the chunk's key and place.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import struct
from collections.abc import Iterator

from cacheblend_rag.errors import MissingExtraError, StoreError
from cacheblend_rag.store.source import DamagedFileError, Source

VARIABLE = "CACHEBLEND_STORE_KEY"
PIECE = 64 << 20  # bytes of KV sealed at once

_MAGIC = b"CBSEAL01"
_LENGTH = struct.Struct("<I")
_LONGEST_HEAD = 64 << 20
_NONCE, _TAG = 12, 16
_OVERHEAD = _NONCE + _TAG
_MAKE_ONE = f'{VARIABLE}="$(head -c 32 /dev/urandom | base64)"'


class Cipher:
    """Seals and opens with one 32-byte key."""

    def __init__(self, key: bytes) -> None:
        try:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError as error:
            raise MissingExtraError("cryptography", "encryption") from error
        self._aead = AESGCM(key)
        # Names the folder, so that another key finds an empty store instead of a damaged one.
        self.name = hashlib.sha256(b"cacheblend store key" + key).hexdigest()[:8]

    def seal(self, data: bytes | memoryview, place: str) -> bytes:
        """``data`` encrypted, to be opened with the same ``place`` only."""
        nonce = os.urandom(_NONCE)
        return nonce + self._aead.encrypt(nonce, data, place.encode())

    def open(self, sealed: bytes | memoryview, place: str) -> bytes:
        """What was sealed.

        Raises:
            DamagedFileError: it was changed, moved to another place, or sealed with another key.
        """
        from cryptography.exceptions import InvalidTag

        if len(sealed) < _OVERHEAD:
            raise DamagedFileError("seal")
        try:
            return self._aead.decrypt(bytes(sealed[:_NONCE]), sealed[_NONCE:], place.encode())
        except InvalidTag as error:
            raise DamagedFileError("seal") from error


def cipher_from_environment() -> Cipher:
    """The cipher whose key, 32 bytes in base64, stands in the environment.

    Raises:
        StoreError: there is no usable key.
        MissingExtraError: the package cryptography is not installed.
    """
    text = os.environ.get(VARIABLE, "")
    if not text:
        raise StoreError(f"The store is to be encrypted, but {VARIABLE} is not set: {_MAKE_ONE}")
    try:
        key = base64.b64decode(text, validate=True)
    except binascii.Error:
        key = b""
    if len(key) != 32:  # the message must not quote a secret
        raise StoreError(f"{VARIABLE} is not 32 bytes in base64. Make one: {_MAKE_ONE}")
    return Cipher(key)


def sealed_parts(
    cipher: Cipher, key: str, head: bytes, kv: memoryview
) -> Iterator[bytes | memoryview]:
    """The file of a chunk, sealed, in order."""
    sealed = cipher.seal(head, f"{key}/head")
    yield _MAGIC + _LENGTH.pack(len(sealed)) + sealed
    # Each piece is sealed with its key and number: one of another chunk, or of another place in
    # this one, does not open. Pieces are small, so that reading needs no second copy of the whole.
    for number, start in enumerate(range(0, len(kv), PIECE)):
        yield cipher.seal(kv[start : start + PIECE], f"{key}/{number}")


def sealed_bytes(head_bytes: int, kv_bytes: int) -> int:
    """Size of the file that ``sealed_parts`` makes."""
    pieces = -(-kv_bytes // PIECE)
    start = len(_MAGIC) + _LENGTH.size
    return start + head_bytes + kv_bytes + _OVERHEAD * (1 + pieces)


class SealedSource:
    """What was sealed in ``source``, read in order; the KV piece by piece."""

    def __init__(self, source: Source, cipher: Cipher, key: str) -> None:
        self._source, self._cipher, self._key = source, cipher, key
        start = bytearray(len(_MAGIC) + _LENGTH.size)
        source.read_into(memoryview(start))
        (length,) = _LENGTH.unpack(start[len(_MAGIC) :])
        left = source.size - len(start) - length
        if not start.startswith(_MAGIC) or length > _LONGEST_HEAD or left < 0:
            raise DamagedFileError("seal")
        # From the file's size, since the header with the sizes is sealed as well.
        pieces = -(-left // (PIECE + _OVERHEAD))
        self._left, self._piece = left, 0
        self._open = memoryview(self._read(length, "head"))
        self.size = len(self._open) + left - _OVERHEAD * pieces

    def read_into(self, target: memoryview) -> None:
        while target:
            if not self._open:
                self._next()
            count = min(len(target), len(self._open))
            target[:count] = self._open[:count]
            target, self._open = target[count:], self._open[count:]

    def _next(self) -> None:
        length = min(self._left, PIECE + _OVERHEAD)
        if length <= _OVERHEAD:
            raise DamagedFileError("too short")
        self._open = memoryview(self._read(length, str(self._piece)))
        self._left -= length
        self._piece += 1

    def _read(self, length: int, place: str) -> bytes:
        sealed = bytearray(length)
        self._source.read_into(memoryview(sealed))
        return self._cipher.open(memoryview(sealed), f"{self._key}/{place}")
