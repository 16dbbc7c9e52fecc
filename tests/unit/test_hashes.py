"""Which blocks of a blend are found by whom. Hashes are made as vLLM does: a chain over tokens."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from cacheblend_rag.engine.hashes import (
    BlendedPrefixes,
    Prefix,
    cached,
    hide,
    make_plain,
    private,
    tokens_per_hash,
)

BLOCK = 4


def chain(tokens: Sequence[int], start: Sequence[bytes] = ()) -> list[bytes]:
    """``start`` and the hashes of the full blocks behind it."""
    hashes = list(start)
    for at in range(len(hashes) * BLOCK, len(tokens) - BLOCK + 1, BLOCK):
        before = hashes[-1] if hashes else b""
        hashes.append(
            hashlib.sha256(before + repr(tuple(tokens[at : at + BLOCK])).encode()).digest()
        )
    return hashes


class Request(SimpleNamespace):
    """As vLLM's, of the parts that are used."""

    def __init__(self, prompt: Sequence[int]) -> None:
        super().__init__(prompt_token_ids=tuple(prompt), all=tuple(prompt))
        self.block_hashes = chain(self.all)
        self._block_hasher = lambda request: chain(self.all, request.block_hashes)[
            len(request.block_hashes) :
        ]

    @property
    def num_tokens(self) -> int:
        return len(self.all)

    def generate(self, tokens: Sequence[int]) -> None:
        self.all += tuple(tokens)
        self.update_block_hashes()

    def update_block_hashes(self) -> None:
        self.block_hashes = [*self.block_hashes, *self._block_hasher(self)]


def blended(prompt: Sequence[int], answer: Sequence[int], first: int = 1) -> tuple[Any, Prefix]:
    """A request that ended after its blend, and what is noted of it."""
    request = Request(prompt)
    exact = list(request.block_hashes)
    hide(request, first, f"nonce {random.random()}")
    request.generate(answer)
    return request, Prefix.of(request, exact, BLOCK)


def find(known: BlendedPrefixes, prompt: Sequence[int], settings: str = "s") -> list[bytes] | None:
    return known.find(chain(prompt), tuple(prompt), settings, BLOCK)


def test_private_blocks_are_nobody_elses() -> None:
    exact = chain(range(20))
    one, other = private(exact, 2, "one"), private(exact, 2, "other")
    assert one[:2] == other[:2] == exact[:2]
    assert not set(one[2:]) & (set(exact) | set(other[2:]))


def test_the_same_prompt_finds_its_blocks_and_no_exact_request_does() -> None:
    known, prompt = BlendedPrefixes(), range(22)
    assert find(known, prompt) is None
    request, prefix = blended(prompt, range(100, 104))
    known.add(prefix, "s")
    found = find(known, prompt)
    assert found == request.block_hashes[: len(chain(prompt))]
    assert not set(chain([*prompt, *range(100, 104)])[1:]) & set(request.block_hashes)
    assert find(known, prompt, settings="other") is None


@pytest.mark.parametrize("length", [20, 22])
def test_another_question_behind_the_same_chunks_finds_nothing(length: int) -> None:
    """Also where the question fills no block, so that all full blocks are the same."""
    known = BlendedPrefixes()
    known.add(blended(range(length), range(100, 108))[1], "s")
    assert find(known, [*range(length - 1), 77]) is None
    assert find(known, [*range(length - 1), 77, *range(30)]) is None


def test_a_follow_up_finds_question_and_answer() -> None:
    known, first, answer = BlendedPrefixes(), range(22), range(100, 111)
    request, prefix = blended(first, answer)
    known.add(prefix, "s")
    second = [*first, *answer, *range(200, 210)]
    found = find(known, second)
    assert found is not None
    whole = (len(first) + len(answer)) // BLOCK
    assert found[:whole] == request.block_hashes[:whole]
    assert not set(found[whole:]) & set(chain(second)), "what is behind is not exact either"
    edited = find(known, [*first, *answer[:5], 0, *answer[6:], *range(200, 210)])
    same = (len(first) + 5) // BLOCK
    assert edited is not None
    assert edited[:same] == found[:same] and not set(edited[same:]) & set(found)


def test_the_longest_history_is_found() -> None:
    known, first, answer = BlendedPrefixes(), range(22), range(100, 111)
    known.add(blended(first, answer)[1], "s")
    second = [*first, *answer, *range(200, 210)]
    request, prefix = blended(second, range(300, 305))
    known.add(prefix, "s")
    third = [*second, *range(300, 305), *range(400, 403)]
    found = find(known, third)
    assert found is not None and found[:11] == request.block_hashes[:11]


