"""Chat messages become the token ids of vLLM's own chat, or are refused by us."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from chat_models import (
    DATED,
    MISTRAL_FILES,
    NO_SYSTEM,
    THINKING,
    THINKING_HEAD,
    own_chat,
    with_tekken,
    with_template,
)
from fake_engine import MODEL, fake_blend, head_of

from cacheblend_rag import BlendConfig, CacheBlend, ConfigError, EngineError, PromptError
from cacheblend_rag.ingest import IngestReport

pytest.importorskip("vllm")

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "When does the ferry leave?"}],
    "system": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "When does the ferry leave?"},
    ],
    "several": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One "},
        {"role": "assistant", "content": "Two\n"},
        {"role": "user", "content": " Three é😀 "},
    ],
    "parts": [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    ],
    "none": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "Hi"},
    ],
    "developer": [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    ],
}


def opened(patch: pytest.MonkeyPatch, folder: Path, **options: Any) -> CacheBlend:
    """A CacheBlend over a fake engine of this model."""
    return fake_blend(patch, model=folder, **options)


def text_of(blend: CacheBlend, ids: Sequence[int]) -> str:
    return str(blend.tokenizer.decode(list(ids)))


# --- the same ids ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_are_those_of_vllm_s_chat(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blend = fake_blend(monkeypatch)
    assert blend.takes_messages
    assert blend.tokenize(CONVERSATIONS[name]) == own_chat(MODEL, CONVERSATIONS[name])


@pytest.mark.parametrize("name", ["one", "system", "several", "parts"])
@pytest.mark.parametrize("tekken", MISTRAL_FILES)
def test_ids_of_mistral_s_own_tokenizer(
    tekken: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = with_tekken(tmp_path, tekken)
    blend = opened(monkeypatch, folder, tokenizer_mode="mistral")
    assert blend.takes_messages
    expected = own_chat(folder, CONVERSATIONS[name], "mistral")
    assert blend.tokenize(CONVERSATIONS[name]) == expected
    prompt_prefix = head_of(blend)
    assert prompt_prefix is not None
    if name == "one":
        assert expected[: len(prompt_prefix.token_ids)] == prompt_prefix.token_ids


def test_a_model_without_a_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blend = opened(monkeypatch, with_template(tmp_path, None))
    assert not blend.takes_messages
    with pytest.raises(PromptError, match="pass the prompt as text"):
        blend.tokenize(CONVERSATIONS["one"])


def test_another_template_than_the_model_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``vllm.LLM`` and vLLM's server take one: a file, or the template itself."""
    (tmp_path / "model").mkdir()
    folder, file = with_template(tmp_path / "model", None), tmp_path / "t.jinja"
    file.write_text(THINKING_HEAD)
    (tmp_path / "other").mkdir()
    other = with_template(tmp_path / "other", THINKING_HEAD)
    on = {"enable_thinking": True}
    for template in (file, str(file), THINKING_HEAD):
        blend = opened(monkeypatch, folder, chat_template=template)
        assert blend.takes_messages
        for asked in (CONVERSATIONS["one"], CONVERSATIONS["several"]):
            assert blend.tokenize(asked) == own_chat(other, asked)
            found = blend.tokenize(asked, chat_template_kwargs=on)
            assert found == own_chat(other, asked, **on) != own_chat(other, asked)
            assert blend.generate(asked).prompt_token_ids == own_chat(other, asked)
        prompt_prefix = head_of(blend)
        assert prompt_prefix is not None
        assert text_of(blend, prompt_prefix.token_ids).startswith("/no_think")
    with pytest.raises(ConfigError, match="path of a Jinja file"):
        opened(monkeypatch, folder, chat_template=str(tmp_path / "absent.jinja"))


# --- the template's arguments ---------------------------------------------------------------------


def test_arguments_of_a_call_and_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = with_template(tmp_path, THINKING)
    blend = opened(monkeypatch, folder)
    off = {"enable_thinking": False}
    asked = CONVERSATIONS["one"]
    assert blend.tokenize(asked) == own_chat(folder, asked)
    silent = own_chat(folder, asked, **off)
    assert blend.tokenize(asked, chat_template_kwargs=off) == silent != own_chat(folder, asked)
    assert blend.generate(asked, chat_template_kwargs=off).prompt_token_ids == silent
    always = opened(monkeypatch, folder, config=BlendConfig(chat_template_kwargs=off))
    assert always.generate(asked).prompt_token_ids == silent
    on = always.generate(asked, chat_template_kwargs={"enable_thinking": True})
    assert on.prompt_token_ids == own_chat(folder, asked, enable_thinking=True) != silent


