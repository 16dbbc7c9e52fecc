"""Look into a store folder, and keep it in order; no engine is started."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections import Counter
from pathlib import Path
from typing import Any

from rich.table import Table

from cacheblend_rag.cli.base import (
    OK,
    REFUSED,
    Done,
    Screen,
    add_namespace,
    add_store,
    command,
    index_of,
    megabytes,
    size,
)
from cacheblend_rag.errors import StoreError, UnavailableError
from cacheblend_rag.retrieval import MANIFEST, Passage, Retriever
from cacheblend_rag.store.base import document_id
from cacheblend_rag.store.folder import (
    Imported,
    export,
    import_,
    is_store,
    namespaces,
    open_namespace,
)


def add(commands: Any) -> None:
    """Add the commands of this file."""
    stats = command(commands, "stats", _stats, "what the store holds")
    add_store(stats)
    add_namespace(stats, None)

    verify = command(
        commands, "verify", _verify, "read every stored chunk; set damaged ones aside (exit code 3)"
    )
    add_store(verify)
    add_namespace(verify, None)

    prune = command(commands, "prune", _prune, "remove leftovers, and chunks down to a size")
    prune.add_argument("--to", type=size, metavar="SIZE", help="bytes to keep, such as 10GiB")
    add_store(prune)

    out = command(commands, "export", _export, "write the store to one file")
    out.add_argument(
        "file", type=Path, metavar="FILE.tar", help="file to write; must not exist yet"
    )
    add_store(out)
    add_namespace(out, None)

    into = command(commands, "import", _import, "add what an exported file holds")
    into.add_argument("file", type=Path, metavar="FILE.tar", help="what 'export' wrote")
    add_store(into)

    forget = command(commands, "forget", _forget, "drop documents: their passages and their KV")
    forget.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="files or folders as they were named to ingest",
    )
    add_store(forget)
    add_namespace(forget)

    gc = command(commands, "gc", _gc, "drop the KV of documents that are no longer indexed")
    add_store(gc)
    add_namespace(gc)


# --- what is there --------------------------------------------------------------------------------


def _stats(args: argparse.Namespace, screen: Screen) -> Done:
    rows = [_row(args.store, name) for name in namespaces(args.store, args.namespace)]
    passages = len(_passages(args.store, args.namespace))
    table = Table("namespace", "chunks", "tokens", "KV", title=str(args.store))
    for row in rows:
        size = megabytes(row["bytes"])
        table.add_row(row["namespace"], str(row["chunks"]), str(row["tokens"]), size)
    screen.out.print(table)
    screen.out.print(f"{passages} passages indexed. A namespace is one tenant's and model's.")
    total = {name: sum(row[name] for row in rows) for name in ("chunks", "tokens", "bytes")}
    data = {"store": str(args.store), "namespaces": rows, "total": total, "passages": passages}
    return Done(OK, data)


def _row(folder: Path, namespace: str) -> dict[str, Any]:
    with open_namespace(folder, namespace) as store:
        chunks = list(store.scan())
    return {
        "namespace": namespace,
        "chunks": len(chunks),
        "tokens": sum(len(chunk.token_ids) for chunk in chunks),
        "bytes": sum(chunk.nbytes for chunk in chunks),
    }


def _verify(args: argparse.Namespace, screen: Screen) -> Done:
    rows: list[dict[str, Any]] = []
    for namespace in namespaces(args.store, args.namespace):
        counts = Counter[bool]()
        damaged, unread = [], ""
        with open_namespace(args.store, namespace) as store:
            try:
                for key, is_intact in store.verify():
                    counts[is_intact] += 1
                    if not is_intact:
                        damaged.append(key)
                        screen.out.print(f"[red]damaged[/red] {namespace} {key}", soft_wrap=True)
            except UnavailableError as error:  # the other namespaces are looked at all the same
                unread = str(error)
                screen.out.print(f"[red]not read[/red] {namespace} {unread}", soft_wrap=True)
            recovery = store.recovery._asdict()
        found = {"namespace": namespace, "intact": counts[True], "damaged": damaged}
        rows.append(found | recovery | {"unread": unread})
    intact = sum(row["intact"] for row in rows)
    broken = sum(len(row["damaged"]) for row in rows)
    screen.out.print(f"{intact} chunks intact, {broken} damaged and set aside.", highlight=False)
    data = {"store": str(args.store), "namespaces": rows, "intact": intact, "damaged": broken}
    is_whole = not broken and not any(row["unread"] for row in rows)
    return Done(OK if is_whole else REFUSED, data)


# --- less of it -----------------------------------------------------------------------------------


def _prune(args: argparse.Namespace, screen: Screen) -> Done:
    evicted = corrupt = temporaries = 0
    for number, namespace in enumerate(namespaces(args.store)):
        with open_namespace(args.store, namespace) as store:
            corrupt += store.discard_corrupt()
            temporaries += store.recovery.temporaries
            if args.to is not None and number == 0:  # of the whole folder
                evicted = store.trim(args.to)
    screen.out.print(
        f"Removed {evicted} chunks, {corrupt} damaged ones, {temporaries} unfinished ones.",
        highlight=False,
    )
    data = {"evicted": evicted, "corrupt": corrupt, "temporaries": temporaries}
    return Done(OK, {"store": str(args.store), **data})


def _forget(args: argparse.Namespace, screen: Screen) -> Done:
    names = namespaces(args.store, args.namespace)
    roots = [path.expanduser().resolve() for path in args.paths]
    passages = _passages(args.store, args.namespace)
    kept, gone = list[Passage](), set[str]()
    for passage in passages:
        if any(Path(passage.source).is_relative_to(root) for root in roots):
            gone.add(passage.source)
        else:
            kept.append(passage)
    gone.update(map(str, roots))  # a document that is no longer indexed may still be stored
    chunks = 0
    for namespace in names:
        with open_namespace(args.store, namespace) as store:
            chunks += sum(store.forget(document) for document in sorted(gone))
    if len(kept) < len(passages):
        _index_only(index_of(args.store, args.namespace), kept)
    screen.out.print(f"Forgot {chunks} chunks; {len(kept)} passages stay.", highlight=False)
    return Done(OK, {"store": str(args.store), "chunks": chunks, "passages": len(kept)})


def _gc(args: argparse.Namespace, screen: Screen) -> Done:
    live = {passage.source for passage in _passages(args.store, args.namespace)}
    chunks = 0
    for namespace in namespaces(args.store, args.namespace):
        with open_namespace(args.store, namespace) as store:
            chunks += store.gc(live)
    screen.out.print(f"Dropped {chunks} chunks; {len(live)} documents stay.", highlight=False)
    return Done(OK, {"store": str(args.store), "chunks": chunks, "documents": len(live)})


def _passages(store: Path, tenant: str | None) -> tuple[Passage, ...]:
    index = index_of(store, tenant)
    return Retriever.load(index).passages if (index / MANIFEST).exists() else ()


def _index_only(index: Path, kept: list[Passage]) -> None:
    if kept:
        Retriever(kept, folder=index)
    else:  # an index of nothing can't be searched
        (index / MANIFEST).unlink()


def register(folder: Path, sources: list[str], keys: list[str], tenant: str = "") -> None:
    """Note in every namespace of a tenant which document each chunk is of; an empty key is none."""
    if not is_store(folder):
        return
    by_document: dict[str, list[str]] = {}
    for source, key in zip(sources, keys, strict=True):
        if key:
            by_document.setdefault(source, []).append(key)
    for namespace in namespaces(folder, tenant):
        with contextlib.suppress(StoreError), open_namespace(folder, namespace) as store:
            for document, its_keys in by_document.items():
                store.register(document, [key for key in its_keys if store.contains(key)])
            for document, its_keys in by_document.items():
                # of one that has changed since it was last read
                old = set(store.document_keys(document)).difference(its_keys)
                if old:
                    store.drop([document_id(document)], old)


# --- to and from one file -------------------------------------------------------------------------


def _export(args: argparse.Namespace, screen: Screen) -> Done:
    chunks = nbytes = 0
    try:
        with open(args.file, "xb", opener=_private) as target:
            for _, size in export(args.store, target, args.namespace):
                chunks, nbytes = chunks + 1, nbytes + size
    except OSError as error:
        raise StoreError(f"{args.file} cannot be written: {error.strerror}.") from error
    screen.out.print(f"Wrote {chunks} chunks, {megabytes(nbytes)}, to {args.file}.")
    return Done(OK, {"file": str(args.file), "chunks": chunks, "bytes": nbytes})


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _import(args: argparse.Namespace, screen: Screen) -> Done:
    total = Counter[str](dict.fromkeys(Imported._fields, 0))
    try:
        with args.file.open("rb") as source:
            for name, counts in import_(source, args.store):
                total.update(counts._asdict())
                if counts.refused:
                    screen.out.print(f"[red]refused[/red] {name!r}", soft_wrap=True)
    except OSError as error:
        raise StoreError(f"{args.file} cannot be read: {error.strerror}.") from error
    screen.out.print(
        f"Added {total['added']} chunks, {total['present']} were there, "
        f"{total['refused']} were refused.",
        highlight=False,
    )
    if total["added"]:
        screen.out.print(
            "Every chunk is whole. That it is the KV of its text no check can show, unless it is "
            "encrypted: import only what you or someone you trust has exported."
        )
    return Done(REFUSED if total["refused"] else OK, {"store": str(args.store), **total})
