"""The chunk index against a slow twin that compares every chunk with the prompt at every shift."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, groupby, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheblend_rag.errors import ConfigError
from cacheblend_rag.locate import ChunkIndex, Match, parts, plain, wholes
from cacheblend_rag.locate import hashes as hashes_module
from cacheblend_rag.locate import index as index_module
from cacheblend_rag.locate.parts import MAX_ANCHORS

Chunks = dict[str, list[int]]
Span = tuple[int, int, str, int]  # start, end, key, offset

WIDTH = 16
VOCABULARY = 128_000


# --- the slow twin -------------------------------------------------------------------------------


def all_spans(chunks: Chunks, prompt: list[int], min_tokens: int) -> Iterator[Span]:
    """Every maximal stretch of equal ids, of every chunk at every shift."""
    for key, ids in chunks.items():
        for shift in range(1 - len(ids), len(prompt)):
            first, last = max(0, shift), min(len(prompt), shift + len(ids))
            equal = [prompt[at] == ids[at - shift] for at in range(first, last)]
            at = first
            for is_equal, group in groupby(equal):
                length = len(list(group))
                if is_equal and length >= min_tokens:
                    yield at, at + length, key, at - shift
                at += length


def anchor_offsets(num_tokens: int) -> list[int]:
    if num_tokens < WIDTH:
        return []
    last = max(num_tokens - 24, 0)
    return [*range(8, last, 64), last]


def shows_anchor(span: Span, num_tokens: int) -> bool:
    start, end, _, offset = span
    last = offset + end - start - WIDTH
    return any(offset <= anchor <= last for anchor in anchor_offsets(num_tokens))


def visible_spans(chunks: Chunks, prompt: list[int], min_tokens: int) -> list[Span]:
    """The spans on those diagonals of which some stretch of equal ids holds an anchor."""
    spans = list(all_spans(chunks, prompt, WIDTH))
    diagonals = {(s[2], s[0] - s[3]) for s in spans if shows_anchor(s, len(chunks[s[2]]))}
    return [s for s in spans if (s[2], s[0] - s[3]) in diagonals and s[1] - s[0] >= min_tokens]


def trim(span: Span, taken: list[Match]) -> Span:
    start, end, key, offset = span
    for match in taken:
        if match.start <= start < match.end:
            start, offset = match.end, offset + match.end - start
        if match.start < end <= match.end:
            end = match.start
    return start, end, key, offset


def resolve(chunks: Chunks, spans: Iterable[Span], min_tokens: int) -> list[Match]:
    """Take the longest span that is left, trim the others, repeat."""
    age = {key: row for row, key in enumerate(chunks)}

    def rank(span: Span) -> tuple[int, int, int, int, int]:
        start, end, key, offset = span
        return start - end, start, offset, len(chunks[key]), age[key]

    def stretch(span: Span) -> int:
        return span[0] // min_tokens

    taken: list[Match] = []
    left = [min(s, key=rank) for _, s in groupby(sorted(spans, key=stretch), key=stretch)]
    while left:
        best = min(left, key=rank)
        taken.append(Match(*best, len(chunks[best[2]])))
        trimmed = [trim(span, taken) for span in left]
        left = [span for span in trimmed if span[1] - span[0] >= min_tokens]
    return sorted(taken)


# --- helpers -------------------------------------------------------------------------------------


def index_of(chunks: Chunks) -> ChunkIndex:
    index = ChunkIndex()
    index.add_many(chunks.items())
    return index


def random_ids(rng: random.Random, num_tokens: int, vocabulary: int = VOCABULARY) -> list[int]:
    return [rng.randrange(vocabulary) for _ in range(num_tokens)]


def assert_sound(
    matches: list[Match], chunks: Chunks, prompt: list[int], min_tokens: int = 32
) -> None:
    for match in matches:
        length = match.end - match.start
        ids = chunks[match.key]
        assert length >= min_tokens
        assert prompt[match.start : match.end] == ids[match.offset : match.offset + length]
        assert match.chunk_tokens == len(ids)
    assert all(left.end <= right.start for left, right in pairwise(matches))


@pytest.fixture
def rng() -> random.Random:
    return random.Random(20240530)


@pytest.fixture
def chunks(rng: random.Random) -> Chunks:
    return {f"chunk{n}": random_ids(rng, n) for n in (32, 33, 79, 100, 400, 401)}


# --- one situation each --------------------------------------------------------------------------


def test_empty_index_and_empty_prompt_have_no_matches(chunks: Chunks) -> None:
    assert ChunkIndex().locate(list(range(500))) == []
    assert index_of(chunks).locate([]) == []
    assert index_of(chunks).locate([1] * 15) == []


def test_min_tokens_below_an_anchor_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 16"):
        ChunkIndex().locate([1, 2, 3], min_tokens=15)


@pytest.mark.parametrize("num_tokens", range(16, 110))
def test_whole_chunks_of_every_length_are_found(rng: random.Random, num_tokens: int) -> None:
    ids = random_ids(rng, num_tokens)
    prompt = [*random_ids(rng, 5), *ids, *random_ids(rng, 9)]
    expected = [Match(5, 5 + num_tokens, "key", 0, num_tokens)]
    assert index_of({"key": ids}).locate(prompt, min_tokens=16) == expected


def test_any_order_with_and_without_glue(rng: random.Random, chunks: Chunks) -> None:
    keys = [*chunks, *chunks]
    rng.shuffle(keys)
    prompt, expected = [], []
    for key in keys:
        prompt += random_ids(rng, rng.choice([0, 0, 1, 3]))
        expected.append(
            Match(len(prompt), len(prompt) + len(chunks[key]), key, 0, len(chunks[key]))
        )
        prompt += chunks[key]
    assert index_of(chunks).locate(prompt) == expected


@pytest.mark.parametrize("head", range(9))
@pytest.mark.parametrize("tail", range(9))
def test_boundary_tokens_may_differ(rng: random.Random, head: int, tail: int) -> None:
    for num_tokens in (48, 64, 95, 96, 97, 400):
        ids = random_ids(rng, num_tokens)
        prompt = [*random_ids(rng, 10), *ids[head : num_tokens - tail], *random_ids(rng, 10)]
        expected = [Match(10, 10 + num_tokens - head - tail, "key", head, num_tokens)]
        assert index_of({"key": ids}).locate(prompt) == expected


@pytest.mark.parametrize("kept", [32, 33, 71, 72, 73, 200, 399])
def test_truncated_chunks_are_found(rng: random.Random, kept: int) -> None:
    ids = random_ids(rng, 400)
    index = index_of({"key": ids})
    glue = random_ids(rng, 20)
    assert index.locate(glue + ids[:kept]) == [Match(20, 20 + kept, "key", 0, 400)]
    assert index.locate(ids[-kept:] + glue) == [Match(0, kept, "key", 400 - kept, 400)]


@pytest.mark.parametrize("num_tokens", [87, 88, 150, 151, 152, 153, 214, 215, 216, 400])
def test_every_interior_span_of_79_tokens_is_found(rng: random.Random, num_tokens: int) -> None:
    ids = random_ids(rng, num_tokens)
    index = index_of({"key": ids})
    for offset in range(8, num_tokens - 79 + 1):
        expected = [Match(0, 79, "key", offset, num_tokens)]
        assert index.locate(ids[offset : offset + 79]) == expected


@pytest.mark.parametrize("num_tokens", range(24, 160))
def test_heads_and_tails_of_24_tokens_are_found(rng: random.Random, num_tokens: int) -> None:
    ids = random_ids(rng, num_tokens)
    index = index_of({"key": ids})
    assert index.locate(ids[:24], min_tokens=24) == [Match(0, 24, "key", 0, num_tokens)]
    tail = Match(0, 24, "key", num_tokens - 24, num_tokens)
    assert index.locate(ids[-24:], min_tokens=24) == [tail]


def test_a_changed_token_splits_a_chunk(rng: random.Random) -> None:
    ids = random_ids(rng, 200)
    prompt = [*ids[:100], -1, *ids[101:]]
    expected = [Match(0, 100, "key", 0, 200), Match(101, 200, "key", 101, 200)]
    assert index_of({"key": ids}).locate(prompt) == expected


def test_splitter_overlap_goes_to_the_longest_chunk(rng: random.Random) -> None:
    document = random_ids(rng, 600)
    chunks = {"left": document[:300], "right": document[250:]}
    expected = [Match(0, 250, "left", 0, 300), Match(250, 600, "right", 0, 350)]
    assert index_of(chunks).locate(document) == expected


def test_a_loser_below_min_tokens_is_dropped(rng: random.Random) -> None:
    document = random_ids(rng, 400)
    chunks = {"long": document[:350], "short": document[300:381]}
    assert index_of(chunks).locate(document) == [Match(0, 350, "long", 0, 350)]
    with_short = [Match(0, 350, "long", 0, 350), Match(350, 381, "short", 50, 81)]
    assert index_of(chunks).locate(document, min_tokens=31) == with_short


def test_nested_chunks(rng: random.Random) -> None:
    outer = random_ids(rng, 400)
    chunks = {"outer": outer, "head": outer[:120], "inner": outer[90:190]}
    index = index_of(chunks)
    glue = random_ids(rng, 3)
    assert index.locate(outer) == [Match(0, 400, "outer", 0, 400)]
    assert index.locate(glue + outer[:120]) == [Match(3, 123, "head", 0, 120)]
    assert index.locate(glue + outer[90:190]) == [Match(3, 103, "inner", 0, 100)]


def test_on_equal_spans_the_smallest_offset_wins_then_the_shortest_chunk(
    rng: random.Random,
) -> None:
    shared = random_ids(rng, 80)
    chunks = {
        "late": random_ids(rng, 10) + shared,
        "long": shared + random_ids(rng, 40),
        "short": shared + random_ids(rng, 20),
        "twin": shared + random_ids(rng, 20),
    }
    assert index_of(chunks).locate(shared) == [Match(0, 80, "short", 0, 100)]
    del chunks["short"], chunks["twin"]
    assert index_of(chunks).locate(shared) == [Match(0, 80, "long", 0, 120)]


def test_shared_boilerplate_is_told_apart_by_length(rng: random.Random) -> None:
    boilerplate = random_ids(rng, 60)
    chunks = {str(i): boilerplate + random_ids(rng, 100) for i in range(10)}
    prompt = chunks["7"] + chunks["3"] + boilerplate
    expected = [
        Match(0, 160, "7", 0, 160),
        Match(160, 320, "3", 0, 160),
        Match(320, 380, "0", 0, 160),
    ]
    assert index_of(chunks).locate(prompt) == expected


def test_thousands_of_chunks_with_one_anchor(rng: random.Random) -> None:
    header = random_ids(rng, 40)
    chunks = {str(i): header + random_ids(rng, 60) for i in range(5000)}
    index = index_of(chunks)
    prompt = chunks["4999"] + chunks["0"] + chunks["2500"]
    expected = [
        Match(0, 100, "4999", 0, 100),
        Match(100, 200, "0", 0, 100),
        Match(200, 300, "2500", 0, 100),
    ]
    assert index.locate(prompt) == expected


def crowd_and_late(rng: random.Random, num_chunks: int) -> tuple[list[int], Chunks]:
    """A part of the last chunk, which only shows an anchor that all others have as well."""
    ids = random_ids(rng, 48)
    crowd = {str(i): ids[:40] + random_ids(rng, 68) for i in range(num_chunks)}
    return ids, crowd | {"late": ids + random_ids(rng, 60)}


def test_an_anchor_of_many_chunks_proposes_the_oldest(rng: random.Random) -> None:
    part, chunks = crowd_and_late(rng, MAX_ANCHORS)
    assert index_of(chunks).locate(part) == [Match(0, 40, "0", 0, 108)]
    del chunks["7"]
    assert index_of(chunks).locate(part) == [Match(0, 48, "late", 0, 108)]


def test_discarded_chunks_are_not_proposed(rng: random.Random) -> None:
    part, chunks = crowd_and_late(rng, 100)
    index = index_of(chunks)
    for i in range(40):
        index.discard(str(i))
    assert index.locate(part) == [Match(0, 40, "40", 0, 108)]


# --- nothing hides a whole chunk -----------------------------------------------------------------


def crowd_around(rng: random.Random, ids: list[int], windows: bool) -> Iterator[list[int]]:
    """Chunks with the same anchors as ``ids``, which are of another chunk all the same."""
    for _ in range(40):
        changed = random_ids(rng, len(ids))
        for offset in anchor_offsets(len(ids)) if windows else ():
            changed[offset : offset + WIDTH] = ids[offset : offset + WIDTH]
        yield changed
        cut = rng.randrange(40, len(ids) - 20)
        yield ids[:cut] + random_ids(rng, len(ids) - cut)
        yield random_ids(rng, cut) + ids[cut:]


@pytest.mark.parametrize("num_tokens", [64, 100, 333, 400, 1025])
@pytest.mark.parametrize("seams", [0, 8])
def test_older_chunks_with_the_same_windows_hide_no_whole_chunk(
    rng: random.Random, num_tokens: int, seams: int
) -> None:
    ids = random_ids(rng, num_tokens)
    crowd = {str(i): other for i, other in enumerate(crowd_around(rng, ids, windows=True))}
    piece = ids[seams : num_tokens - seams]
    prompt = [*random_ids(rng, 50), *piece, *random_ids(rng, 50)]
    expected = [Match(50, 50 + len(piece), "key", seams, num_tokens)]
    assert index_of(crowd | {"key": ids}).locate(prompt) == expected


def test_a_chunk_of_dead_ones_kin_is_found(rng: random.Random) -> None:
    ids = random_ids(rng, 200)
    index = index_of({str(i): ids[:190] + random_ids(rng, 40) for i in range(90)})
    index.add("key", ids)
    for i in range(0, 90, 2):
        index.discard(str(i))
    assert index.locate(ids) == [Match(0, 200, "key", 0, 200)]
    for i in range(1, 90, 4):
        index.discard(str(i))
    assert index.locate(ids) == [Match(0, 200, "key", 0, 200)]


def text_of(kind: str, num_tokens: int) -> list[int]:
    """Text that repeats itself in one way or another."""
    if kind == "fibonacci":
        before, word = [0], [0, 1]
        while len(word) < num_tokens:
            before, word = word, word + before
        return word[:num_tokens]
    if kind == "thue-morse":
        return [at.bit_count() & 1 for at in range(num_tokens)]
    if kind == "two tokens":
        return random_ids(random.Random(1), num_tokens, vocabulary=2)
    return random_ids(random.Random(2), int(kind)) * num_tokens  # of this period


KINDS = ["1", "2", "15", "16", "17", "64", "125", "400", "fibonacci", "thue-morse", "two tokens"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(33, 64), (100, 500), (1000, 2000)], ids=str)
def test_whole_chunks_are_covered_whatever_the_text(
    rng: random.Random, kind: str, size: tuple[int, int]
) -> None:
    text = text_of(kind, 4000)[:4000]
    starts = [rng.randrange(4000 - size[1]) for _ in range(300)]
    chunks = {str(at): text[at : at + rng.randint(*size)] for at in starts}
    index = index_of(chunks)
    glue = random_ids(rng, 3)
    wanted = rng.sample(list(chunks), 8)
    prompt = [token for key in wanted for token in chunks[key] + glue]
    matches = index.locate(prompt)
    assert_sound(matches, chunks, prompt)
    covered = {at for match in matches for at in range(match.start, match.end)}
    first = 0
    for key in wanted:
        last = first + len(chunks[key])
        assert covered.issuperset(range(first + 32, last - 32))
        first = last + len(glue)


# --- the work is bounded -------------------------------------------------------------------------


class Work:
    """Counts the chunks that are laid on the prompt, tokens compared, and turns of loops."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.diagonals = self.tokens = self.places = self.spans = 0
        equal_spans, resolve_overlaps = parts._equal_spans, index_module.resolve_overlaps
        widened = wholes._widened

        def counted_equal_spans(view: Any, prompt: Any, overlaps: Any) -> Any:
            self.diagonals += len(overlaps.rows_D)
            self.tokens += int(overlaps.lengths_D.sum())
            return equal_spans(view, prompt, overlaps)

        def counted_widened(view: Any, prompt: Any, spans: Any) -> Any:
            self.places += len(spans.starts_S)
            return widened(view, prompt, spans)

        def counted_resolve(view: Any, prompt: Any, spans: Any, min_tokens: int) -> Any:
            self.spans += len(spans.starts_S)
            return resolve_overlaps(view, prompt, spans, min_tokens)

        monkeypatch.setattr(parts, "_equal_spans", counted_equal_spans)
        monkeypatch.setattr(wholes, "_widened", counted_widened)
        monkeypatch.setattr(index_module, "resolve_overlaps", counted_resolve)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(33, 64), (100, 500), (1000, 2000)], ids=str)
