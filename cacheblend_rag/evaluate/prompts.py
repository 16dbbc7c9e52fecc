"""How a question becomes a prompt, and an answer's text what is scored. The same for every row."""

from __future__ import annotations

from typing import NamedTuple

from cacheblend_rag.evaluate.base import Kind, Question


class _Style(NamedTuple):
    system: str
    user: str  # with {passages} and {question}
    max_tokens: int
    first_line: bool  # of the answer counts


_STYLES: dict[Kind, _Style] = {
    "qa": _Style(
        "You are a precise assistant. Answer the question using the passages. Reply with the "
        "shortest possible answer: a name, a date, a number or a few words, no sentence.",
        "Passages:\n\n{passages}\n\nQuestion: {question}\nAnswer in as few words as possible.",
        20,
        True,
    ),
    "summary": _Style(
        "You are a careful writer. Use only what the passages say.",
        "Passages:\n\n{passages}\n\n{question}",
        256,
        False,
    ),
    "fewshot": _Style(
        "You summarise dialogues in one or two short sentences, as the examples do. Reply with the "
        "summary only.",
        "Examples:\n\n{passages}\n\nNow summarise this dialogue.\n\nDialogue: {question}",
        64,
        True,
    ),
}


def system_prompt(kind: Kind) -> str:
    """The system prompt of all questions of a kind."""
    return _STYLES[kind].system


def max_tokens(kind: Kind) -> int:
    """Most tokens of an answer."""
    return _STYLES[kind].max_tokens


def messages(question: Question) -> list[dict[str, str]]:
    """The chat prompt: system prompt, passages one below the other, the question at the end."""
    style = _STYLES[question.kind]
    user = style.user.format(passages="\n\n".join(question.passages), question=question.question)
    return [{"role": "system", "content": style.system}, {"role": "user", "content": user}]


def answer_text(kind: Kind, text: str) -> str:
    """What of a generated text is the answer."""
    text = text.strip().removeprefix("Summary:").lstrip()
    return text.split("\n")[0].strip() if _STYLES[kind].first_line else text
