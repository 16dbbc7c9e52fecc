"""A store folder as a whole: its namespaces, and moving it to another place as one file."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import IO, NamedTuple

from cacheblend_rag.errors import StoreError
from cacheblend_rag.keys import FORMAT
from cacheblend_rag.store.chunk_file import LARGEST, Encoding
from cacheblend_rag.store.disk import DiskStore
from cacheblend_rag.store.marker import MARKER, VERSION, check_format
from cacheblend_rag.store.seal import VARIABLE, cipher_from_environment
from cacheblend_rag.store.tenants import belongs

_ENCODED = re.compile(r"(?P<name>.*?)(?P<fp8>-fp8)?(?:-sealed-(?P<cipher>[0-9a-f]{8}))?")
_MEMBER = re.compile(
    r"v(?P<format>[0-9]{1,9})/(?P<namespace>[a-z0-9-]{1,130})/(?P<key>[0-9a-f]{64})\.[a-z]+"
)
_NAME = re.compile("[a-z0-9-]{1,100}")


class Imported(NamedTuple):
    """Counts of an import."""

    added: int = 0
    present: int = 0
    refused: int = 0  # damaged, foreign, or sealed with a key that is not at hand


def is_store(folder: Path) -> bool:
    """Whether a store was ever opened there."""
    return (folder / MARKER).is_file()


def namespaces(folder: Path, tenant: str | None = None) -> list[str]:
    """The namespaces in a store folder.

    Args:
        tenant: only this one's; "": those of no tenant; None: all there are.

    Raises:
        StoreError: it is no store folder, or of another format.
    """
    if not is_store(folder):
        raise StoreError(
            f"There is no chunk store in {folder}. Make one with 'cacheblend ingest PATH "
            f"--store {folder}', or name another folder."
        )
    check_format(folder)
    found = sorted(path.name for path in (folder / VERSION).iterdir() if path.is_dir())
    return [
        name for name in found if _is_namespace(name) and (tenant is None or belongs(name, tenant))
    ]


def open_namespace(folder: Path, namespace: str) -> DiskStore:
    """The store of one namespace, by the name of its folder, encodings included.

    Raises:
        StoreError: it is encrypted and the key in the environment is not its own.
    """
    match = _ENCODED.fullmatch(namespace)
    assert match
    cipher = cipher_from_environment() if match["cipher"] else None
    if cipher is not None and cipher.name != match["cipher"]:
        raise StoreError(f"{namespace} is encrypted with another key than the one in {VARIABLE}.")
    encoding = Encoding(fp8=match["fp8"] is not None, cipher=cipher)
    return DiskStore(folder, namespace=match["name"], encoding=encoding)


def export(folder: Path, target: IO[bytes], tenant: str | None = None) -> Iterator[tuple[str, int]]:
    """Write every intact chunk to a tar archive; yields each namespace and the bytes of a chunk.
    ``tenant`` is that of ``namespaces``.

    Raises:
        StoreError: it is no store folder, or a namespace cannot be opened.
    """
    with tarfile.open(fileobj=target, mode="w|") as archive:
        for namespace in namespaces(folder, tenant):
            with open_namespace(folder, namespace) as store:
                for name, data in store.files():
                    member = tarfile.TarInfo(f"{VERSION}/{namespace}/{name}")
                    member.size = len(data)
                    archive.addfile(member, BytesIO(data))
                    yield namespace, len(data)


def import_(source: IO[bytes], folder: Path) -> Iterator[tuple[str, Imported]]:
    """Put the chunks of an archive into a store folder, each after every check; yields what became
    of each member. Only our names are read, nothing is extracted.

    The checks show that a chunk is whole, not that it is the KV of its text: only a sealed one
    tells who made it.

    Raises:
        StoreError: it is no archive, or one of another format, or the store cannot be written.
    """
    named, store = "", None  # no more than one is held open, whatever the archive names
    try:
        with tarfile.open(fileobj=source, mode="r|") as archive:
            for member in archive:
                match = _MEMBER.fullmatch(member.name)
                if match is None or not _is_ours(member, match["namespace"]):
                    yield member.name, Imported(refused=1)
                    continue
                if int(match["format"]) != FORMAT:
                    raise StoreError(
                        f"This archive has chunks of format {match['format']}; this version of "
                        f"cacheblend-rag reads format {FORMAT} only. Ingest the documents anew."
                    )
                if match["namespace"] != named:
                    if store is not None:
                        store.close()
                    named, store = match["namespace"], _opened(folder, match["namespace"])
                content = archive.extractfile(member)
                assert content is not None
                yield member.name, _import_one(store, match["key"], content)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise StoreError(
            f"This is no archive of a store, or it is damaged ({error}). "
            "Make one with 'cacheblend export'. What was read so far is kept."
        ) from error
    finally:
        if store is not None:
            store.close()


def _is_ours(member: tarfile.TarInfo, namespace: str) -> bool:
    # A sparse member declares more than the archive holds.
    is_plain = member.isreg() and not member.issparse()
    return is_plain and member.size <= LARGEST and _is_namespace(namespace)


def _is_namespace(name: str) -> bool:
    match = _ENCODED.fullmatch(name)
    return match is not None and _NAME.fullmatch(match["name"]) is not None


def _opened(folder: Path, namespace: str) -> DiskStore | None:
    try:
        return open_namespace(folder, namespace)
    except StoreError:
        if "-sealed-" in namespace:
            return None  # its key is not at hand: what can't be checked is not taken
        raise


def _import_one(store: DiskStore | None, key: str, content: IO[bytes]) -> Imported:
    if store is None:
        return Imported(refused=1)
    if store.contains(key):
        return Imported(present=1)
    return Imported(added=1) if store.put_file(key, content.read()) else Imported(refused=1)
