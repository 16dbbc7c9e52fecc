"""Retrieval without an embedding model: a passage a paragraph, and the first ones are found. And a
PDF to read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from cacheblend_rag.errors import StoreError
from cacheblend_rag.retrieval import MANIFEST, Document, Passage


class FakeRetriever:
    """Keeps passages in a file, and finds the first ones."""

    def __init__(self, passages: Sequence[Passage], folder: Path) -> None:
        self.passages = tuple(passages)
        folder.mkdir(parents=True, exist_ok=True)
        rows = [(p.source, p.number, p.text) for p in passages]
        (folder / MANIFEST).write_text(json.dumps(rows))

    @classmethod
    def load(cls, folder: Path) -> FakeRetriever:
        if not (folder / MANIFEST).exists():
            raise StoreError(f"{folder} holds no index. Ingest documents first.")
        rows = json.loads((folder / MANIFEST).read_text())
        return cls([Passage(*row) for row in rows], folder)

    def search(self, question: str, k: int) -> list[Passage]:
        return list(self.passages[:k])


def split(documents: Sequence[Document], chunk_tokens: int, tokenizer: object) -> list[Passage]:
    """A passage a paragraph."""
    return [
        Passage(document.source, number, text)
        for document in documents
        for number, text in enumerate(document.text.strip().split("\n\n"))
    ]


def make_pdf(path: Path, *pages: str, password: str | None = None) -> None:
    """Write a PDF with one line of text on each page."""
    pypdf = pytest.importorskip("pypdf")
    from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

    font = DictionaryObject(
        {
            NameObject("/Type"): NameObject("/Font"),
            NameObject("/Subtype"): NameObject("/Type1"),
            NameObject("/BaseFont"): NameObject("/Helvetica"),
        }
    )
    writer = pypdf.PdfWriter()
    for text in pages:
        page = writer.add_blank_page(width=400, height=200)
        fonts = DictionaryObject({NameObject("/F1"): font})
        page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
        content = DecodedStreamObject()
        content.set_data(f"BT /F1 12 Tf 20 100 Td ({text}) Tj ET".encode())
        page[NameObject("/Contents")] = content
    if password:
        writer.encrypt(password, algorithm="RC4-128")
    writer.write(path)
