"""The hashes of a request's blocks in vLLM's prefix cache: the only file that changes them.

vLLM looks a request up by ``request.block_hashes``, a chain: each hash holds all tokens before its
block's end. It puts blocks into its cache under the same hashes when it allocates them, which for a
blend is before they are written. So a blend's new blocks get hashes that nobody else has; the
chain of the blocks that follow goes on from there. When the blend is whole, ``BlendedPrefixes``
tells later requests that begin with the same tokens and ask for the same settings which hashes to
look for. When refinement has made a request's KV exact, its blocks get the hashes that vLLM gives.
A block that was never written can so be found by nobody but the request that owns it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

_MOST_HASHES = 1 << 20  # kept, exact and blended: 32 bytes each


def private(hashes: Sequence[bytes], first: int, tag: str, end: int | None = None) -> list[bytes]:
    """``hashes`` whose blocks from number ``first`` on, up to ``end``, are found by nobody who
    lacks ``tag``.
    """
    tail = tag.encode()
    # Every hash is changed, not only the first one: vLLM compares each by itself, and hashes what
    # is generated behind the last of them.
    hidden = (hashlib.sha256(h + tail).digest() for h in hashes[first:end])
    return [*hashes[:first], *hidden, *(hashes[end:] if end is not None else ())]


def hide(request: Any, first: int, tag: str, end: int | None = None) -> None:
    """Give a request's blocks from number ``first`` on hashes that nobody has who lacks ``tag``:
    those that are full, and the one that is filled next.

    ``end``: of the blocks that need it; those from there on are hidden already.
    """
    request.block_hashes = private(request.block_hashes, first, tag, end)
    if end is not None:
        return
    hasher = getattr(request, "_block_hasher", None)
    if first < len(request.block_hashes) or hasher is None:
        return  # what comes is named after the last of them
    # All full blocks keep their hashes. The next one begins with what the prompt has behind them,
    # and would be named like an exact one as soon as the answer has filled it.
    request._block_hasher = _Hasher(getattr(hasher, "plain", hasher), first, tag)


def first_hidden(request: Any, exact: Sequence[bytes]) -> int | None:
    """The number of the first block of a request that only those find who may; None if all do.

    ``exact``: the hashes of its prompt's blocks before they were changed.
    """
    for number, (found, plainly) in enumerate(zip(request.block_hashes, exact, strict=False)):
        if found != plainly:
            return number
    hasher = getattr(request, "_block_hasher", None)
    return hasher.first if isinstance(hasher, _Hasher) else None


class _Hasher(NamedTuple):
    """vLLM's own hasher of a request, which hides the blocks from number ``first`` on."""

    plain: Callable[[Any], list[bytes]]
    first: int
    tag: str

    def __call__(self, request: Any) -> list[bytes]:
        before, found = len(request.block_hashes), self.plain(request)
        return private(found, max(0, self.first - before), self.tag)


def tokens_per_hash(request: Any, hash_block_size: int | None, block_size: int) -> int:
    """How many tokens a hash of ``request`` stands for."""
    # vLLM may hash smaller units than its blocks. How many hashes there are tells which it did.
    if hash_block_size and request.num_tokens // hash_block_size == len(request.block_hashes):
        return hash_block_size
    return block_size