def test_work_is_bounded_by_the_length_of_the_prompt(
    rng: random.Random, monkeypatch: pytest.MonkeyPatch, kind: str, size: tuple[int, int]
) -> None:
    text = text_of(kind, 5000)[:5000]
    starts = [rng.randrange(5000 - size[1]) for _ in range(500)]
    index = index_of({str(i): text[at : at + size[1]] for i, at in enumerate(starts)})
    work = Work(monkeypatch)
    for prompt in (text, text[2500:] + text[:2500], text[::-1]):
        index.locate(prompt)
        assert work.diagonals <= len(text) // 64 * 8 + 8
        assert work.tokens <= (1 << 18) + 16 * len(text)
        assert work.places <= len(text)
        assert work.spans <= len(text) // 32 + 1
        work.diagonals = work.tokens = work.places = work.spans = 0


def test_a_hostile_document_costs_no_more_than_an_ordinary_prompt(
    rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4,000 chunks cut from text of period 125: each place proposes hundreds of them."""
    text = random_ids(rng, 125) * 40
    chunks = [text[at : at + rng.randint(33, 64)] for at in range(4000)]
    work = Work(monkeypatch)
    index_of({str(i): ids for i, ids in enumerate(chunks)}).locate(text)
    assert work.diagonals <= 8 * 5000 // 64 + 8


def test_what_repeats_hides_nothing_elsewhere(rng: random.Random) -> None:
    """A part of a chunk, with no more than its anchors to tell, beside text of one token."""
    ids = random_ids(rng, 400)
    index = index_of({str(i): [0] * 400 for i in range(200)} | {"key": ids})
    prompt = [0] * 5000 + ids[100:300] + [0] * 5000
    assert Match(5000, 5200, "key", 100, 400) in index.locate(prompt)


def test_one_token_for_ever_is_covered() -> None:
    chunks = {str(i): [0] * 400 for i in range(100)}
    prompt = [0] * 8000
    matches = index_of(chunks).locate(prompt)
    assert_sound(matches, chunks, prompt)
    assert sum(match.end - match.start for match in matches) > 7600


def test_id_arrays_and_lists_are_equal(chunks: Chunks) -> None:
    arrays = ChunkIndex()
    for key, ids in chunks.items():
        arrays.add(key, np.array(ids, np.int32))
    prompt = chunks["chunk400"] + chunks["chunk33"]
    expected = index_of(chunks).locate(prompt)
    assert arrays.locate(np.array(prompt, np.int32)) == expected
    assert arrays.locate(tuple(prompt)) == expected


# --- the index over its lifetime -----------------------------------------------------------------


def test_add_is_idempotent(chunks: Chunks) -> None:
    index = index_of(chunks)
    size = index.nbytes
    index.add_many([*chunks.items(), *chunks.items()])
    index.add("chunk400", chunks["chunk400"])
    assert (len(index), index.nbytes) == (len(chunks), size)


def test_one_by_one_equals_bulk(rng: random.Random) -> None:
    chunks = {str(i): random_ids(rng, rng.randrange(60), vocabulary=2) for i in range(400)}
    single = ChunkIndex()
    for key, ids in chunks.items():
        single.add(key, ids)
    prompt = random_ids(rng, 3000, vocabulary=2) + chunks["7"] + chunks["399"]
    expected = index_of(chunks).locate(prompt, min_tokens=16)
    assert expected
    assert single.locate(prompt, min_tokens=16) == expected


def test_a_key_added_while_its_batch_is_read(chunks: Chunks) -> None:
    index = ChunkIndex()

    def reading() -> Iterator[tuple[str, list[int]]]:
        yield "chunk79", chunks["chunk79"]
        index.add("chunk79", chunks["chunk79"])
        yield "chunk33", chunks["chunk33"]

    index.add_many(reading())
    assert index.nbytes == index_of({key: chunks[key] for key in ("chunk79", "chunk33")}).nbytes


def test_bulk_larger_than_a_batch(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "_BATCH_TOKENS", 1000)
    chunks = {str(i): random_ids(rng, 100) for i in range(300)}
    index = index_of(chunks)
    assert len(index) == 300
    prompt = [token for ids in chunks.values() for token in ids]
    assert [match.key for match in index.locate(prompt)] == list(chunks)


def test_anchor_runs_stay_few(rng: random.Random) -> None:
    index = ChunkIndex()
    for i in range(2000):
        index.add(str(i), random_ids(rng, 40))
    sizes = [len(run.rows_A) for run in index._runs]
    assert sum(sizes) == 3 * 2000  # two anchors and a rung
    assert all(older >= 8 * newer for older, newer in pairwise(sizes))


def test_discarded_chunks_are_gone_and_can_come_back(chunks: Chunks) -> None:
    index = index_of(chunks)
    prompt = [token for ids in chunks.values() for token in ids]
    index.discard("chunk100")
    index.discard("never added")
    assert "chunk100" not in index
    assert "chunk400" in index
    assert len(index) == len(chunks) - 1
    assert [m.key for m in index.locate(prompt)] == [key for key in chunks if key != "chunk100"]
    index.add("chunk100", chunks["chunk100"])
    assert [m.key for m in index.locate(prompt)] == list(chunks)


def test_a_discarded_chunk_uncovers_the_others(rng: random.Random) -> None:
    outer = random_ids(rng, 300)
    index = index_of({"outer": outer, "inner": outer[100:200]})
    index.discard("outer")
    assert index.locate(outer) == [Match(100, 200, "inner", 0, 100)]


def test_memory_returns_after_many_discards(rng: random.Random) -> None:
    chunks = {str(i): random_ids(rng, 200) for i in range(1000)}
    index = index_of(chunks)
    full = index.nbytes
    for i in range(990):
        index.discard(str(i))
    assert len(index) == 10
    assert index.nbytes < full / 20
    rest = {key: chunks[key] for key in list(chunks)[990:]}
    prompt = [token for ids in chunks.values() for token in ids]
    assert [match.key for match in index.locate(prompt)] == list(rest)


def test_memory_stays_bounded_while_chunks_come_and_go(rng: random.Random) -> None:
    index = ChunkIndex()
    for i in range(100):
        index.add(str(i), random_ids(rng, 200))
    full = index.nbytes
    for i in range(100, 1500):
        index.add(str(i), random_ids(rng, 200))
        index.discard(str(i - 100))
        assert index.nbytes < 3 * full
    assert len(index) == 100


def test_random_history_equals_a_fresh_index(rng: random.Random, all_followed: None) -> None:
    index, live = ChunkIndex(), dict[str, list[int]]()
    pool = {str(i): random_ids(rng, rng.randrange(16, 90), vocabulary=2) for i in range(60)}
    prompt = [token for ids in pool.values() for token in ids]
    for _ in range(600):
        key = rng.choice(list(pool))
        if key in live:
            index.discard(key)
            del live[key]
        else:
            index.add(key, pool[key])
            live[key] = pool[key]
        assert len(index) == len(live)
    assert index.locate(prompt) == index_of(live).locate(prompt)


def test_a_query_keeps_the_state_it_began_with(chunks: Chunks) -> None:
    index = index_of(chunks)
    before = index._snapshot
    for key in chunks:
        index.discard(key)
    index.add("new", chunks["chunk33"])
    assert before.alive.all()
    assert before.keys == list(chunks)
    rows = zip(before.starts, before.lengths, strict=True)
    assert [before.tokens[start : start + n].tolist() for start, n in rows] == list(chunks.values())


# --- fast equals slow ----------------------------------------------------------------------------


def random_prompt(rng: random.Random, chunks: Chunks) -> tuple[list[int], list[Span]]:
    """Whole and truncated chunks with glue, and the spans the docstring promises to find."""
    prompt, promised = random_ids(rng, rng.randrange(40)), []
    for _ in range(rng.randrange(1, 8)):
        key = rng.choice(list(chunks))
        ids = chunks[key]
        first = rng.choice([0, 0, rng.randrange(4), rng.randrange(len(ids))])
        last = len(ids) - rng.choice([0, 0, rng.randrange(4), rng.randrange(len(ids))])
        piece = ids[first:last]
        is_edge = (first <= 8 and last >= 32) or last >= len(ids) - 8
        if len(piece) >= (32 if is_edge else 79):
            promised.append((len(prompt), len(prompt) + len(piece), key, first))
        prompt += piece + random_ids(rng, rng.choice([0, 1, 2, 30]))
    return prompt, promised


@pytest.fixture(scope="module")
def all_followed() -> Iterator[None]:
    """No limit to the anchors that are followed, as the slow twin has none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "MAX_ANCHORS", 1_000_000)
        yield


