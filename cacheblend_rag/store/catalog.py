"""A store folder's files and its index, kept in step.

A file comes before its entry and goes after it, so a process that dies in between leaves a file
that the next one to open the store adopts, or an entry whose file is gone, which it drops.
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from cacheblend_rag.store.base import Changes, ChunkInfo
from cacheblend_rag.store.chunk_file import Encoding, decode_info
from cacheblend_rag.store.database import BusyError
from cacheblend_rag.store.evict import Policy, recompute_cost
from cacheblend_rag.store.files import entries, is_abandoned, is_no_file, remove_abandoned
from cacheblend_rag.store.index import Index, Limits, Mark
from cacheblend_rag.store.index_rows import Content, Victim
from cacheblend_rag.store.marker import VERSION
from cacheblend_rag.store.parallel import Readers
from cacheblend_rag.store.seal import Cipher
from cacheblend_rag.store.source import DamagedFileError, FileSource

NAMESPACE = re.compile("[a-z0-9-]{1,130}")

_CHUNK_NAME = re.compile(r"([0-9a-f]{64})\.(?:safetensors|sealed)")
_CORRUPT_NAME = re.compile(r"[0-9a-f]{64}\.corrupt-[0-9]+")
_MOST_PENDING = 1000  # uses to be counted
_BATCH = 500  # files adopted in one transaction
_KEPT_CORRUPT = 16  # of each namespace, for whoever wants to know what happened
_CORRUPT_SHARE = 8  # of the capacity, at most
_UNLIMITED = 1 << 62
_SEALED = "-sealed-"


class Recovery(NamedTuple):
    """What opening found that a clean end would not have left."""

    temporaries: int = 0  # of writers that died, removed
    adopted: int = 0  # files that the index did not know, added to it
    vanished: int = 0  # entries of the index whose file is gone, dropped
    index_rebuilt: bool = False  # it was damaged; notes on use and documents are lost


class Catalog:
    """The files of ``namespace`` below ``<folder>/v3``, and the index of all namespaces there."""

    def __init__(
        self, folder: Path, namespace: str, encoding: Encoding, policy: Policy | None
    ) -> None:
        self._root, self._namespace, self._encoding = folder / VERSION, namespace, encoding
        self.index = Index(folder, policy, self._fill)
        self._pending = deque[bytes](maxlen=_MOST_PENDING)
        self._settler = Readers(1)
        self._corrupt: dict[str, int] = {}  # bytes set aside, by namespace

    def path(self, key: str) -> Path:
        """Where the file of a chunk is, or would be."""
        return self._place(self._namespace, key)

    # ---- entries -------------------------------------------------------------------------------

    def note(self, info: ChunkInfo, nbytes: int, *, is_new: bool) -> bool:
        """Enter a chunk put just now, whose file has ``nbytes``, or count a use of one that was
        there; False where that file is gone again.
        """
        self._settle(soon=False)
        entry = self._entry(self._namespace, info, nbytes)
        return self.index.put(self._namespace, *entry, self._is_gone, is_new=is_new)

    def drop(
        self, documents: Collection[bytes], only: Collection[bytes] | None = None
    ) -> list[str]:
        """Forget documents, or of their keys these, and erase the chunks that no other one consists
        of: their keys.
        """
        self._settle(soon=False)
        keys = self.index.drop(self._namespace, documents, only, lambda key: self.erase(key.hex()))
        return [key.hex() for key in keys]

    def erase(self, key: str) -> None:
        """Remove the file of a chunk, and what was set aside or left unfinished of it."""
        path = self.path(key)
        # Whoever forgets a text wants it gone, and a damaged or unfinished copy holds its token ids
        # as well.
        for entry in entries(path.parent):
            if entry.name.startswith((f"{key}.corrupt-", f".{key}.")):
                is_left = not entry.name.startswith(".") or is_abandoned(entry.path)
                with contextlib.suppress(FileNotFoundError):
                    if is_left:
                        os.unlink(entry.path)
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):  # a folder is no chunk
            path.unlink()

    def note_later(self, key: str) -> None:
        """Count a use, or that the file is gone. Waits for no one: who reads has no time."""
        self._pending.append(bytes.fromhex(key))
        if not self._settler.backlog:
            self._settler.start(self._settle_all, [None])

    def note_soon(self, key: str) -> None:
        """Count a use, or that the file is gone; later, where another process writes."""
        self._pending.append(bytes.fromhex(key))
        self.settle()
        if self._pending:
            self.note_later(key)

    def settle(self) -> None:
        """Write what was to be noted, unless that would mean to wait."""
        with contextlib.suppress(BusyError):
            self._settle(soon=True)

    def infos(self, after: int) -> Iterator[tuple[int, ChunkInfo]]:
        """The chunks whose file is there, with the numbers of their entries, from ``after`` on."""
        missing = self._reconcile(self._namespace)[0]
        # Entries tell without opening a file. Only where they are damaged, files are read.
        yield from self._of_contents(missing, after)
        if not after and self._adopt(self._namespace, missing):  # their entries are damaged
            yield from self._of_contents(missing, 0)

    def _of_contents(self, missing: set[bytes], after: int) -> Iterator[tuple[int, ChunkInfo]]:
        for number, content in self.index.contents(self._namespace, after):
            if content.key in missing and (info := self._info(content)) is not None:
                missing.discard(content.key)
                yield number, info

    def changes(self, since: object) -> Changes:
        """What came and went since, by any process."""
        # The mark comes first: what is stored during the rest is listed twice rather than never.
        mark = self.index.mark()
        gone = self.index.gone(self._namespace, since) if isinstance(since, Mark) else None
        if gone is None or not isinstance(since, Mark):
            return Changes(mark, whole=True)
        contents = self.index.contents(self._namespace, since.chunk)
        added = [info for _, content in contents if (info := self._info(content)) is not None]
        return Changes(mark, added, [key.hex() for key in gone])

    def make_room(
        self, key: str, nbytes: int, cost: float, limits: Limits, pinned: Collection[bytes]
    ) -> Counter[str] | None:
        """Remove what has to leave for a new chunk: how many, by namespace; None where the new one
        stays out.
        """
        # Uses that wait come first: what leaves is chosen by them.
        self._settle(soon=False)
        raw, limits = bytes.fromhex(key), self._without_corrupt(limits)
        # Sizes in the index may be wrong, after damage or another's hand. Nothing may leave for
        # that.
        if self.index.is_over(limits, self._namespace):  # which it can hardly be
            self.measure()
        victims = self.index.make_room(self._namespace, raw, nbytes, cost, limits, pinned)
        return None if victims is None else self._unlink(victims)

    def trim(self, limits: Limits) -> Counter[str]:
        """Remove what is over the limits: how many, by namespace."""
        self._settle(soon=False)
        limits = self._without_corrupt(limits)
        if not self.index.is_over(limits, self._namespace):
            return Counter()
        sizes = self.measure()
        victims = self.index.surplus(limits.namespace, sizes, self._namespace)
        return self._unlink(victims) + self._unlink(self.index.surplus(limits.folder, sizes))

    def measure(self) -> dict[tuple[str, bytes], int]:
        """Take the sizes of all chunks from their files: the index may be wrong about them. They
        are returned, by namespace and key.
        """
        all_sizes: dict[tuple[str, bytes], int] = {}
        for namespace in entries(self._root):
            if NAMESPACE.fullmatch(namespace.name):
                sizes: dict[bytes, int] = {}
                for key in self._names(namespace.name):
                    with contextlib.suppress(OSError):  # gone since it was listed
                        sizes[key] = os.stat(self._place(namespace.name, key.hex())).st_size
                self.index.measure(namespace.name, sizes)
                all_sizes |= {(namespace.name, key): size for key, size in sizes.items()}
        return all_sizes

    # ---- files ---------------------------------------------------------------------------------

    def all_keys(self) -> list[str]:
        """Keys of the namespace by their files."""
        return sorted(key.hex() for key in self._names(self._namespace))

    def discard_corrupt(self) -> int:
        """Remove what was set aside in the namespace: how many."""
        self._corrupt.pop(self._namespace, None)
        return _drop_corrupt(self._root / self._namespace, keep=0)[0]

    def bound_corrupt(self, limits: Limits) -> None:
        """Keep little of what was set aside in the namespace, which counts as held."""
        most = min(limit // _CORRUPT_SHARE for limit in (*limits, _UNLIMITED) if limit is not None)
        _, left = _drop_corrupt(self._root / self._namespace, keep=_KEPT_CORRUPT, most=most)
        self._corrupt[self._namespace] = left

    def _without_corrupt(self, limits: Limits) -> Limits:
        folder, namespace = limits
        return Limits(
            None if folder is None else max(folder - sum(self._corrupt.values()), 0),
            None if namespace is None else namespace - self._corrupt.get(self._namespace, 0),
        )

    def close(self) -> None:
        """Write what is to be noted, and close the index."""
        self._settler.close()
        self.settle()
        self.index.close()

    def recover(self) -> Recovery:
        """Put in order what processes that died left, in all namespaces."""
        removed = adopted = vanished = 0
        for namespace in entries(self._root):
            for shard in entries(namespace.path):
                removed += remove_abandoned(shard.path)
            if NAMESPACE.fullmatch(namespace.name):
                _, more, fewer = self._reconcile(namespace.name)
                adopted, vanished = adopted + more, vanished + fewer
                _, left = _drop_corrupt(namespace.path, keep=_KEPT_CORRUPT)
                self._corrupt[namespace.name] = left
        return Recovery(removed, adopted, vanished, self.index.rebuilt)

    def _settle_all(self, _: None) -> None:
        self._settle(soon=False)

    def _settle(self, *, soon: bool) -> None:
        if self._pending:
            self.index.settle(self._namespace, self._pending, self._is_gone, soon=soon)

    def _is_gone(self, key: bytes) -> bool:
        return not self.path(key.hex()).exists()

    def _fill(self) -> None:
        """Enter what the index may lack."""
        for namespace in entries(self._root):
            if NAMESPACE.fullmatch(namespace.name):
                self._reconcile(namespace.name)

    def _reconcile(self, namespace: str) -> tuple[set[bytes], int, int]:
        """Make the index agree with the files: the keys there, numbers of adopted and dropped."""
        there, known = self._names(namespace), self.index.keys(namespace)
        vanished = 0
        if gone := known - there:
            # Asked again, file by file: a chunk may have been put since the names were listed.
            vanished = self.index.remove_if(
                namespace, gone, lambda key: not self._place(namespace, key.hex()).exists()
            )
        return there, self._adopt(namespace, there - known), vanished

    def _adopt(self, namespace: str, keys: set[bytes]) -> int:
        if _SEALED in namespace and namespace != self._namespace:
            return 0  # only who has the key can read what is in them
        used: list[tuple[int, bytes]] = []
        for key in keys:
            with contextlib.suppress(OSError):  # gone since it was listed
                used.append((os.stat(self._place(namespace, key.hex())).st_mtime_ns, key))
        adopted = 0
        used.sort()  # the one used last comes last
        for start in range(0, len(used), _BATCH):
            found = self._found(namespace, (key.hex() for _, key in used[start : start + _BATCH]))
            self.index.add_many(namespace, found)
            adopted += len(found)
        return adopted

    def _found(self, namespace: str, keys: Iterable[str]) -> list[tuple[Content, int, float]]:
        found = []
        for key in keys:
            with contextlib.suppress(OSError, DamagedFileError):  # set aside when it is asked for
                nbytes, info = self._read_info(namespace, key)
                found.append(self._entry(namespace, info, nbytes))
        return found

    def _read_info(self, namespace: str, key: str) -> tuple[int, ChunkInfo]:
        with opened(self._place(namespace, key)) as descriptor:
            source = FileSource(descriptor)
            nbytes = source.size
            return nbytes, decode_info(source, key, self._cipher(namespace))

    def _unlink(self, victims: Iterable[Victim]) -> Counter[str]:
        count = Counter[str]()
        for victim in victims:
            # An index that somebody wrote into must not name files elsewhere.
            if NAMESPACE.fullmatch(victim.namespace) and len(victim.key) == 32:
                with contextlib.suppress(FileNotFoundError):  # another process was quicker
                    os.unlink(self._place(victim.namespace, victim.key.hex()))
                count[victim.namespace] += 1
        return count

    def _names(self, namespace: str) -> set[bytes]:
        suffix = self._suffix(namespace)
        return {
            bytes.fromhex(match[1])
            for shard in entries(self._root / namespace)
            for entry in entries(shard.path)
            if entry.name.endswith(suffix)
            and (match := _CHUNK_NAME.fullmatch(entry.name))
            and _is_file(entry)
        }

    def _place(self, namespace: str, key: str) -> Path:
        return self._root / namespace / key[:2] / f"{key}{self._suffix(namespace)}"

    def _suffix(self, namespace: str) -> str:
        return ".sealed" if _SEALED in namespace else ".safetensors"

    def _cipher(self, namespace: str) -> Cipher | None:
        return self._encoding.cipher if namespace == self._namespace else None

    def _entry(self, namespace: str, info: ChunkInfo, nbytes: int) -> tuple[Content, int, float]:
        tokens = struct.pack(f"<{len(info.token_ids)}i", *info.token_ids)
        if (cipher := self._cipher(namespace)) is not None:
            tokens = cipher.seal(tokens, f"{info.key}/tokens")
        content = Content(bytes.fromhex(info.key), info.base, info.nbytes, tokens)
        return content, nbytes, recompute_cost(len(info.token_ids))

    def _info(self, content: Content) -> ChunkInfo | None:
        key, tokens = content.key.hex(), content.tokens
        if (cipher := self._cipher(self._namespace)) is not None:
            try:
                tokens = cipher.open(tokens, f"{key}/tokens")
            except DamagedFileError:
                return None
        if len(tokens) % 4:
            return None
        token_ids = struct.unpack(f"<{len(tokens) // 4}i", tokens)
        return ChunkInfo(key, token_ids, content.base, content.kv_bytes)


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[int]:
    """Descriptor to read ``path`` with."""
    # O_NONBLOCK: a named pipe in the place of a file must not hang us.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError as error:
        if is_no_file(error):
            return False
        raise


def _drop_corrupt(namespace: str | Path, keep: int, most: int = _UNLIMITED) -> tuple[int, int]:
    """Remove what was set aside but for the newest, of ``most`` bytes: how many, and bytes left."""
    found: list[tuple[int, int, str]] = []
    for shard in entries(namespace):
        for entry in entries(shard.path):
            if _CORRUPT_NAME.fullmatch(entry.name):
                with contextlib.suppress(OSError):
                    about = entry.stat(follow_symlinks=False)
                    found.append((about.st_mtime_ns, about.st_size, entry.path))
    kept, removed = 0, 0
    for number, (_, nbytes, path) in enumerate(sorted(found, reverse=True)):
        if number < keep and kept + nbytes <= most:
            kept += nbytes
            continue
        with contextlib.suppress(OSError):
            os.unlink(path)
            removed += 1
    return removed, kept