def test_the_head_follows_the_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = with_template(tmp_path, THINKING_HEAD)
    heads = []
    for thinking in (True, False):
        config = BlendConfig(chat_template_kwargs={"enable_thinking": thinking})
        blend = opened(monkeypatch, folder, config=config)
        prompt_prefix = head_of(blend)
        assert prompt_prefix is not None
        heads.append(text_of(blend, prompt_prefix.token_ids))
    assert heads[0].startswith("/think")
    assert heads[1].startswith("/no_think")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"enable_thinkin": False}, "no argument 'enable_thinkin'"),
        ({"truncation": True}, "can't set truncation"),
        ({"chat_template": "{{ messages }}"}, "can't set chat_template"),
        ("enable_thinking", "must be a dict"),
    ],
)
def test_wrong_arguments(
    arguments: Any, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blend = opened(monkeypatch, with_template(tmp_path, THINKING))
    with pytest.raises(ConfigError, match=says):
        blend.generate(CONVERSATIONS["one"], chat_template_kwargs=arguments)
    with pytest.raises(ConfigError, match=says):
        opened(monkeypatch, tmp_path, config=BlendConfig(chat_template_kwargs=arguments))


# --- what a template refuses ----------------------------------------------------------------------


def test_a_template_without_a_system_role(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = with_template(tmp_path, NO_SYSTEM)
    blend = opened(monkeypatch, folder, config=BlendConfig(likely_system_prompt="Be brief."))
    assert blend.tokenize(CONVERSATIONS["one"]) == own_chat(folder, CONVERSATIONS["one"])
    prompt_prefix = head_of(blend)
    assert prompt_prefix is not None
    assert text_of(blend, prompt_prefix.token_ids).endswith("<turn>user\n")
    with pytest.raises(PromptError, match=r"System role not supported.*system, user.*text"):
        blend.generate(CONVERSATIONS["system"])
    with pytest.raises(PromptError, match=r"must alternate.*user, user"):
        blend.generate(CONVERSATIONS["one"] * 2)
    with pytest.raises(ConfigError, match=r"system_prompt can't be used.*System role"):
        opened(monkeypatch, folder, config=BlendConfig(system_prompt="Be brief."))


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"content": "Hi"}, "message 2 has no role"),
        ({"role": None, "content": "Hi"}, "message 2 has no role"),
        ({"role": "user", "content": [{"type": "text"}]}, "message 2 has a part of type 'text'"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "'image_url'; only text"),
        ({"role": "user", "content": 7}, "type 'int'; only text"),
        ({"role": "user", "content": "caf\udce9"}, r"character 3 of message 2, after 'caf'"),
        ("Hi", "message 2 is no dict"),
    ],
)
def test_messages_that_are_none(message: Any, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blend = fake_blend(monkeypatch)
    with pytest.raises(PromptError, match=says):
        blend.generate([{"role": "user", "content": "Hi"}, message])


def test_half_of_a_character(monkeypatch: pytest.MonkeyPatch) -> None:
    blend = fake_blend(monkeypatch)
    with pytest.raises(PromptError, match=r"character 12 of the text, after 'The file caf'"):
        blend.generate("The file caf\udce9.pdf")


def test_an_engine_is_not_pickled(monkeypatch: pytest.MonkeyPatch) -> None:
    blend = fake_blend(monkeypatch)
    for copied in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(EngineError, match="running engine"):
            copied(blend)
    assert blend.with_config(BlendConfig(ingest_prefix="none")).generate("Hello").text


# --- dates ----------------------------------------------------------------------------------------


def on_day(patch: pytest.MonkeyPatch, day: int) -> None:
    """From here on templates write this day of May."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime(2031, 5, day)

    patch.setattr("transformers.utils.chat_template_utils.datetime", Clock)


def ingested(blend: CacheBlend) -> IngestReport:
    return blend.ingest(["The last ferry leaves the north pier at ten. " * 8], progress=False)


def test_chunks_outlive_the_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = with_template(tmp_path, DATED)
    keys, heads, prompts = set(), [], []
    for day in (6, 7):
        on_day(monkeypatch, day)
        blend = opened(monkeypatch, folder, config=BlendConfig(system_prompt="Be brief."))
        keys.update(ingested(blend).keys)
        prompt_prefix = head_of(blend)
        assert prompt_prefix is not None
        heads.append(text_of(blend, prompt_prefix.token_ids))
        prompts.append(blend.tokenize(CONVERSATIONS["system"]))
        assert prompts[-1] == own_chat(folder, CONVERSATIONS["system"])
        assert f"Today Date: 0{day} May 2031" in text_of(blend, prompts[-1])
    assert len(keys) == 1
    assert prompts[0] != prompts[1]
    assert [
        f"0{day} May 2031" in prompt_prefix
        for day, prompt_prefix in zip((6, 7), heads, strict=True)
    ] == [1, 1]


def test_a_template_may_name_the_clock_s_argument(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = DATED.replace('strftime_now("', 'strftime_now(format="')
    assert named != DATED
    folder, keys = with_template(tmp_path, named), set()
    for day in (6, 7):
        on_day(monkeypatch, day)
        blend = opened(monkeypatch, folder, config=BlendConfig(system_prompt="Be brief."))
        keys.update(ingested(blend).keys)
    assert len(keys) == 1


def test_only_the_newest_head_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_day(monkeypatch, 6)
    blend = opened(monkeypatch, with_template(tmp_path, DATED))
    engine: Any = blend.engine
    [chunk] = ingested(blend).keys
    for day in (6, 7, 8):
        on_day(monkeypatch, day)
        prompt_prefix = blend._store_prompt_prefix()
        assert prompt_prefix is not None
        assert engine.stored == {chunk, prompt_prefix.key}
    assert len(set(engine.ingested)) == 5  # the model check's probe, the chunk, and three heads