@pytest.mark.parametrize("seed", range(250))
def test_random_prompts(seed: int) -> None:
    rng = random.Random(seed)
    chunks = {str(i): random_ids(rng, rng.randrange(32, 160)) for i in range(6)}
    chunks["overlap"] = chunks["0"][-20:] + random_ids(rng, 40)
    prompt, promised = random_prompt(rng, chunks)
    matches = index_of(chunks).locate(prompt)
    assert_sound(matches, chunks, prompt)
    covered = {at for match in matches for at in range(match.start, match.end)}
    assert covered.issuperset(at for span in promised for at in range(span[0], span[1]))
    assert matches == resolve(chunks, visible_spans(chunks, prompt, 32), 32)


TINY_IDS = st.lists(st.integers(0, 1), max_size=60)


@st.composite
def repetitive_cases(draw: st.DrawFn) -> tuple[Chunks, list[int]]:
    """Chunks and prompts made of few blocks, so that nearly everything overlaps everything."""
    blocks = draw(st.lists(st.lists(st.integers(0, 2), min_size=5, max_size=30), min_size=1))
    text = st.lists(st.sampled_from(blocks), max_size=6).map(lambda parts: [*chain(*parts)])
    chunks = draw(st.lists(text | TINY_IDS, max_size=4))
    return {str(i): ids for i, ids in enumerate(chunks)}, draw(text | TINY_IDS)


