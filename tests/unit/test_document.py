"""What a chunk is computed behind: from pieces of documents to token ids, and to keys."""

from __future__ import annotations

import pytest

from cacheblend_rag import BlendConfig, ConfigError
from cacheblend_rag.document import Piece, texts_before
from cacheblend_rag.ingest import Chunk, batches
from cacheblend_rag.keys import KeySpace
from cacheblend_rag.prefix import (
    BEFORE_CHARS,
    MOST_AUTO,
    document_context,
    ingest_prefix,
    prompt_prefix_ids,
)

TEXT = "One fish. Two fish. Red fish. Blue fish."


class Letters:
    """A tokenizer of letters."""

    bos_token_id = 1

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [ord(letter) for letter in text]


class Pairs(Letters):
    """A tokenizer of pairs of letters."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return super().encode(text, add_special_tokens)[::2]


def piece(start: int, end: int, document: str = "d") -> Piece:
    return Piece(TEXT[start:end], document, start)


def test_pieces_of_a_document_stand_behind_one_another() -> None:
    cut = [Piece("One", "d"), Piece("Un", "e"), Piece("Two", "d"), Piece("Red", "d")]
    assert texts_before(cut) == [None, None, "One\n\n", "One\n\nTwo\n\n"]
    assert texts_before([Piece("One", None), Piece("Two", None)]) == [None, None]
    assert texts_before([]) == []


def test_starts_tell_order_gaps_and_shared_text() -> None:
    beside = [piece(20, 30), piece(0, 10), piece(10, 20)]
    assert texts_before(beside) == [TEXT[:20], None, TEXT[:10]]
    overlapping = [piece(0, 19), piece(10, 29), piece(20, 40)]
    assert texts_before(overlapping) == [None, TEXT[:10], TEXT[:20]]
    stripped = [piece(0, 9), piece(10, 19)]
    assert texts_before(stripped) == [None, TEXT[:9] + "\n"]
    assert texts_before([piece(0, 40), piece(0, 10)]) == [None, None], "one within the other"
    half_known = [piece(0, 9), Piece("x", "d")]
    assert texts_before(half_known) == [None, TEXT[:9] + "\n\n"]


def test_only_the_end_of_a_long_document_is_kept() -> None:
    pieces = [Piece(f"{n:07} " * 100, "d", n * 800) for n in range(20)]
    left_context = texts_before(pieces)
    assert left_context[3] == "".join(p.text for p in pieces[:3])
    assert left_context[-1] == "".join(p.text for p in pieces[:-1])[-BEFORE_CHARS:]


def test_context_is_as_long_as_the_neutral_text() -> None:
    neutral = tuple(range(1000, 1012))
    for known in (None, "", " \n", ()):
        assert document_context(known, neutral, Letters()) == ()
    ids = tuple(map(ord, "fish\n\n"))
    assert document_context("fish  ", neutral, Letters()) == (*neutral[6:], *ids)
    assert document_context(TEXT, neutral, Letters()) == tuple(map(ord, TEXT[-10:] + "\n\n"))
    assert document_context((1, 2), neutral, None) == (*neutral[2:], 1, 2)
    assert document_context(range(99), neutral, None) == tuple(range(87, 99))


def test_prefix_of_a_chunk_without_a_document_is_that_of_auto() -> None:
    auto, document = BlendConfig(), BlendConfig(ingest_prefix="document")
    size = len(ingest_prefix(document, Pairs(), None, positions=8192))
    assert size <= MOST_AUTO < len(ingest_prefix(document, Letters(), None, positions=8192))
    for tokenizer, positions in ((Pairs(), 2 * size + 1), (Pairs(), 8192)):
        whole = ingest_prefix(document, tokenizer, None, positions=positions)
        assert whole == ingest_prefix(auto, tokenizer, None, positions=positions)
    head = prompt_prefix_ids(auto, Letters(), None)
    assert head == ingest_prefix(auto, Pairs(), None, positions=2 * size), (
        "half of the model's positions"
    )
    assert head == ingest_prefix(auto, Letters(), None, positions=8192), "too long"
    # asked for by name, it is not left out
    with pytest.raises(ConfigError, match="half of the model's"):
        ingest_prefix(document, Pairs(), None, positions=2 * size)
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        ingest_prefix(document, None, None, positions=8192)


def test_keys_of_documents_are_their_own_and_others_stay() -> None:
    space = KeySpace("ab", (1, 2), "tenant")
    assert space.key((3, 4)) == "d6a2f979cdc1b8b18669fe875dcbb2843d70165cfad20cde56cdbf82693c2804"
    document = space._replace(by_document=True)
    assert document.key((3, 4)) not in (space.key((3, 4)), document.key((3, 5)))
    assert (space.shared_prefix, document.shared_prefix) == ((1, 2), None)


def test_batches_count_contexts_and_keep_kinds_apart() -> None:
    chunks = [Chunk("a", (0,) * 10), Chunk("b", (0,) * 10, (0,) * 5), Chunk("c", (0,) * 10)]
    chunks += [Chunk(name, (0,) * 10, (0,) * 5) for name in "de"]
    found = [[chunk.key for chunk in batch] for batch in batches(chunks, 30)]
    assert found == [["a", "c"], ["b", "d"], ["e"]]


def test_keys_stay_what_they_are() -> None:
    """Others than these, and no store that was filled before is found: that takes a new FORMAT."""
    of = ("f00d", (1, 2), "tenant")
    assert KeySpace(*of).key((3, 4, 5)) == (
        "0d5bace0b420d28e4a15bb2693bc62f07895dfc6c85b5237d39e55cfc772294a"
    )
    assert KeySpace(*of, by_document=True).key((3, 4, 5)) == (
        "92bf988d40110441d2065ba2ece80b9e9713ef97d0f8ef2fd7f2ed2661fcff88"
    )
