"""What engines tell each other of KV that another one computes; none is started."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace
from typing import Any

import pytest

from cacheblend_rag.engine import compat, connectors, handover
from cacheblend_rag.engine.handover import HandOver
from cacheblend_rag.engine.hashes import hide
from cacheblend_rag.reason import Reason

BLOCK = 16
SENDS = {"do_remote_decode": True}
ARRIVES = {"do_remote_prefill": True}


def chain(tokens: int) -> list[bytes]:
    return [hashlib.sha256(b"%d" % number).digest() for number in range(tokens // BLOCK)]


def request(tokens: int = 70, params: Any = None, caches: bool = True) -> Any:
    return SimpleNamespace(
        kv_transfer_params=SENDS if params is None else params,
        prompt_token_ids=list(range(tokens)),
        num_tokens=tokens,
        block_hashes=chain(tokens) if caches else [],
        _block_hasher=(lambda request: []) if caches else None,
    )


def sent(one: Any, approximate: int | None = None, exact: list[bytes] | None = None) -> Any:
    given = chain(len(one.prompt_token_ids)) if exact is None else exact
    return handover.sent(one, given, BLOCK, approximate)


def test_who_hands_nothing_on_says_nothing() -> None:
    assert sent(request(params={})) is None
    assert sent(request(params={"do_remote_decode": False})) is None


def test_what_is_exact_stays_exact() -> None:
    told = sent(request())
    assert told == {"start": None, "tag": ""}
    arrived = request(params={**ARRIVES, "cacheblend": {"handed_over": told}})
    given = handover.arriving(arrived.kv_transfer_params)
    assert given == HandOver(None) and "exact" in given.detail
    handover.take(arrived, given, BLOCK)
    assert arrived.block_hashes == chain(70)


def test_what_is_hidden_here_is_hidden_there() -> None:
    one, other = request(), request()
    hide(one, 2, "a")
    hide(other, 2, "b")
    told = sent(one)
    assert told["start"] == 32 and told["tag"] != sent(other)["tag"]
    assert told == sent(one), "who reads the same blocks shares them"
    found = []
    for by in (told, told, sent(other)):
        arrived = request(params={**ARRIVES, "cacheblend": {"handed_over": by}})
        given = handover.arriving(arrived.kv_transfer_params)
        assert given is not None and "32" in given.detail
        handover.take(arrived, given, BLOCK)
        found.append(arrived.block_hashes)
    assert found[0] == found[1], "the same blend"
    for hashes in found:
        assert hashes[:2] == chain(70)[:2]
    apart = [set(chain(70)), set(found[0]), set(found[2]), set(one.block_hashes)]
    assert not set(found[0][2:]) & (apart[0] | apart[2] | apart[3])


def test_a_block_that_the_answer_fills_is_hidden_too() -> None:
    """Only what is behind the prompt's last full block is approximate."""
    one = request(tokens=70)
    hide(one, 4, "a")
    told = sent(one)
    assert told["start"] == 64 and told["tag"]
    arrived = request(params={**ARRIVES, "cacheblend": {"handed_over": told}})
    arrived._block_hasher = lambda request: [b"answer"]
    handover.take(arrived, HandOver(**told), BLOCK)
    assert arrived.block_hashes == chain(70) and arrived._block_hasher(arrived) != [b"answer"]


def test_an_engine_that_keeps_no_prefixes_says_it_by_its_plan() -> None:
    told = sent(request(caches=False), 40, exact=[])
    assert told["start"] == 32 and told["tag"]
    assert sent(request(caches=False), None, exact=[])["start"] is None


@pytest.mark.parametrize(
    "told",
    [None, 3, {}, {"start": 3}, {"start": "3", "tag": "x"}, {"start": True, "tag": "x"},
     {"start": -1, "tag": "x"}, {"start": 3, "tag": ""}, {"start": 3, "tag": "x", "more": 1}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("how", [ARRIVES, {"remote_block_ids": [1, 2]}], ids=str)
def test_kv_of_which_nothing_is_known_is_hidden_whole(told: Any, how: dict[str, Any]) -> None:
    params = {**how, "cacheblend": {} if told is None else {"handed_over": told}}
    one, other = handover.arriving(params), handover.arriving(params)
    assert one is not None and other is not None
    assert one.start == other.start == 0 and one.tag != other.tag
    without = handover.arriving(how)
    assert without is not None and without.start == 0


def test_requests_that_bring_nothing_are_planned() -> None:
    for params in (None, {}, "x", {"cacheblend": {"mode": "off"}}, {"do_remote_prefill": False}):
        assert handover.arriving(params) is None


# ---- other connectors ----------------------------------------------------------------------------


def named(name: str) -> Any:
    return type(name, (), {})()


def refused(*others: str, policy: str = "fail") -> Any:
    mine: Any = SimpleNamespace(worker_state=None)
    group = SimpleNamespace(_connectors=[mine, *map(named, others)]) if others else mine
    assert connectors.ours(group) is mine
    config = SimpleNamespace(kv_transfer_config=SimpleNamespace(kv_load_failure_policy=policy))
    return connectors.refusal(mine, group, config)


def test_only_connectors_that_hand_over_may_stand_with_ours() -> None:
    assert refused() is None
    assert refused("NixlConnector") is None and refused("NixlPullConnector") is None
    for name in ("ExampleConnector", "LMCacheConnectorV1"):
        why = refused("NixlConnector", name)
        assert why.reason is Reason.OTHER_CONNECTORS
        assert f"{name} keeps KV by its tokens" in why.detail and "NixlConnector" in why.detail
    assert "was not tested" in refused("OffloadingConnector").detail
    assert "was not tested" in refused("NixlPushConnector").detail


def test_what_was_not_run_or_could_be_read_unwritten_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert '"kv_load_failure_policy": "fail"' in refused("NixlConnector", policy="recompute").detail
    monkeypatch.setattr(compat, "was_run", lambda what: False)
    assert "on a CPU only" in refused("NixlConnector").detail
    assert refused() is None