@settings(max_examples=300, deadline=None)
@given(repetitive_cases(), st.integers(16, 40))
def test_repetitive_prompts_equal_the_slow_twin(
    all_followed: None, case: tuple[Chunks, list[int]], min_tokens: int
) -> None:
    chunks, prompt = case
    matches = index_of(chunks).locate(prompt, min_tokens=min_tokens)
    assert_sound(matches, chunks, prompt, min_tokens)
    spans = visible_spans(chunks, prompt, min_tokens)
    assert matches == resolve(chunks, spans, min_tokens)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_promised_spans_are_all_spans(all_followed: None, data: st.DataObject) -> None:
    """With distinct ids and pieces the docstring promises, the anchors lose nothing."""
    lengths = data.draw(st.lists(st.integers(32, 200), min_size=1, max_size=4))
    ids = iter(range(10_000))
    chunks = {str(i): [next(ids) for _ in range(n)] for i, n in enumerate(lengths)}
    prompt: list[int] = []
    for key in data.draw(st.lists(st.sampled_from(list(chunks)), max_size=5)):
        head = data.draw(st.integers(0, 8))
        kept = data.draw(st.integers(32, 200))
        prompt += [next(ids), *chunks[key][head : head + max(kept, 32 - head)]]
    spans = list(all_spans(chunks, prompt, 32))
    assert index_of(chunks).locate(prompt) == resolve(chunks, spans, 32)


