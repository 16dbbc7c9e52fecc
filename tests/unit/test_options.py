"""Options have one list, and a type checker knows it."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from cacheblend_rag import BlendConfig
from cacheblend_rag.client.requests import _REFUSED, OF_SOME_VERSIONS, SAMPLING
from cacheblend_rag.engine.start import sampling_names
from cacheblend_rag.options import (
    OURS,
    PER_CALL,
    PER_REQUEST,
    BlendOptions,
    CallOptions,
    SamplingOptions,
    ToolOptions,
    blend_options,
    sampling_options,
)

ROOT = Path(__file__).parents[2]


def test_the_options_of_a_call_are_fields_of_the_configuration_with_its_types() -> None:
    types = {f.name: f.type for f in fields(BlendConfig)}
    assert {n: t.__forward_arg__ for n, t in BlendOptions.__annotations__.items()} == {
        name: types[name] for name in PER_CALL
    }
    assert set(PER_REQUEST) <= BlendConfig().request_defaults().keys()


def test_the_reference_marks_the_options_of_a_call() -> None:
    page = (ROOT / "docs/reference.md").read_text()
    table = page.partition("## BlendConfig")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| [^|]* \| (yes)? ?\|", table, re.MULTILINE))
    assert rows.keys() == {f.name for f in fields(BlendConfig)}
    assert {name for name, mark in rows.items() if mark} == set(PER_CALL)


def test_the_sampling_parameters_are_those_of_vllm() -> None:
    """Of the installed version, and those that only other versions know."""
    assert sampling_names() <= SamplingOptions.__annotations__.keys()
    assert SAMPLING | OF_SOME_VERSIONS | _REFUSED.keys() <= SamplingOptions.__annotations__.keys()


def test_every_option_of_a_call_is_one_of_ours_or_one_of_vllms() -> None:
    given = dict.fromkeys(CallOptions.__annotations__)
    ours, sampling = blend_options(given), sampling_options(given)
    assert set(ours) == set(PER_CALL) and sampling.keys() == SamplingOptions.__annotations__.keys()
    others = {*ToolOptions.__annotations__, "lora_request"}
    assert given.keys() - ours.keys() - sampling.keys() == others
    assert {*ours, *others} == set(OURS)


def test_the_fields_of_llamaindexs_llm_are_all_there() -> None:
    from llama_index_cacheblend import CacheBlendLLM
    from llama_index_cacheblend.fields import LLMFields

    own = CacheBlendLLM.model_fields.keys() - {"model", "engine"}
    assert LLMFields.__annotations__.keys() == own


def test_the_fields_of_langchains_models_are_all_there() -> None:
    from langchain_cacheblend import CacheBlendLLM, ChatCacheBlend
    from langchain_cacheblend.fields import ModelArguments, ModelFields
    from langchain_cacheblend.settings import _USAGE, EngineSettings

    own = {*ChatCacheBlend.model_fields, *CacheBlendLLM.model_fields} - {"model", "engine"}
    others = {"max_completion_tokens", "extra_body", *_USAGE}
    assert ModelFields.__annotations__.keys() == own | others
    start = inspect.signature(EngineSettings).parameters.keys() - {"model", "named"}
    assert ModelArguments.__annotations__.keys() == ModelFields.__annotations__.keys() | start


RIGHT = """
from cacheblend_rag import BlendConfig, CacheBlend
from langchain_cacheblend import CacheBlendLLM as LangChainLLM
from langchain_cacheblend import ChatCacheBlend
from llama_index_cacheblend import CacheBlendLLM

async def f(blend: CacheBlend) -> None:
    blend.generate("a", temperature=0.0, mode="off", selector_options={"window": 33}).text
    blend.generate(["a", "b"], max_tokens=8)[0].text
    blend.stream("a", recompute_ratio="auto")
    (await blend.agenerate("a", propagation_length=0)).text
    blend.astream("a", blend_if="always", chat_template_kwargs={"enable_thinking": False})
    CacheBlend.connect("http://localhost:8000").generate("a", lora_request="mine")
    blend.generate([{"role": "user", "content": "a"}], tools=[{}], tool_choice="auto").tool_calls
    BlendConfig().for_call({"mode": "off"})
    ChatCacheBlend("m", temperature=0.1, sampling={"mode": "off"})
    LangChainLLM("m", timeout=3.0, blend_config=BlendConfig())
    CacheBlendLLM("m", max_tokens=8, sampling={"top_k": 2})
"""
WRONG = {
    "generate": 'blend.generate("a", temperatur=0.0)',
    "generate_value": 'blend.generate("a", mode="of")',
    "generate_several": 'blend.generate(["a"], recompute_rati=0.0)',
    "stream": 'blend.stream("a", max_token=8)',
    "agenerate": 'await blend.agenerate("a", reach=0)',
    "astream": 'blend.astream("a", when="always")',
    "for_call": 'BlendConfig().for_call({"system_prompt": "not of a call"})',
    "langchain": 'ChatCacheBlend("m", max_token=8)',
    "langchain_text": 'LangChainLLM("m", engine_arg={})',
    "langchain_sampling": 'ChatCacheBlend("m", sampling={"mod": "off"})',
    "llama_index": 'CacheBlendLLM("m", max_token=8)',
}


@pytest.fixture(scope="module")
def complaints(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[str]]:
    """What mypy says of ``RIGHT`` with the lines of ``WRONG`` behind it, by line."""
    snippet = tmp_path_factory.mktemp("mypy") / "snippet.py"
    snippet.write_text(RIGHT + "".join(f"    {line}\n" for line in WRONG.values()))
    config = ["--config-file", str(ROOT / "pyproject.toml"), "--follow-imports", "silent"]
    more = ["--no-error-summary", "--hide-error-context", str(snippet)]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *config, *more], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stdout + done.stderr
    found: dict[int, list[str]] = {}
    for line, text in re.findall(r"^[^:]*snippet\.py:(\d+): error: (.*)$", done.stdout, re.M):
        found.setdefault(int(line), []).append(text)
    return found


@pytest.mark.slow
def test_a_type_checker_takes_what_is_right(complaints: dict[int, list[str]]) -> None:
    assert [text for line, text in complaints.items() if line <= RIGHT.count("\n")] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_a_type_checker_refuses_a_wrong_option(complaints: dict[int, Any], name: str) -> None:
    assert complaints.get(RIGHT.count("\n") + 1 + list(WRONG).index(name))
