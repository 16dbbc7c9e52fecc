"""The demo: questions over real documents, each answered three ways and timed side by side.

``full`` prefills every token, ``reuse`` takes the stored KV as it is, ``blend`` recomputes a small
share of it. The three take turns in going first, a full prefill reads no cached block, and no
prompt is asked twice in one mode, so none of them profits from another.
"""

from __future__ import annotations

import json
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cacheblend_rag._version import __version__
from cacheblend_rag.blend import CacheBlend
from cacheblend_rag.errors import PromptError
from cacheblend_rag.options import Mode
from cacheblend_rag.report import BlendReport
from cacheblend_rag.retrieval import Passage, Retriever

SYSTEM_PROMPT = (
    "You answer questions using only the passages you are given. Reply with a short answer."
)
MODES: tuple[Mode, ...] = ("full", "reuse", "blend")
REUSING = ("reuse", "blend")
CHUNK_TOKENS, PASSAGES, MAX_TOKENS = 220, 6, 24
LARGER_MODEL = "Qwen/Qwen2.5-1.5B-Instruct"


def chat(passages: Sequence[Passage], question: str) -> list[dict[str, str]]:
    """The prompt of a question: chat messages, the passages first."""
    context = "\n\n".join(passage.text for passage in passages)
    asked = f"Passages:\n\n{context}\n\nQuestion: {question}\nAnswer in a few words."
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": asked}]


# --- questions ------------------------------------------------------------------------------------


class Question(NamedTuple):
    """A question of the demo, and its answer by the documents."""

    text: str
    gold: str


def data_folder() -> Path:
    """The demo's documents and questions.

    Raises:
        PromptError: they are not there.
    """
    folder = Path(__file__).parents[1] / "examples" / "data"
    if not (folder / "questions.json").is_file():
        raise PromptError(
            f"The demo's documents are not at {folder}: they come with the repository, not with "
            "the package. Clone it and run 'make demo' there, or use 'cacheblend ingest' and "
            "'cacheblend ask' with documents of your own."
        )
    return folder


def load_questions(folder: Path) -> list[Question]:
    """The questions that come with the documents."""
    rows = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    return [Question(row["question"], row["answer"]) for row in rows]


# --- one question ---------------------------------------------------------------------------------


