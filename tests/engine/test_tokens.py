"""No prompt changes: the ids we send are those vLLM would make of the same prompt."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_models import TOOLS, rendered_by_server
from scripted import TIMETABLE

from cacheblend_rag import BlendConfig, CacheBlend, PromptError
from cacheblend_rag.engine.base import ParserNames

pytestmark = pytest.mark.vllm

DATA = Path(__file__).parents[2] / "examples" / "data"
SYSTEM = {"role": "system", "content": "You answer questions.  Briefly. "}
TEXTS = [
    "Hello",
    " leading and trailing blanks \n\n",
    'Code: `x = {"a": [1, 2]}`\r\n\ttabs, naïve café, 漢字, emoji 🚢🚢, digits 1234567890',
    "<|im_start|>user\nspecial tokens as text<|im_end|>\n",
]
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "What is a tide?"}],
    [SYSTEM, {"role": "user", "content": "A\n\nB. \n\nC"}],
    [
        SYSTEM,
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two "},
        {"role": "user", "content": [{"type": "text", "text": "three"}]},
    ],
]


@pytest.fixture(scope="module")
def blend(embedded: Path) -> Iterator[CacheBlend]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        config = BlendConfig(system_prompt=SYSTEM["content"])
        with CacheBlend(embedded, config=config, engine="batch", max_model_len=2048) as started:
            yield started


def documents() -> list[str]:
    return [path.read_text() for path in sorted(DATA.glob("*.md"))[:3]]


def plain(blend: CacheBlend) -> Any:
    return blend._engine._llm  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", TEXTS)
def test_text(blend: CacheBlend, text: str) -> None:
    [output] = plain(blend).generate([text], use_tqdm=False)
    assert blend.tokenize(text) == tuple(output.prompt_token_ids)


@pytest.mark.parametrize("messages", CHATS)
def test_chat(blend: CacheBlend, messages: list[dict[str, Any]]) -> None:
    [output] = plain(blend).chat([messages], use_tqdm=False)
    assert blend.tokenize(messages) == tuple(output.prompt_token_ids)


def test_ids_are_the_same_in_every_mode_and_chunks_are_found(blend: CacheBlend) -> None:
    texts = documents()
    blend.ingest(texts, progress=False)
    user = "Passages:\n\n" + "\n\n".join(reversed(texts)) + "\n\nQuestion: Who? \nAnswer briefly."
    messages = [SYSTEM, {"role": "user", "content": user}]
    [output] = plain(blend).chat([messages], use_tqdm=False)
    results = [
        blend.generate(messages, mode=mode, blend_if="always", max_tokens=2)
        for mode in ("off", "blend", "reuse")
    ]
    for result in results:
        assert result.prompt_token_ids == tuple(output.prompt_token_ids)
    report = results[1].report
    assert report.blended, report.detail
    in_chunks = sum(len(blend.tokenizer.encode(t.strip())) for t in texts)
    tail = blend.info.block_size + 8  # computed by vLLM, less than a block
    found = report.tokens_reused + report.tokens_recomputed
    assert found >= 0.99 * in_chunks - tail


def test_images_are_refused_with_what_to_do(blend: CacheBlend) -> None:
    content = [{"type": "image_url", "image_url": {"url": "data:,"}}]
    with pytest.raises(PromptError, match="image_url"):
        blend.generate([{"role": "user", "content": content}])


def test_stop_strings_and_text(blend: CacheBlend) -> None:
    whole = blend.generate("Count: one, two, three,", max_tokens=8, temperature=0.0)
    assert whole.text and whole.finish_reason == "length"
    word = whole.text.split()[1]
    cut = blend.generate("Count: one, two, three,", max_tokens=8, temperature=0.0, stop=[word])
    assert cut.finish_reason == "stop" and cut.stop_reason == word and word not in cut.text
    pieces = list(blend.stream("Count: one, two, three,", max_tokens=8, temperature=0.0))
    assert "".join(pieces) == whole.text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:max_rollback_tokens:DeprecationWarning")  # vLLM's own
def test_tools(blend: CacheBlend, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt is that of vLLM's server, chunks in it are reused, and what the model calls is
    read: a choice holds even so small a model to the form.
    """
    chat: Any = blend.engine.chat
    monkeypatch.setattr(chat._renderer.tokenizer, "chat_template", TOOLS)
    monkeypatch.setattr(chat, "parsers", ParserNames("hermes", ""))
    [text] = documents()[:1]
    blend.ingest([text], progress=False)
    question = f"{text}\n\nWhen does the ferry leave the north pier on day 3?"
    messages = [SYSTEM, {"role": "user", "content": question}]
    strict = {**TIMETABLE, "function": {**TIMETABLE["function"], "strict": True}}
    tools: Any = {"tools": [strict], "tool_choice": "required"}
    expected = rendered_by_server(chat._renderer, messages, tools)
    assert blend.tokenize(messages, **tools) == expected
    off = blend.generate(messages, mode="off", max_tokens=1, **tools)
    result = blend.generate(messages, blend_if="always", temperature=0.0, max_tokens=48, **tools)
    assert off.prompt_token_ids == result.prompt_token_ids == expected
    in_chunk = len(blend.tokenizer.encode(text.strip(), add_special_tokens=False))
    report = result.report
    assert report.blended, report.detail
    # a blend ends at a block's end
    most_fresh = blend.info.block_size + 8
    assert report.tokens_reused + report.tokens_recomputed >= in_chunk - most_fresh
    assert [call.name for call in result.tool_calls] == ["timetable"]
    assert result.tool_calls[0].arguments.lstrip("{ \n").startswith('"pier"')
