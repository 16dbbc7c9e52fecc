"""A page that shows which tokens each row recomputed."""

from __future__ import annotations

from html import escape

from cacheblend_rag.evaluate.results import Asked, Results

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }
pre { white-space: pre-wrap; font: 13px/1.5 ui-monospace, monospace }
mark { background: #fb6; color: inherit }
"""


def page(results: Results) -> str:
    """HTML of the questions whose recomputed positions were kept: their prompts, a row after the
    other, recomputed tokens marked; tokens that were computed anyway are marked too.
    """
    parts = [
        "<!doctype html><meta charset=utf-8><title>Recomputed tokens</title>",
        f"<style>{_STYLE}</style><h1>Recomputed tokens</h1>",
    ]
    for key, tokens in results.tokens.items():
        parts.append(_question(results.asked[key]))
        for row, answer in results.answers.get(key, {}).items():
            if answer.selected is not None:
                parts.append(f"<h3>{escape(row)}: {escape(answer.text)}</h3>")
                parts.append(f"<pre>{_marked(tokens, set(answer.selected))}</pre>")
    return "\n".join(parts)


def _question(asked: Asked) -> str:
    right = " / ".join(asked.answers) or "not known"
    return f"<h2>{escape(asked.question)}</h2><p>Right: {escape(right)}</p>"


def _marked(tokens: list[str], chosen: set[int]) -> str:
    runs: list[tuple[bool, str]] = []
    for i, token in enumerate(tokens):
        if runs and runs[-1][0] == (i in chosen):
            runs[-1] = (runs[-1][0], runs[-1][1] + token)
        else:
            runs.append((i in chosen, token))
    return "".join(f"<mark>{escape(t)}</mark>" if on else escape(t) for on, t in runs)
