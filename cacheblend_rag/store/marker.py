"""The file that marks a folder as a chunk store, so that no other folder is ever written to."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from cacheblend_rag.errors import StoreError
from cacheblend_rag.keys import FORMAT
from cacheblend_rag.store.files import TEMPORARY_SUFFIX, atomic_file, make_folder, write_all

MARKER = "cacheblend-store.json"

VERSION = f"v{FORMAT}"  # where chunks of this format are, in folders, archives and remotely

_MARK = {"format": FORMAT, "made_by": "cacheblend-rag"}


def claim(folder: Path, *, again: bool = False) -> None:
    """Mark an empty folder as ours, or check that it is.

    Args:
        again: it was ours already; who emptied it meanwhile took the mark as well.

    Raises:
        StoreError: it holds something else, or another format.
    """
    make_folder(folder)
    marker = folder / MARKER
    if not marker.exists():
        # Listed first, then asked again: another process may be claiming the folder just now.
        found = [name for name in os.listdir(folder) if not (again and _is_ours(name))]
        if any(map(_is_foreign, found)) and not marker.exists():
            raise StoreError(
                f"{folder} holds files but no {MARKER}, so it is not a chunk store. "
                "Choose an empty or a new folder."
            )
        with atomic_file(marker) as descriptor:
            write_all(descriptor, json.dumps(_MARK).encode())
    check_format(folder)


def check_format(folder: Path) -> None:
    """Refuse a store whose chunks this version can't read.

    Raises:
        StoreError: it was made by another version, or its marker is damaged.
    """
    mark = _read_marker(folder / MARKER)
    if mark == _MARK:
        return
    fix = f"Delete {folder} and ingest anew, it is only a cache; or choose another folder"
    found = mark.get("format") if isinstance(mark, dict) else None
    if type(found) is int and mark == {**_MARK, "format": found}:
        age = "an older" if found < FORMAT else "a newer"
        raise StoreError(
            f"{folder} was made by {age} version of cacheblend-rag: it has chunks of format "
            f"{found}, this version reads format {FORMAT} only. {fix}."
        )
    raise StoreError(f"{folder / MARKER} is damaged (expected {json.dumps(_MARK)}). {fix}.")


def _is_foreign(name: str) -> bool:
    return name != "lost+found" and not name.endswith(TEMPORARY_SUFFIX)


def _is_ours(name: str) -> bool:
    return name == VERSION or name.startswith("index.sqlite")


def _read_marker(marker: Path) -> object:
    try:
        mark: object = json.loads(marker.read_bytes())
    except (ValueError, RecursionError):
        return None
    return mark


def check_writable(folder: Path) -> None:
    """Raise the OSError that writing there would."""
    with tempfile.TemporaryFile(dir=folder):
        pass
