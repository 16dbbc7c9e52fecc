"""Asks the questions: every row through the engine's own path, one file of results.

For a group of questions of one set: their passages are ingested, the full prefill answers, then
every other row does. Each row answers freely; the engine compares its distributions with the full
prefill's while both say the same. Where they part, the row is asked again and made to say the full
prefill's answer, so that the comparison covers every token of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from cacheblend_rag.blend import CacheBlend
from cacheblend_rag.errors import ModelError, PromptTooLongError
from cacheblend_rag.evaluate.base import Kind, Question
from cacheblend_rag.evaluate.prompts import answer_text, max_tokens, messages, system_prompt
from cacheblend_rag.evaluate.results import Answer, ResultFile
from cacheblend_rag.evaluate.rows import FULL, Row, parse_row, with_prefix
from cacheblend_rag.options import SamplingOptions
from cacheblend_rag.prompt import Prompt
from cacheblend_rag.result import BlendResult

_KEEP_BYTES = 4 << 30  # of passages that later questions may share
_SLACK = 64  # tokens of context that stay free: the question pass, and what a template adds


@dataclass
class Evaluation:
    """One run over a started engine.

    Attributes:
        blend: of the batch engine, with ``answers.PROCESSOR`` among its logits processors.
        rows: ``full`` first.
        group: questions that are asked together; with 1, times to the first token are kept.
        show: of so many questions, the recomputed positions are kept.
        limit_tokens: most tokens of an answer; by kind where None.
        other_passages: of each set, passages that ingest prefixes may be made of.
    """

    blend: CacheBlend
    rows: Sequence[Row]
    group: int = 1
    show: int = 0
    limit_tokens: int | None = None
    other_passages: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.blend.model_check.passed:
            raise ModelError(
                f"there is nothing to evaluate: this model is not blended, as "
                f"{self.blend.model_check.detail}"
            )
        if not self.rows or self.rows[0].name != FULL:
            self.rows = [parse_row(FULL), *(r for r in self.rows if r.name != FULL)]
        self._fronts: dict[tuple[str, Kind, str], CacheBlend] = {}
        self._shown = 0
        self._stored: list[tuple[CacheBlend, list[str]]] = []
        self._stored_bytes = 0

    def run(
        self, questions: Sequence[Question], file: ResultFile, advance: Callable[[int], None]
    ) -> None:
        """Ask what ``file`` does not have yet, and append to it; ``advance`` gets the number of
        questions that are done. All sets advance together, so that a run that is cut short has
        about the same share of each.
        """
        for group in _interleaved(_groups(questions, self.group)):
            fits = [q for q in group if self._fits(q, file)]
            todo = [q for q in fits if not all(file.results.has(q, r.name) for r in self.rows)]
            if todo:
                self._ask(todo, file)
            advance(len(group))

    def _fits(self, question: Question, file: ResultFile) -> bool:
        most = self.blend.info.max_model_len - self._most(question.kind) - _SLACK
        try:
            length = len(self.blend.tokenize(messages(question)))
        except PromptTooLongError:
            length = most + 1
        if length > most:
            file.add_skipped(question, f"its prompt is longer than the {most} tokens there is room")
        return length <= most

    def _ask(self, questions: Sequence[Question], file: ResultFile) -> None:
        from cacheblend_rag.engine import answers

        kind = questions[0].kind
        left_context = _before(questions)
        chunks = list(left_context)
        prompts = [messages(q) for q in questions]
        rows = [r for r in self.rows if not all(file.results.has(q, r.name) for q in questions)]
        fronts = {r.prefix: self._front(questions[0], r.prefix) for r in rows if r.blends}
        for prefix, front in fronts.items():
            known = list(left_context.values()) if prefix == "document" else None
            stored = front.ingest(chunks, left_context=known, progress=False)
            self._stored_bytes += stored.bytes
            self._stored.append((front, chunks))
        sampling: SamplingOptions = {
            "temperature": 0.0,
            "max_tokens": self._most(kind),
            "extra_args": {answers.KEY: "keep"},
        }
        full_row, show = self.rows[0], self._shown < self.show
        full = self.blend.generate(prompts, **sampling, **full_row.options)
        digests = [answers.digest(r.prompt_token_ids) for r in full]
        for question, result in zip(questions, full, strict=True):
            file.add_question(question)
            if show:
                file.add_tokens(question, self._pieces(result))
        file.add(
            self._answer(q, full_row, r, [], False) for q, r in zip(questions, full, strict=True)
        )
        for row in rows:
            if row.name == FULL:
                continue
            front = fronts[row.prefix] if row.blends else self.blend
            sampling["extra_args"] = {answers.KEY: "compare"}
            got = front.generate(prompts, **sampling, **row.options)
            compared = self._compare(front, row, prompts, full, got)
            file.add(
                self._answer(q, row, r, c, show)
                for q, r, c in zip(questions, got, compared, strict=True)
            )
        self.blend.engine.rpc("cacheblend_drop_answers", digests)
        if self._stored_bytes > _KEEP_BYTES:
            self._forget()
        self._shown += len(questions)

    def _forget(self) -> None:
        for front, chunks in self._stored:
            front.forget(chunks)
        self._stored, self._stored_bytes = [], 0

    def _most(self, kind: Kind) -> int:
        return self.limit_tokens or max_tokens(kind)

    def _front(self, question: Question, prefix: str) -> CacheBlend:
        name = question.set, question.kind, prefix
        if name not in self._fronts:
            config = replace(self.blend.config, system_prompt=system_prompt(question.kind))
            other_passages = self.other_passages.get(question.set, ())
            config = with_prefix(
                config, prefix, self.blend.tokenizer, self.blend.engine.chat, other_passages
            )
            self._fronts[name] = self.blend.with_config(config)
        return self._fronts[name]

    def _compare(
        self,
        front: CacheBlend,
        row: Row,
        prompts: Sequence[Prompt],
        full: Sequence[BlendResult],
        got: Sequence[BlendResult],
    ) -> list[list[tuple[float, bool]]]:
        """How far the row's answers are from the full prefill's, token by token: where they part,
        the row is made to say the full prefill's tokens.
        """
        from cacheblend_rag.engine import answers

        digests = [answers.digest(r.prompt_token_ids) for r in full]
        compared = self._compared(digests)
        parted = [
            i
            for i, (a, b) in enumerate(zip(full, got, strict=True))
            if a.token_ids[: answers.LAST] != b.token_ids[: answers.LAST]
        ]
        if parted:
            forced: SamplingOptions = {
                "temperature": 0.0,
                "max_tokens": min(answers.LAST, max(len(full[i].token_ids) for i in parted)),
                "extra_args": {answers.KEY: "force"},
            }
            front.generate([prompts[i] for i in parted], **forced, **row.options)
            again = self._compared([digests[i] for i in parted])
            for i, comparison in zip(parted, again, strict=True):
                compared[i] = comparison
        return compared

    def _compared(self, digests: list[str]) -> list[list[tuple[float, bool]]]:
        compared: list[list[tuple[float, bool]]] = self.blend.engine.rpc(
            "cacheblend_compared", digests
        )[0]
        return compared

    def _pieces(self, result: BlendResult) -> list[str]:
        tokenizer = self.blend.tokenizer
        return [tokenizer.decode([t]) for t in result.prompt_token_ids]

    def _answer(
        self,
        question: Question,
        row: Row,
        result: BlendResult,
        compared: Sequence[tuple[float, bool]],
        show: bool,
    ) -> Answer:
        report = result.report
        known = not row.blends or report.blended
        selected = None
        if show and report.blended:
            [outcome, *_] = self.blend.engine.rpc("cacheblend_outcome", result.request_id, True)
            selected = outcome.get("selected")
        return Answer(
            set=question.set,
            id=question.id,
            row=row.name,
            text=answer_text(question.kind, result.text),
            tokens=len(result.token_ids),
            kl=[kl for kl, _ in compared],
            same=sum(same for _, same in compared),
            tokens_total=report.tokens_total,
            tokens_reused=report.tokens_reused if known else None,
            tokens_recomputed=report.tokens_recomputed if known else None,
            tokens_cached=report.tokens_prefix_cached,
            blended=report.blended,
            reason=(report.reason or "") if row.blends else "",
            ttft_s=report.ttft_s if self.group == 1 else None,
            chunks=[
                [s.end - s.start, s.tokens_recomputed]
                for s in report.segments
                if s.kind == "reused" and s.start > 0  # the prompt prefix is exact: no candidate
            ],
            selected=selected,
        )


def _before(questions: Sequence[Question]) -> dict[str, str | None]:
    """The passages, each once, and what stands before them in the document they are first found
    in.
    """
    found: dict[str, str | None] = {}
    for question in questions:
        left_context = question.left_context or itertools.repeat(None)
        for passage, text in zip(question.passages, left_context, strict=False):
            found.setdefault(passage, text)
    return found


def _groups(questions: Sequence[Question], size: int) -> Iterator[list[Question]]:
    """Questions in groups of one set and kind."""
    group: list[Question] = []
    for question in questions:
        if group and (
            len(group) == size or (group[0].set, group[0].kind) != (question.set, question.kind)
        ):
            yield group
            group = []
        group.append(question)
    if group:
        yield group


def _interleaved(groups: Iterable[list[Question]]) -> list[list[Question]]:
    """The groups, each at the share of its set that it ends; those of one set keep their order."""
    by_set: dict[str, list[list[Question]]] = {}
    for group in groups:
        by_set.setdefault(group[0].set, []).append(group)
    placed = [
        ((number + 1) / len(mine), group)
        for mine in by_set.values()
        for number, group in enumerate(mine)
    ]
    return [group for _, group in sorted(placed, key=lambda pair: pair[0])]