def test_what_hangs_behind_two_blends_is_kept_apart() -> None:
    """The same tokens behind a prefix blended in two ways are two different things."""
    known, prompt = BlendedPrefixes(), range(22)
    for settings in ("s", "t"):
        known.add(blended(prompt, [])[1], settings)
    longer = [*prompt, *range(50, 60)]
    one, other = find(known, longer, "s"), find(known, longer, "t")
    assert one is not None and other is not None and not set(one[1:]) & set(other[1:])


def test_a_prompt_shorter_than_a_block_is_not_noted() -> None:
    known = BlendedPrefixes()
    known.add(blended(range(3), range(100, 120))[1], "s")
    assert find(known, [*range(3), *range(100, 120)]) is None


@pytest.mark.parametrize("prompt", [2, 3, 4, 6, 8, 11])
@pytest.mark.parametrize("first", [0, 1, 2])
def test_no_block_that_an_answer_fills_is_named_like_an_exact_one(prompt: int, first: int) -> None:
    """Its beginning is of the prompt, and approximate: also where no block of it was full."""
    request, plain = Request(range(prompt)), Request(range(prompt))
    hide(request, first, "tag")
    for tokens in (range(100, 103), range(200, 211)):
        request.generate(tokens)
        plain.generate(tokens)
    shared = min(first, len(plain.block_hashes))
    assert len(request.block_hashes) == len(plain.block_hashes)
    assert request.block_hashes[:shared] == plain.block_hashes[:shared]
    assert not set(request.block_hashes[shared:]) & set(plain.block_hashes)


def test_what_was_hidden_is_hidden_anew_after_a_preemption() -> None:
    request, plain = Request(range(6)), Request(range(6))
    for tag in ("one", "other"):
        hide(request, 1, tag)
        request.generate([7])
        plain.generate([7])
    assert request.block_hashes[:1] == plain.block_hashes[:1]
    assert request.block_hashes[1] != plain.block_hashes[1]
    assert Prefix.of(request, chain(range(6)), BLOCK).exact == plain.block_hashes


def test_vllms_own_request_is_hidden_before_its_first_block_is_full() -> None:
    pytest.importorskip("vllm")
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request as VllmRequest

    init_none_hash(sha256)
    hasher = get_request_block_hasher(16, sha256)

    def made(name: str) -> Any:
        ids = list(range(10))
        return VllmRequest(name, ids, SamplingParams(max_tokens=99), None, block_hasher=hasher)

    request, plain = made("a"), made("b")
    hide(request, 0, "tag")
    for one in (request, plain):
        one.append_output_token_ids(list(range(40)))
    assert len(request.block_hashes) == len(plain.block_hashes) == 3
    assert not set(request.block_hashes) & set(plain.block_hashes)
    assert Prefix.of(request, [], 16).exact == plain.block_hashes


def test_the_least_recently_used_prompts_are_forgotten() -> None:
    known = BlendedPrefixes(most_hashes=30)
    prompts = [range(start, start + 22) for start in range(0, 1000, 100)]
    for prompt in prompts:
        known.add(blended(prompt, [])[1], "s")
        assert find(known, prompts[0]) is not None
    assert [find(known, p) is not None for p in prompts].count(True) == 30 // 5


def test_how_many_tokens_a_hash_stands_for() -> None:
    request = SimpleNamespace(num_tokens=100, block_hashes=[b""] * 6)
    assert tokens_per_hash(request, 16, 32) == 16
    assert tokens_per_hash(request, None, 16) == 16
    request.block_hashes = [b""] * 3
    assert tokens_per_hash(request, 16, 32) == 32


@pytest.mark.parametrize("first", [0, 1, 2])
def test_what_became_exact_gets_its_hashes_and_what_is_filled_later_too(first: int) -> None:
    pytest.importorskip("vllm")
    from vllm.v1.core.block_pool import BlockPool

    pool, request = BlockPool(8, enable_caching=True, hash_block_size=BLOCK), Request(range(9))
    exact = list(request.block_hashes)
    hide(request, first, "nonce")
    blocks = pool.get_new_blocks(3)
    pool.cache_full_blocks(request, blocks, 0, 2, BLOCK, 0)
    request.generate(range(20, 24))
    pool.cache_full_blocks(request, blocks, 2, 3, BLOCK, 0)
    hidden = list(request.block_hashes)
    assert cached(pool, hidden) == 3 and cached(pool, chain(request.all)) == first
    pool.evict_blocks({blocks[1].block_id})  # as if it were another request's by now

    make_plain(pool, request, exact, BLOCK)
    assert request.block_hashes == chain(request.all)
    found = [pool.get_cached_block(h, [0]) for h in request.block_hashes]
    numbers = [None if one is None else one[0].block_id for one in found]
    assert numbers == [blocks[0].block_id, None, blocks[2].block_id]
    assert cached(pool, request.block_hashes) == 1 and cached(None, hidden) == 0
    assert not any(pool.get_cached_block(h, [0]) for h in hidden[first:])
    request.generate(range(30, 34))
    assert request.block_hashes == chain(request.all)