class Prefix(NamedTuple):
    """The blocks of a request whose blend is whole.

    Attributes:
        full: how many of them hold nothing but the prompt; rest: its tokens behind those.
        exact: their hashes without a blend; blended: those they are under.
    """

    full: int
    rest: tuple[int, ...]
    exact: Sequence[bytes]
    blended: Sequence[bytes]

    @classmethod
    def of(cls, request: Any, of_prompt: Sequence[bytes], per_hash: int) -> Prefix:
        """Of a request that ended.

        Args:
            of_prompt: the hashes of its prompt's blocks before they were changed.
            per_hash: tokens a hash stands for.
        """
        prompt = request.prompt_token_ids
        full = min(len(prompt) // per_hash, len(of_prompt))
        rest = tuple(prompt[full * per_hash :])
        return cls(full, rest, plain(request, of_prompt), list(request.block_hashes))


def plain(request: Any, of_prompt: Sequence[bytes]) -> list[bytes]:
    """The hashes a request would have had without a blend, by vLLM's own hasher.

    ``of_prompt``: the hashes of its prompt's blocks before they were changed.
    """
    # vLLM's hasher goes on from the last hash that is there. So it computes those of the answer as
    # if the prompt had not been blended.
    blended, request.block_hashes = request.block_hashes, list(of_prompt)
    hasher = getattr(request, "_block_hasher", None)
    request._block_hasher = getattr(hasher, "plain", hasher)
    try:
        request.update_block_hashes()
        return list(request.block_hashes)
    finally:
        request.block_hashes, request._block_hasher = blended, hasher


def is_cached(pool: Any, hashes: Sequence[bytes], number: int) -> bool:
    """Whether vLLM has block ``number``; not where its ``pool`` is not known."""
    there = number < len(hashes) and pool is not None
    return there and bool(pool.get_cached_block(hashes[number], [0]))


def cached(pool: Any, hashes: Sequence[bytes]) -> int:
    """How many blocks vLLM would find by ``hashes``; 0 where its ``pool`` is not known."""
    count = 0
    while pool is not None and count < len(hashes) and pool.get_cached_block(hashes[count], [0]):
        count += 1
    return count


def make_plain(pool: Any, request: Any, of_prompt: Sequence[bytes], block_size: int) -> None:
    """Give the blocks of a request all of whose KV has become exact the hashes that they would have
    had without a blend. Everybody finds them then, and those that are filled later.

    Args:
        pool: vLLM's block pool.
        of_prompt: the hashes of its prompt's blocks before they were changed.
    """
    hidden, hashes = request.block_hashes, plain(request, of_prompt)
    blocks = []
    # By their hashes, not by their numbers: nobody else has these, and vLLM takes a block's away
    # when it hands the block on. So what is found is this request's, whatever happened meanwhile.
    for before, after in zip(hidden, hashes, strict=False):
        found = pool.get_cached_block(before, [0]) if before != after else None
        blocks.append(found[0] if found else pool.null_block)
    pool.evict_blocks({block.block_id for block in blocks if not block.is_null})
    hasher = getattr(request, "_block_hasher", None)
    request.block_hashes, request._block_hasher = hashes, getattr(hasher, "plain", hasher)
    pool.cache_full_blocks(request, blocks, 0, len(blocks), block_size, 0)  # but the null block


class BlendedPrefixes:
    """Prompts whose blended blocks are whole, least recently used ones forgotten.

    A prompt is found by the exact hash of its last full block, by the tokens behind that, and by
    the settings of the blend. So a follow-up turn finds the turns before it, blended chunks and
    answer included, and a prompt that merely begins with the same chunks finds nothing.
    """

    def __init__(self, most_hashes: int = _MOST_HASHES) -> None:
        self._most, self._count = most_hashes, 0
        self._known: OrderedDict[tuple[bytes, str], dict[tuple[int, ...], Prefix]] = OrderedDict()

    def add(self, prefix: Prefix, settings: str) -> None:
        """Note a prompt, and what was generated behind it."""
        # A prompt shorter than a block has no hash that it could be found by.
        if not prefix.full:
            return
        key = prefix.exact[prefix.full - 1], settings
        same = self._known.setdefault(key, {})
        self._known.move_to_end(key)
        old = same.get(prefix.rest)
        same[prefix.rest] = prefix
        self._count += len(prefix.exact) - (len(old.exact) if old else 0)
        # The newest prompt stays, however long it is: the next turn of its chat comes soon.
        while self._count > self._most and len(self._known) > 1:
            _, gone = self._known.popitem(last=False)
            self._count -= sum(len(p.exact) for p in gone.values())

    def find(
        self, exact: Sequence[bytes], prompt: Sequence[int], settings: str, per_hash: int
    ) -> list[bytes] | None:
        """The hashes to look for in place of ``exact``, the first of them blended; None where no
        blended prompt is a beginning of this one.
        """
        # From the end: the longest common beginning leaves the fewest tokens to compute.
        for full in range(len(exact), 0, -1):
            same = self._known.get((exact[full - 1], settings))
            fitting = [p for p in (same or {}).values() if _begins(prompt, full * per_hash, p.rest)]
            if fitting:
                self._known.move_to_end((exact[full - 1], settings))
                return _joined(exact, max(fitting, key=lambda p: len(p.rest)))
        return None


def _begins(prompt: Sequence[int], at: int, rest: tuple[int, ...]) -> bool:
    return tuple(prompt[at : at + len(rest)]) == rest


def _joined(exact: Sequence[bytes], prefix: Prefix) -> list[bytes]:
    """The blended hashes as far as the tokens are the same, then those of what comes behind."""
    same = 0
    for mine, theirs in zip(exact, prefix.exact, strict=False):
        if mine != theirs:
            break
        same += 1
    # What follows is named after the last blended hash, not at random: a third request that goes on
    # like this one finds the blocks that this one leaves.
    return [*prefix.blended[:same], *private(exact[same:], 0, prefix.blended[same - 1].hex())]
