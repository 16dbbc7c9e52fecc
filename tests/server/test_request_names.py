"""Which of vLLM's requests answer a client's, by the names that it gives them."""

from __future__ import annotations

import pytest

from cacheblend_rag.engine.names import answering, answers_to, is_beam

MINE, OTHER = "cmpl-9aa1b78f52a81f8b", "cmpl-1aa1b78f52a81f8b"
TOKEN = "0123456789abcdef"  # of a beam search


@pytest.mark.parametrize(
    ("name", "place"),
    [
        (MINE, (1, 1)),
        (f"{MINE}-b1b2b3b4", (1, 1)),
        (f"{MINE}-0-b1b2b3b4", (1, 1)),
        (f"{MINE}-3-b1b2b3b4", (4, 1)),
        (f"{MINE}_3-b1b2b3b4", (4, 1)),
        (f"1_{MINE}-0-b1b2b3b4", (1, 2)),
        (f"{MINE}-{TOKEN}-beam-0-b1b2b3b4", (1, 1)),
        (f"{MINE}-2-{TOKEN}-beam-1-b1b2b3b4", (3, 2)),
        (OTHER, ()),
        (f"x{MINE}", ()),
        (f"{MINE}x-b1b2b3b4", ()),
        (f"{MINE}-{TOKEN}-b1b2b3b4", ()),
        (f"{MINE}-beam-1-b1b2b3b4", ()),
    ],
)
def test_places(name: str, place: tuple[int, ...]) -> None:
    assert answers_to(name, MINE) == place


def test_a_chat_has_one_prompt() -> None:
    """What looks like the number of another is the end of an id that a client chose."""
    chat = "chatcmpl-conv42"
    assert answers_to(f"{chat}-b1b2b3b4", chat) == (1, 1)
    assert answers_to(f"1_{chat}-b1b2b3b4", chat) == (1, 2)
    assert answers_to(f"{chat}_2-b1b2b3b4", chat) == (3, 1)
    assert answers_to(f"{chat}-0-b1b2b3b4", chat) == ()
    assert answers_to(f"{chat}-0-b1b2b3b4", f"{chat}-0") == (1, 1)


def test_an_id_that_a_client_gave_twice_is_the_latest_request() -> None:
    first, second = f"{MINE}-0-aaaaaaaa", f"{MINE}-0-bbbbbbbb"
    other, of_another = f"{MINE}-1-cccccccc", f"{OTHER}-0-dddddddd"
    assert answering([first, other, of_another, second], MINE) == [second, other]
    tokens = [f"{MINE}-{TOKEN}-beam-0-{unique}" for unique in ("b1b2b3b4", "a1a2a3a4")]
    assert answering(tokens, MINE) == tokens, "of a beam, as they came"


def test_beams() -> None:
    beams = (f"{MINE}-{TOKEN}-beam-0", f"{MINE}-2-{TOKEN}-beam-13-b1b2b3b4")
    others = (MINE, f"1_{MINE}-0-b1b2b3b4", "cmpl-my-beam-1-b1b2b3b4", f"{beams[0]}-x")
    assert [is_beam(name) for name in (*beams, *others)] == [True] * 2 + [False] * 4