# --- hash collisions -----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_equal_ids_decide_where_hashes_collide(
    rng: random.Random, monkeypatch: pytest.MonkeyPatch, all_followed: None, bits: int
) -> None:
    levels, windows = hashes_module.hash_levels, hashes_module.window_hashes
    low_bits = np.uint64((1 << 64 - bits) - 1)

    def weak_levels(windows: Any, longest: int) -> Any:
        return [hashes & ~low_bits for hashes in levels(windows, longest)]

    for module in (hashes_module, index_module):  # of chunks, and of prompts
        monkeypatch.setattr(module, "hash_levels", weak_levels)
        monkeypatch.setattr(module, "window_hashes", lambda ids: windows(ids) & ~low_bits)
    found = 0
    for _ in range(20):  # hashes are secret, and differ from run to run
        chunks = {str(i): random_ids(rng, rng.randrange(32, 120)) for i in range(12)}
        prompt, _ = random_prompt(rng, chunks)
        matches = index_of(chunks).locate(prompt)
        assert_sound(matches, chunks, prompt)
        found += bool(matches)
    assert found or bits < 8  # more collisions than are followed


# --- threads -------------------------------------------------------------------------------------


def test_adding_and_discarding_while_others_locate(rng: random.Random) -> None:
    chunks = {str(i): random_ids(rng, rng.randrange(32, 200)) for i in range(900)}
    keys = list(chunks)
    stable, passing = keys[:20], keys[20:]
    index = index_of({key: chunks[key] for key in stable})
    prompt = [token for key in stable + passing[::10] for token in chunks[key]]
    writers_done = threading.Event()

    def write(own: list[str]) -> None:
        for key in own:
            index.add(key, chunks[key])
        for key in own[::2]:
            index.discard(key)

    def read() -> int:
        queries = 0
        while not writers_done.is_set():
            matches = index.locate(prompt)
            assert_sound(matches, chunks, prompt)
            assert [match.key for match in matches][:20] == stable
            queries += 1
        return queries

    shares = [passing[0::2], passing[1::2]]
    with ThreadPoolExecutor(6) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        # Two writers per share, so that the same keys are added twice at about the same time.
        writers = [pool.submit(write, share) for share in shares * 2]
        try:
            for writer in writers:
                writer.result()
        finally:
            writers_done.set()
        assert all(reader.result() > 0 for reader in readers)

    kept = [*stable, *chain(*(share[1::2] for share in shares))]
    assert {key for key in chunks if key in index} == set(kept)
    located = index.locate([token for key in kept for token in chunks[key]])
    assert [match.key for match in located] == kept


