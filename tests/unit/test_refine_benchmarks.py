"""What the benchmarks of refinement do with answers, without an engine that gives them."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmark import FOLDER, benchmark

WISHES = ["off", "idle"]


class Stream:
    """An answer as it comes: refined where that was asked for and no other is under way."""

    def __init__(self, blend: FakeBlend, asked: Mapping[str, Any]) -> None:
        self._blend, self._asked = blend, asked
        self.result: Any = None

    async def __aiter__(self) -> AsyncIterator[str]:
        self._blend.under_way += 1
        alone = self._blend.under_way == 1
        for _ in range(self._asked["max_tokens"]):
            await asyncio.sleep(0.0005)
            alone = alone and self._blend.under_way == 1
            yield "a"
        self._blend.under_way -= 1
        refined = alone and self._asked.get("refine") == "idle"
        self.result = SimpleNamespace(report=SimpleNamespace(blended=True, refined=refined))


class FakeBlend:
    """Notes what was asked."""

    def __init__(self) -> None:
        self.info = SimpleNamespace(model="/models/one", vllm_version="0.26")
        self.under_way = 0
        self.asked: list[tuple[Any, dict[str, Any]]] = []

    def astream(self, prompt: Any, **options: Any) -> Stream:
        self.asked.append((prompt, options))
        return Stream(self, options)


@pytest.fixture
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.mark.usefixtures("on_path")
def test_each_question_is_asked_with_and_without(capsys: pytest.CaptureFixture[str]) -> None:
    script, blend = benchmark("refine_load"), FakeBlend()
    items = [{"question": f"Q{n}?", "texts": ["one", "two"]} for n in range(3)]
    args = argparse.Namespace(
        refine=WISHES, tokens=40, streams=2, seed=7, ratio=0.15, dtype="auto", file=Path("f.jsonl")
    )
    found = asyncio.run(script.Load(blend, items, args).run())
    assert found.keys() == {"first", "whole", "with_streams", "newcomer"}
    for name in ("first", "whole", "newcomer"):
        assert [len(found[name][wish]) for wish in WISHES] == [3, 3]
    assert all(len(found["with_streams"][wish]) > 3 * 2 * 30 for wish in WISHES)
    chats = [prompt[1]["content"] for prompt, _ in blend.asked if not isinstance(prompt, str)]
    assert len(set(chats)) == len(chats), "one would find blocks of another"
    said = capsys.readouterr().out
    assert "off: 0 of 3 answers" in said and "idle: 3 of 3 answers" in said
    assert said.count("median") == 4 and "%" in said


@pytest.mark.usefixtures("on_path")
def test_rows_are_shown_by_their_quarters(capsys: pytest.CaptureFixture[str]) -> None:
    script = benchmark("refine")
    row = {
        "kl": [0.1] * 4 + [0.0] * 4, "prompt": 700, "refined": True, "tokens": 650, "detail": "",
        "ttft": 0.2, "seconds": 1.0, "same": True, "cached": 0.9,
    }  # fmt: skip
    rows = {"off": [{**row, "detail": "why", "refined": False}], "idle": [row, row]}
    args = argparse.Namespace(
        tokens=8, dtype="float32", file=Path("f.jsonl"), seed=7, ratio=0.15, refine=WISHES
    )
    script.report(FakeBlend(), rows, args)
    said = capsys.readouterr().out
    assert "0.10000   0.10000   0.00000   0.00000   0.000000        2     650" in said
    assert "why" in said
    assert script.wished("plain") == {"mode": "off"} and script.wished("64") == {"refine": 64}


class Connector:
    """What the held answers use of the worker's side: a model with an output layer."""

    def __init__(self) -> None:
        self.table = torch.randn(4, 9, generator=torch.Generator().manual_seed(1))
        model = SimpleNamespace(compute_logits=lambda hidden: hidden @ self.table)
        self.rows = SimpleNamespace(handle=SimpleNamespace(model=model))

    def say(self, hidden: Sequence[torch.Tensor]) -> list[int]:
        """The greedy tokens of an answer."""
        model = self.rows.handle.model
        return [int(model.compute_logits(h[None]).argmax()) for h in hidden]


def test_answers_are_held_to_the_kept_one(monkeypatch: pytest.MonkeyPatch) -> None:
    kv_transfer = pytest.importorskip("vllm.distributed.kv_transfer")
    connector = Connector()
    monkeypatch.setattr(kv_transfer, "get_kv_transfer_group", lambda: connector)
    held = benchmark("held").HeldAnswers(3)
    draw = torch.Generator().manual_seed(2)
    one, other = ([torch.randn(4, generator=draw) for _ in range(5)] for _ in range(2))
    alone = connector.say(other)
    with held.keep():
        kept = connector.say(one)
    with held.force() as kl:
        forced = connector.say(other)
    assert forced[:3] == kept[:3] and forced[3:] == alone[3:] and connector.say(other) == alone
    logs = [
        [(h @ connector.table).double().log_softmax(-1) for h in answer] for answer in (one, other)
    ]
    expected = [float((a.exp() * (a - b)).sum()) for a, b in zip(*logs, strict=True)][:3]
    assert kl == pytest.approx(expected, rel=1e-4)
    with pytest.raises(AssertionError, match="another length"), held.keep():
        connector.say(one[:2])
