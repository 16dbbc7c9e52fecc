"""Capacity plans: against exact sums, a simulated cache, and numbers worked out by hand."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmark import script
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheblend_rag import ConfigError, cli
from cacheblend_rag.capacity import (
    CapacityInputs,
    Popularity,
    _ranks,
    kv_token_bytes,
    plan_capacity,
)
from cacheblend_rag.cli.capacity import quantity

HAND = {
    "corpus_tokens": 1e6, "qps": 20, "token_bytes": 131_072, "chunk_tokens": 500, "chunks": 6,
    "fresh_tokens": 1000, "answer_tokens": 100, "memory_bytes": 1e12, "store_gbit": 80,
    "prefill_tokens_s": 40_000, "blend_share": 0.5, "decode_tokens_s": 1000, "busy": 0.5,
}  # fmt: skip


def test_a_plan_worked_out_by_hand() -> None:
    plan = plan_capacity(CapacityInputs(**HAND))
    assert plan.chunks == 2000 and plan.kv_bytes == 131_072e6
    assert plan.memory_share == plan.routed_share == plan.store_share == 1
    assert plan.fetch_s == pytest.approx(65_536_000 / 10e9) and plan.compute_s == 0.0125
    assert not plan.fetches  # 6.6 ms, where half of 12.5 ms is saved
    assert plan.network_bytes_s == plan.routed_network_bytes_s == plan.link_share == 0
    assert plan.full_s == 0.1 and plan.blend_s == pytest.approx(0.1 * (1 - 0.75 * 0.5))
    assert plan.replicas_full == 8  # 20 (.1 + .1) / .5
    assert plan.replicas == 7  # 20 (.0625 + .1) / .5 = 6.5
    assert plan.ingest_s == 25


def test_what_is_not_in_memory_is_fetched_where_that_is_quicker() -> None:
    quick = CapacityInputs(**{**HAND, "memory_bytes": 0, "store_gbit": 100})
    plan = plan_capacity(quick)
    assert plan.fetches and plan.memory_share < 1e-6 and plan.blend_s == pytest.approx(0.0625)
    assert plan.network_bytes_s == pytest.approx(20 * 6 * 65_536_000, rel=1e-4)
    assert plan.link_share == pytest.approx(20 * 6 * 65_536_000 / 7 / 12.5e9, rel=1e-4)
    slow = plan_capacity(CapacityInputs(**{**HAND, "memory_bytes": 0, "store_gbit": 10}))
    assert not slow.fetches and slow.network_bytes_s == 0
    assert slow.blend_s == pytest.approx(slow.full_s, rel=1e-4)


def test_only_what_is_not_in_memory_crosses_the_network() -> None:
    half = {**HAND, "memory_bytes": 131_072e5, "store_gbit": 100}
    plan = plan_capacity(CapacityInputs(**half))
    assert plan.fetches and 0.3 < plan.memory_share < 0.7 < plan.routed_share
    for share, bytes_s in [
        (plan.memory_share, plan.network_bytes_s),
        (plan.routed_share, plan.routed_network_bytes_s),
    ]:
        assert bytes_s == pytest.approx((1 - share) * 20 * 6 * 65_536_000)


def test_a_store_that_holds_a_part_bounds_what_is_reused() -> None:
    part = {**HAND, "memory_bytes": 0, "store_gbit": 100, "store_bytes": 131_072e5}
    plan = plan_capacity(CapacityInputs(**part))
    assert 0.3 < plan.store_share < 0.7
    assert plan.blend_s == pytest.approx(0.1 * (1 - plan.store_share * 0.75 * 0.5))


@settings(max_examples=12, deadline=None)
@given(
    st.floats(1e3, 1e13), st.floats(0, 1e5), st.floats(0, 3), st.floats(0, 1e15), st.floats(0, 1e15)
)
def test_plans_are_sane(
    corpus: float, qps: float, zipf: float, memory: float, store: float
) -> None:
    common: dict[str, Any] = {"corpus_tokens": corpus, "qps": qps, "token_bytes": 1e5, "zipf": zipf}
    plan = plan_capacity(CapacityInputs(**common, memory_bytes=memory, store_bytes=store))
    for share in (plan.store_share, plan.memory_share, plan.routed_share):
        assert 0 <= share <= 1
    assert plan.routed_share >= plan.memory_share - 1e-9
    assert 1 <= plan.replicas <= plan.replicas_full
    assert plan.routed_network_bytes_s <= plan.network_bytes_s * (1 + 1e-6) + 1e-6 * qps * 512e5
    more = plan_capacity(CapacityInputs(**common, memory_bytes=memory * 2, store_bytes=store))
    assert more.memory_share >= plan.memory_share - 1e-9
    assert more.replicas <= plan.replicas + 1  # where one is all but full


# --- hit rates ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 999, 1000, 1001, 12_345, 10**9])
def test_bins_hold_every_rank_once(count: int) -> None:
    bins, at = list(_ranks(count)), 1
    for first, end in bins:
        assert first == at and end > first
        at = end
    assert at == count + 1 and len(bins) < 3000


@pytest.mark.parametrize("exponent", [0, 0.5, 0.9, 1, 1.3, 2])
@pytest.mark.parametrize("share", [0.01, 0.2, 0.7])
def test_bins_of_ranks_equal_ranks(exponent: float, share: float) -> None:
    count = 20_000
    exact = np.arange(1, count + 1) ** -float(exponent)
    exact /= exact.sum()
    low, high = -60.0, 120.0
    for _ in range(80):
        middle = (low + high) / 2
        inside = -np.expm1(-exact * np.exp(middle)).sum()
        low, high = (middle, high) if inside < share * count else (low, middle)
    expected = float((exact * -np.expm1(-exact * np.exp(low))).sum())
    assert Popularity(count, exponent).hit_rate(share * count) == pytest.approx(expected, abs=5e-6)


@pytest.mark.parametrize(("exponent", "held"), [(0.7, 100), (0.9, 400), (1.2, 50)])
def test_a_simulated_memory_has_this_hit_rate(exponent: float, held: int) -> None:
    count, rng = 2000, np.random.default_rng(0)
    popular = np.arange(1, count + 1) ** -exponent
    drawn = rng.choice(count, 30_000, p=popular / popular.sum()).tolist()
    memory, hits = OrderedDict[int, None](), 0
    for number, chunk in enumerate(drawn):
        hits += number >= 10_000 and chunk in memory
        memory[chunk] = None
        memory.move_to_end(chunk)
        if len(memory) > held:
            memory.popitem(last=False)
    assert Popularity(count, exponent).hit_rate(held) == pytest.approx(hits / 20_000, abs=0.015)


@pytest.mark.parametrize("exponent", [0.0, 0.3, 1.0, 2.5, 9.0])
def test_no_more_is_found_than_is_asked_for(exponent: float) -> None:
    for count in (2, 3, 10, 999, 54_321):
        popularity = Popularity(count, exponent)
        for less in (1e-12, 1e-9, 1e-6, 1e-3, 0.5):
            assert 0 <= popularity.hit_rate(count * (1 - less)) <= 1


def test_a_billion_chunks_take_no_time() -> None:
    assert 0.2 < Popularity(10**9, 0.9).hit_rate(10**6) < 0.8


# --- bytes of a token -----------------------------------------------------------------------------


def test_bytes_of_a_token_are_those_of_the_readmes_table() -> None:
    sizes = script("kv_sizes")
    for shape in sizes.MODELS.values():
        config = {
            "num_hidden_layers": shape.layers,
            "num_attention_heads": 4 * shape.kv_heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_size,
        }
        assert kv_token_bytes(config) == shape.token_bytes
        assert kv_token_bytes({"text_config": config}, eight_bits=True) == shape.token_bytes / 2


def test_bytes_of_a_token_of_other_models() -> None:
    plain = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}
    assert kv_token_bytes(plain) == 2 * 2 * 4 * 16 * 2
    assert kv_token_bytes({**plain, "torch_dtype": "float32"}) == 2 * 2 * 4 * 16 * 4
    latent = {**plain, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    assert kv_token_bytes(latent) == 2 * 576 * 2
    for wrong in (
        {},
        {"num_hidden_layers": "x", "num_attention_heads": 1},
        {**plain, "hidden_size": None},
    ):
        with pytest.raises(ConfigError, match="--token-bytes"):
            kv_token_bytes(wrong)


# --- inputs and the command -----------------------------------------------------------------------


@pytest.mark.parametrize("name", [f.name for f in fields(CapacityInputs)])
def test_inputs_out_of_range_are_refused(name: str) -> None:
    for value in (-1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=f"{name} must be"):
            CapacityInputs(**{**HAND, name: value})


def test_every_input_says_where_it_is_from() -> None:
    assert all(f.metadata["text"] and f.metadata["source"] for f in fields(CapacityInputs))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["plan", *arguments])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 4096}))
    asked = ["--model", str(tmp_path), "--corpus-tokens", "5e9", "--qps", "1e3"]
    code, out, _ = run(capsys, *asked, "--memory-bytes", "1TiB", "--json")
    found = json.loads(out)
    assert code == 0 and found["inputs"]["token_bytes"] == 128 * 1024
    assert found["plan"]["chunks"] == 9_765_625 and found["inputs"]["memory_bytes"] == 2**40
    sources = found["sources"]
    assert sources["memory_bytes"] == "given" and sources["zipf"] == "assumed"
    assert sources["token_bytes"] == "by config.json" and "H200" in sources["blend_share"]
    again = CapacityInputs(**found["inputs"])
    assert plan_capacity(again)._asdict() == found["plan"]
    code, out, _ = run(capsys, *asked)
    assert code == 0 and "assumed" in out and "9,765,625" in out and "replicas" in out
    code, out, _ = run(capsys, *asked, "--fp8", "--json")
    assert json.loads(out)["inputs"]["token_bytes"] == 64 * 1024


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --model DIR"),
        (["--model", "nowhere"], "has no config.json"),
        (["--token-bytes", "1", "--fp8"], "give one of them"),
        (["--token-bytes", "1", "--busy", "2"], "busy must be"),
    ],
)
def test_mistakes_are_explained(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, _, errors = run(capsys, "--corpus-tokens", "1", "--qps", "1", *arguments)
    assert code == 1 and message in errors


def test_quantities() -> None:
    assert [quantity(n, "B") for n in (0, 0.5, 999, 1500, 6.7e12, 1e30)] == [
        "0 B", "0.5 B", "999 B", "1.5 kB", "6.7 TB", "1e+12 EB",
    ]  # fmt: skip