# --- the quick way, and the way that any prompt can go ------------------------------------------


def both_ways(
    index: ChunkIndex, prompt: list[int], monkeypatch: pytest.MonkeyPatch, least: int = 32
) -> bool:
    """Whether the quick way answered; both must say the same."""
    quick = index.locate(prompt, min_tokens=least)
    answers: list[object] = []
    with monkeypatch.context() as patch:

        def noting(*given: Any) -> None:
            answers.append(plain.plainly_there(*given))

        patch.setattr(index_module, "plainly_there", noting)
        assert index.locate(prompt, min_tokens=least) == quick
    assert answers in ([], [None], [quick])  # none: there is nothing to look for
    return answers == [quick] and bool(quick)


def test_whole_chunks_apart_from_one_another_are_found_the_quick_way(
    rng: random.Random, chunks: Chunks, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = [t for ids in chunks.values() for t in [*ids, *random_ids(rng, rng.randrange(3))]]
    prompt = random_ids(rng, 20) + body + random_ids(rng, 30)
    assert both_ways(index_of(chunks), prompt, monkeypatch)
    for at in (0, 7, 393, 399):  # a tokeniser merged what stands at an end of the last two
        changed = prompt.copy()
        changed[20 + body.index(chunks["chunk400"][0]) + at] = -1
        assert both_ways(index_of(chunks), changed, monkeypatch), at


@pytest.mark.parametrize("kind", ["cut", "twice", "within", "changed", "dropped", "overlapping"])
def test_anything_else_is_not(
    kind: str, rng: random.Random, chunks: Chunks, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = chunks["chunk400"]
    index = index_of(
        chunks | {"more": ids[:200] + random_ids(rng, 50)} if kind == "twice" else chunks
    )
    if kind == "overlapping":
        index.add("beside", ids[-60:] + random_ids(rng, 100))
        ids = ids + index_tokens(index, "beside")[60:]
    changed = [*ids[:190], -1, *ids[191:]]
    body = {"cut": ids[40:], "within": ids[:300], "changed": changed}.get(kind, ids)
    if kind == "dropped":
        index.discard("chunk400")
    is_quick = both_ways(index, random_ids(rng, 20) + body + random_ids(rng, 30), monkeypatch)
    assert not is_quick


def index_tokens(index: ChunkIndex, key: str) -> list[int]:
    view = index._snapshot
    row = view.keys.index(key)
    first = int(view.starts[row])
    return view.tokens[first : first + int(view.lengths[row])].tolist()


def test_both_ways_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over chunks that begin or end alike, parts, changed ends, discarded chunks, several runs."""
    monkeypatch.setattr(index_module, "_SMALL_RUN", 8)
    quick = 0
    for seed in range(400):
        rng = random.Random(seed)
        vocabulary = rng.choice([2, 40, VOCABULARY, VOCABULARY])
        sizes = rng.choice([[15, 16, 20, 31, 40], [40, 64, 90, 150, 220]])
        chunks = {
            f"c{n}": random_ids(rng, rng.choice(sizes), vocabulary)
            for n in range(rng.randrange(1, 6))
        }
        if rng.random() < 0.2:
            chunks["alike"] = chunks["c0"][: rng.choice([20, 40])] + random_ids(rng, 40, vocabulary)
        index = ChunkIndex()
        for key, ids in chunks.items():
            index.add(key, ids)  # a run each
        if rng.random() < 0.2:
            index.discard("c0")
        prompt = random_ids(rng, rng.randrange(20), vocabulary)
        for _ in range(rng.randrange(1, 6)):
            ids = rng.choice(list(chunks.values())).copy()
            for _ in range(rng.choice([0, 0, 0, 1, 3])):
                at = rng.choice([0, 5, 9, -1, -6, -12, rng.randrange(len(ids))])
                ids[at] = rng.randrange(vocabulary)
            prompt += ids[rng.choice([0, 0, 0, 5]) : len(ids) - rng.choice([0, 0, 0, 5])]
        quick += both_ways(index, prompt, monkeypatch, rng.choice([16, 24, 32, 80]))
    assert quick > 40
