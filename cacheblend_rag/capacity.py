"""How large a fleet has to be: arithmetic over measured costs, and over what one assumes. Pure.

Which chunks are asked for is drawn by Zipf's law. What an LRU memory holds of them is by Che's
approximation: a chunk is in memory if it was asked for within a time that is the same for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from cacheblend_rag.errors import ConfigError

_BINS_A_DECADE = 200  # of ranks by popularity; the first thousand ranks are bins of their own
_EXACT = 1000
_HALVINGS = 60


def _input(text: str, default: float | None, source: str, least: float, most: float = 1e18) -> Any:
    about = {"text": text, "source": source, "least": least, "most": most}
    return field(metadata=about) if default is None else field(default=default, metadata=about)


_H200 = "measured: H200, Llama 8B, 6 x 1,024 tokens (docs/results.md)"
_ASSUMED = "assumed"


@dataclass(frozen=True, kw_only=True)
class CapacityInputs:
    """What a plan is made from; each field's metadata say what it is and where its default is from.

    Raises:
        ConfigError: a value is out of range.
    """

    corpus_tokens: float = _input("tokens of all texts", None, "given", 1)
    qps: float = _input("requests a second", None, "given", 0)
    token_bytes: float = _input("bytes of KV of a token, as stored", None, "given", 1)
    chunk_tokens: float = _input("tokens of a chunk", 512, _ASSUMED, 32)
    chunks: float = _input("chunks in a request", 6, _ASSUMED, 1)
    fresh_tokens: float = _input("tokens of a request that are in no chunk", 200, _ASSUMED, 0)
    answer_tokens: float = _input("tokens of an answer", 200, _ASSUMED, 0)
    zipf: float = _input(
        "exponent of Zipf's law, by which chunks are asked for", 0.9, _ASSUMED, 0, 10
    )
    memory_bytes: float = _input("bytes of KV in a replica's memory", 64 * 2**30, _ASSUMED, 0)
    store_bytes: float = _input("bytes of KV in the store; 0: all fits", 0, _ASSUMED, 0)
    store_gbit: float = _input("Gbit a second from the store to a replica", 25, _ASSUMED, 1e-6)
    prefill_tokens_s: float = _input("tokens a second of a full prefill", 40_000, _H200, 1e-3)
    blend_share: float = _input(
        "time of a blend, all chunks in memory, over that of a full prefill", 0.32, _H200, 0, 1
    )
    decode_tokens_s: float = _input("tokens a second that a replica decodes", 2500, _ASSUMED, 1e-3)
    busy: float = _input("share of its time that a replica may be busy", 0.7, _ASSUMED, 0.01, 1)

    def __post_init__(self) -> None:
        for about in fields(self):
            value, limits = getattr(self, about.name), about.metadata
            if not limits["least"] <= value <= limits["most"]:  # NaN is out of every range
                raise ConfigError(
                    f"{about.name} must be {limits['least']:g} to {limits['most']:g}, got {value}"
                )


class CapacityPlan(NamedTuple):
    """Attributes:
    chunks: in the corpus.
    kv_bytes: of all of them.
    store_share: of what is asked for, in the store.
    memory_share: of what is asked for, in a replica's memory, with requests sent anywhere.
    routed_share: the most of it that routing by warmth can reach: all memories as one.
    fetch_s: until a chunk has come from the store.
    compute_s: of the same chunk.
    fetches: whether chunks that are not in memory are fetched; else they are computed.
    network_bytes_s: from the store to all replicas, requests sent anywhere.
    routed_network_bytes_s: the least of it, with routing.
    link_share: of what a replica's link to the store carries, requests sent anywhere.
    full_s, blend_s: a replica's work until the first token of a request, by a full prefill and
        with blending.
    replicas_full, replicas: without and with blending.
    ingest_s: of the corpus on one replica that does nothing else.
    """

    chunks: int
    kv_bytes: float
    store_share: float
    memory_share: float
    routed_share: float
    fetch_s: float
    compute_s: float
    fetches: bool
    network_bytes_s: float
    routed_network_bytes_s: float
    link_share: float
    full_s: float
    blend_s: float
    replicas_full: int
    replicas: int
    ingest_s: float


def plan_capacity(given: CapacityInputs) -> CapacityPlan:
    """What a fleet needs. A hit rate depends on the number of replicas where requests are routed,
    and that on the hit rate: the number is that for requests sent anywhere.
    """
    chunks = math.ceil(given.corpus_tokens / given.chunk_tokens)
    chunk_bytes = given.chunk_tokens * given.token_bytes
    popularity = Popularity(chunks, given.zipf)
    in_store = popularity.hit_rate((given.store_bytes or math.inf) / chunk_bytes)
    in_memory = popularity.hit_rate(given.memory_bytes / chunk_bytes)
    fetch_s = chunk_bytes / (given.store_gbit * 1e9 / 8)
    compute_s = given.chunk_tokens / given.prefill_tokens_s
    fetches = fetch_s < compute_s * (1 - given.blend_share)
    reusable = max(in_store, in_memory) if fetches else in_memory

    asked_tokens = given.chunks * given.chunk_tokens
    prompt_tokens = asked_tokens + given.fresh_tokens
    full_s = prompt_tokens / given.prefill_tokens_s
    reused = reusable * asked_tokens / prompt_tokens
    blend_s = full_s * (1 - reused * (1 - given.blend_share))
    decode_s = given.answer_tokens / given.decode_tokens_s

    def needed(prefill_s: float) -> int:
        return max(1, math.ceil(given.qps * (prefill_s + decode_s) / given.busy))

    def network(share_in_memory: float) -> float:
        wanted = max(0.0, in_store - share_in_memory) if fetches else 0.0
        return given.qps * given.chunks * chunk_bytes * wanted

    replicas = needed(blend_s)
    routed = popularity.hit_rate(replicas * given.memory_bytes / chunk_bytes)
    return CapacityPlan(
        chunks=chunks,
        kv_bytes=chunks * chunk_bytes,
        store_share=in_store,
        memory_share=in_memory,
        routed_share=routed,
        fetch_s=fetch_s,
        compute_s=compute_s,
        fetches=fetches,
        network_bytes_s=network(in_memory),
        routed_network_bytes_s=network(routed),
        link_share=network(in_memory) / replicas / (given.store_gbit * 1e9 / 8),
        full_s=full_s,
        blend_s=blend_s,
        replicas_full=needed(full_s),
        replicas=replicas,
        ingest_s=given.corpus_tokens / given.prefill_tokens_s,
    )


class Popularity:
    """How often each of ``count`` chunks is asked for: rank ``r`` by ``r ** -exponent``. Ranks of
    about the same frequency share a bin, so that a billion chunks take no longer than a thousand.
    """

    def __init__(self, count: int, exponent: float) -> None:
        weight = _integral(exponent)
        self._bins = list[tuple[int, float]]()  # ranks, and how often one of them is asked for
        for first, end in _ranks(count):
            ranks = end - first
            total = first**-exponent if ranks == 1 else weight(first - 0.5, end - 0.5)
            self._bins.append((ranks, total / ranks))
        whole = sum(ranks * each for ranks, each in self._bins)
        self._bins = [(ranks, each / whole) for ranks, each in self._bins]
        self._count = count

    def hit_rate(self, held: float) -> float:
        """Share of what is asked for that an LRU memory of ``held`` chunks has."""
        if held >= self._count:
            return 1.0
        # as many requests ago, in the logarithm, is the last use of the oldest chunk in memory
        low, high = -60.0, 120.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            inside = sum(n * -math.expm1(-p * math.exp(middle)) for n, p in self._bins)
            low, high = (middle, high) if inside < held else (low, middle)
        found = sum(n * p * -math.expm1(-p * math.exp(low)) for n, p in self._bins)
        return min(1.0, found)  # but for rounding


def _integral(exponent: float) -> Callable[[float, float], float]:
    """Of ``x ** -exponent``, which is the sum over ranks but for a hundredth of a per cent here."""
    if abs(exponent - 1) < 1e-9:
        return lambda low, high: math.log(high / low)
    power = 1 - exponent
    return lambda low, high: float((high**power - low**power) / power)


def _ranks(count: int) -> Iterator[tuple[int, int]]:
    """Bins of ranks: from the first to before the second."""
    first = 1
    while first <= count:
        wide = 1 if first < _EXACT else math.ceil(first * (10 ** (1 / _BINS_A_DECADE) - 1))
        yield first, min(first + wide, count + 1)
        first += wide


def kv_token_bytes(config: Mapping[str, Any], *, eight_bits: bool = False) -> float:
    """Bytes that the store takes for a token, by a model's ``config.json``.

    Args:
        eight_bits: as stored with ``dtype=fp8``.

    Raises:
        ConfigError: it does not say.
    """
    config = config.get("text_config") or config
    try:
        layers, heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
        if rank := config.get("kv_lora_rank"):  # latent attention: one row for all heads
            elements = layers * (int(rank) + int(config["qk_rope_head_dim"]))
        else:
            kv_heads = int(config.get("num_key_value_heads") or heads)
            size = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
            elements = 2 * layers * kv_heads * size
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"config.json does not say how large its KV is ({error}); give --token-bytes"
        ) from error
    dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    return elements * (1 if eight_bits else 4 if dtype == "float32" else 2)