class Answer(NamedTuple):
    """One mode's answer to one question."""

    text: str
    token_ids: tuple[int, ...]
    ttft_s: float  # from the call to the first streamed piece, by the wall clock
    report: BlendReport


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One question, answered in every mode."""

    question: Question
    answers: Mapping[str, Answer]  # in the order in which they were asked

    def speedup(self, mode: str) -> float:
        """How many times sooner than a full prefill the first token came."""
        return self.answers["full"].ttft_s / self.answers[mode].ttft_s

    def agrees(self, mode: str) -> bool:
        """The answer is that of the full prefill, but for case and punctuation."""
        return words(self.answers[mode].text) == words(self.answers["full"].text)

    def first_token_agrees(self, mode: str) -> bool:
        """The first token is that of the full prefill."""
        return self.answers[mode].token_ids[:1] == self.answers["full"].token_ids[:1]

    def correct(self, mode: str) -> bool:
        """The answer contains the gold one."""
        answer, gold = words(self.answers[mode].text), words(self.question.gold)
        return any(answer[i : i + len(gold)] == gold for i in range(len(answer)))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "question": self.question.text,
            "gold": self.question.gold,
            "order": list(self.answers),
            "answers": {mode: self._answer_dict(mode) for mode in MODES},
            "speedup": {mode: self.speedup(mode) for mode in REUSING},
        }

    def _answer_dict(self, mode: str) -> dict[str, Any]:
        answer = self.answers[mode]
        report = answer.report
        return {
            "text": answer.text,
            "ttft_s": answer.ttft_s,
            "correct": self.correct(mode),
            "agrees": self.agrees(mode),
            "first_token_agrees": self.first_token_agrees(mode),
            "blended": report.blended,
            "tokens_total": report.tokens_total,
            "tokens_reused": report.tokens_reused,
            "tokens_recomputed": report.tokens_recomputed,
            "tokens_fresh": report.tokens_fresh,
            "stages_s": dict(report.stages_s),
        }


def words(text: str) -> list[str]:
    """A text without what two equal answers may differ in: case, commas, punctuation."""
    found = re.findall(r"[\w.:]+", text.casefold().replace(",", ""))
    return [word for token in found if (word := token.strip(".:"))]


def answer(
    blend: CacheBlend,
    messages: Sequence[Mapping[str, str]],
    mode: Mode,
    show: Callable[[str], None],
) -> Answer:
    """One streamed, greedy answer; its pieces go to ``show`` as they come."""
    start = time.perf_counter()
    with blend.stream(messages, mode=mode, max_tokens=MAX_TOKENS, temperature=0.0) as stream:
        first = next(stream, "")
        ttft_s = time.perf_counter() - start
        show(first)
        for piece in stream:
            show(piece)
    result = stream.result
    return Answer(result.text.strip(), result.token_ids, ttft_s, result.report)


# --- all questions --------------------------------------------------------------------------------


def run(
    blend: CacheBlend, retriever: Retriever, questions: Sequence[Question], screen: Console
) -> list[Outcome]:
    """Answer every question in every mode, and show it."""
    _warm_up(blend, retriever)
    outcomes = []
    for number, question in enumerate(questions):
        messages = chat(retriever.search(question.text, PASSAGES), question.text)
        turn = number % len(MODES)
        place = f"{number + 1}/{len(questions)}"
        screen.print(f"\n[bold]{place}  {escape(question.text)}[/bold]", highlight=False)
        screen.print(f"  gold   {escape(question.gold)}", highlight=False)
        answers: dict[str, Answer] = {}
        for mode in MODES[turn:] + MODES[:turn]:
            screen.print(f"  {mode:<6} ", end="", highlight=False)
            answers[mode] = answer(blend, messages, mode, shown_on(screen))
            screen.print(f"  [dim]{answers[mode].ttft_s * 1000:.0f} ms[/dim]", highlight=False)
        outcomes.append(Outcome(question=question, answers=answers))
        screen.print(_verdict(outcomes[-1]), highlight=False, soft_wrap=True)
    return outcomes


def _warm_up(blend: CacheBlend, retriever: Retriever) -> None:
    """One request in each mode about other passages, so that no mode pays for a first time."""
    question = "What are these documents about?"
    for mode in MODES:
        answer(blend, chat(retriever.passages[:PASSAGES], question), mode, lambda _: None)


def shown_on(screen: Console) -> Callable[[str], None]:
    """Shows pieces of an answer as they come, on one line."""

    def show(piece: str) -> None:
        text = piece.replace("\n", " ")
        screen.print(text, end="", markup=False, highlight=False, soft_wrap=True)

    return show


def _verdict(outcome: Outcome) -> str:
    report = outcome.answers["blend"].report
    same = "as the full prefill" if outcome.agrees("blend") else "unlike the full prefill"
    first = "the same" if outcome.first_token_agrees("blend") else "another"
    tokens = (
        f"{report.tokens_reused} reused, {report.tokens_recomputed} recomputed, "
        f"{report.tokens_fresh} fresh of {report.tokens_total} tokens"
        if report.blended
        else f"not blended: {escape(report.detail)}"
    )
    return (
        f"  [dim]blend:[/dim] first token [bold]{outcome.speedup('blend'):.1f}×[/bold] sooner than "
        f"full (reuse {outcome.speedup('reuse'):.1f}×); answers {same}, {first} first token\n"
        f"  [dim]       {tokens}[/dim]"
    )


# --- the end --------------------------------------------------------------------------------------


def summarize(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Medians of the first token's time, and counts of answers."""
    return {
        "questions": len(outcomes),
        "prompt_tokens_median": median(o.answers["full"].report.tokens_total for o in outcomes),
        "ttft_median_s": {m: median(o.answers[m].ttft_s for o in outcomes) for m in MODES},
        "speedup_median": {m: median(o.speedup(m) for o in outcomes) for m in REUSING},
        "agree": {m: sum(o.agrees(m) for o in outcomes) for m in REUSING},
        "first_token_agree": {m: sum(o.first_token_agrees(m) for o in outcomes) for m in REUSING},
        "correct": {m: sum(o.correct(m) for o in outcomes) for m in MODES},
    }


def summary_table(summary: Mapping[str, Any]) -> Table:
    """The summary, one row a mode; times are medians, answers are held against full's."""
    title = f"{summary['questions']} questions, {summary['prompt_tokens_median']:.0f} prompt tokens"
    table = Table(title=title, title_justify="left")
    for heading in ("", "TTFT", "speed-up", "same answer", "same first token", "correct"):
        table.add_column(heading, justify="right" if heading else "left")
    for mode in MODES:
        compared = ["1.0×", "", ""]
        if mode in REUSING:
            compared = [
                f"{summary['speedup_median'][mode]:.1f}×",
                str(summary["agree"][mode]),
                str(summary["first_token_agree"][mode]),
            ]
        ttft = f"{summary['ttft_median_s'][mode] * 1000:.0f} ms"
        table.add_row(mode, ttft, *compared, str(summary["correct"][mode]))
    return table


def versions(blend: CacheBlend) -> dict[str, str]:
    """What ran, and on what."""
    return {
        "cacheblend_rag": __version__,
        "vllm": blend.info.vllm_version,
        "torch": version("torch"),
        "python": platform.python_version(),
        "device": blend.info.device,
        "cpu": _cpu(),
        "dtype": blend.info.dtype,
    }


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    names = re.findall(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return f"{names[0]}, {len(names)} cores" if names else platform.processor() or "unknown"
