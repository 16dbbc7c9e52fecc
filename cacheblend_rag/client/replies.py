"""What a server sends, as the library's own types. Pure, but for the clock of a piece."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from cacheblend_rag.engine.base import EngineInfo, EngineOutput, ModelCheck, ParserNames
from cacheblend_rag.ingest import IngestReport
from cacheblend_rag.reason import Reason
from cacheblend_rag.report import BlendReport, SegmentReport
from cacheblend_rag.shadow.report import ShadowReport
from cacheblend_rag.tools import ToolCallPiece

_TOKEN = "token_id:"  # how vLLM writes an id where a token's text would stand
_LOWEST = -9999.0  # what vLLM writes for minus infinity
_TIMES = ("ttft_s", "total_s")
_COUNTS = ("computed", "present", "repeated", "too_short", "too_long")


def piece(event: Mapping[str, Any]) -> EngineOutput | None:
    """A piece of an answer from an event of its stream; None where the event has none."""
    if not event.get("choices"):
        return None
    choice = event["choices"][0]
    delta = choice.get("delta")
    if delta is not None and not (choice.get("token_ids") or choice.get("finish_reason")):
        return None  # says only whose turn it is
    choice_fields: Mapping[str, Any] = choice if delta is None else delta
    return EngineOutput(
        text=choice_fields.get("text" if delta is None else "content") or "",
        token_ids=tuple(choice.get("token_ids") or ()),
        finish_reason=choice.get("finish_reason"),
        stop_reason=choice.get("stop_reason"),
        logprobs=_logprobs(choice.get("logprobs")),
        engine={},
        at=time.perf_counter(),
        reasoning=choice_fields.get("reasoning") or "",
        tool_calls=tuple(map(_call, choice_fields.get("tool_calls") or ())),
    )


def prompt_ids(event: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The prompt as the server computes it, where an event of an answer says so."""
    found = event.get("prompt_token_ids")
    return None if found is None else tuple(found)


def _call(found: Mapping[str, Any]) -> ToolCallPiece:
    function = found.get("function") or {}
    return ToolCallPiece(
        number=int(found.get("index") or 0),
        id=found.get("id"),
        name=function.get("name"),
        arguments=function.get("arguments") or "",
    )


def _logprobs(found: Mapping[str, Any] | None) -> list[dict[int, float]] | None:
    if not found:
        return None
    if found.get("content"):  # of chat completions
        return [_logprob_row(at) for at in found["content"]]
    rows = found.get("top_logprobs") or []
    return [{_token(t): _logprob(v) for t, v in (row or {}).items()} for row in rows] or None


def _logprob_row(at: Mapping[str, Any]) -> dict[int, float]:
    rows = [at, *(at.get("top_logprobs") or ())]
    return {_token(row["token"]): _logprob(row["logprob"]) for row in rows}


def _token(text: str) -> int:
    return int(text.removeprefix(_TOKEN))


def _logprob(value: float) -> float:
    return -math.inf if value == _LOWEST else value


def reason(name: object) -> Reason | None:
    """A reason by its name; one of a server that knows more of them is ``NOT_REPORTED`` here."""
    if name is None:
        return None
    return Reason(str(name)) if name in set(Reason) else Reason.NOT_REPORTED


def report(data: Mapping[str, Any]) -> BlendReport:
    """A report from plain data: the reverse of ``BlendReport.to_dict``."""
    known = {f.name for f in fields(BlendReport)}
    # times that a server leaves to its clients are None there
    given = {n: v for n, v in data.items() if n in known and (v is not None or n not in _TIMES)}
    own = [{n: row[n] for n in SegmentReport._fields if n in row} for row in given["segments"]]
    given["segments"] = [SegmentReport(**row) for row in own]
    shadow = ShadowReport.of(given.get("shadow"))
    return BlendReport(**{**given, "reason": reason(given.get("reason")), "shadow": shadow})


def model_check(state: Mapping[str, Any]) -> ModelCheck:
    """Whether the server blends."""
    found = state["blending"]
    return ModelCheck(
        passed=bool(found["on"]),
        reason=reason(found.get("reason")),
        detail=found.get("detail") or "",
    )


def parsers(state: Mapping[str, Any]) -> ParserNames:
    """What the server's answers are read by; servers that do not say so have none."""
    parsers = state.get("parsers") or {}
    return ParserNames(parsers.get("tool") or "", parsers.get("reasoning") or "")


def info(state: Mapping[str, Any]) -> EngineInfo:
    """What a server tells of its engine; what it does not tell is empty or 0."""
    return EngineInfo(
        model=state["model"],
        vllm_version=state["vllm_version"],
        dtype="",
        device="",
        block_size=int(state["block_size"]),
        max_model_len=int(state["max_model_len"]),
        max_num_batched_tokens=0,
        vocab_size=0,
        fingerprint=state["fingerprint"],
    )


def ingested(
    jobs: list[Mapping[str, Any]], not_stored: Mapping[str, str], seconds: float
) -> IngestReport:
    """The report of an ingestion that took one or several jobs."""
    counts = {name: sum(int(j["counts"].get(name, 0)) for j in jobs) for name in _COUNTS}
    return IngestReport(
        chunks=sum(int(j["counts"]["total"]) for j in jobs),
        **counts,
        not_stored=not_stored,
        tokens=sum(int(j["tokens"]) for j in jobs),
        bytes=sum(int(j["bytes"]) for j in jobs),
        seconds=seconds,
        reason=next((r for j in jobs if (r := reason(j.get("reason")))), None),
        detail=next((j["detail"] for j in jobs if j.get("reason")), ""),
        keys=[key for j in jobs for key in j.get("keys") or ()],
    )
