"""Users' mistakes raise our own exceptions, and the message says how to fix them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from engines import start
from tiny import Words, make

from cacheblend_rag import (
    BlendConfig,
    CacheBlend,
    ConfigError,
    EmptyTextError,
    EngineError,
    EngineMissingError,
    ModelError,
    PromptError,
    PromptTooLongError,
    StoreError,
)
from cacheblend_rag.engine.compat import check_version
from cacheblend_rag.engine.start import naming_failures

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("in_process")]


def test_model_folder_missing() -> None:
    with pytest.raises(ModelError, match="model folder"):
        CacheBlend("/no/such/model", engine="batch")


def test_hub_not_reachable() -> None:
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE"):
        CacheBlend("nobody/no-such-model-of-ours", engine="batch")


def test_unsupported_architecture(tmp_path: Path) -> None:
    config = {"architectures": ["NoSuchForCausalLM"], "model_type": "no_such"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="architecture"):
        CacheBlend(tmp_path, engine="batch")


@pytest.mark.parametrize(
    "said",
    [
        # multiprocessing, in the engine's process; then vLLM, in the script's own
        "\n        An attempt has been made to start a new process before the\n        current "
        "process has finished its bootstrapping phase.",
        "Engine core initialization failed. See root cause above. Failed core proc(s): {}",
    ],
)
def test_a_script_that_is_not_guarded(said: str) -> None:
    """The engine's process imports the script anew, and would start another engine there."""
    with pytest.raises(EngineError, match='if __name__ == "__main__":'), naming_failures("model"):
        raise RuntimeError(said)


def test_vllm_of_an_untested_version() -> None:
    for version in ("0.25.1", "0.34.0", "1.0.0", "dev"):
        with pytest.raises(EngineMissingError, match=r"pip install"):
            check_version(version)
    for version in ("0.26.0", "0.33.0", "0.32.1+cpu"):
        check_version(version)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_modle_len": 128}, "max_model_len"),
        ({"kv_transfer_config": {}}, "leave it out"),
        ({"worker_extension_cls": "x.Y"}, "leave it out"),
    ],
)
def test_engine_options(options: dict[str, object], message: str, tiny_models: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        CacheBlend(make("llama", tiny_models), engine="batch", **options)


def test_engine_kind(tiny_models: Path) -> None:
    with pytest.raises(ConfigError, match="serving"):
        CacheBlend(make("llama", tiny_models), engine="turbo")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recompute_ratio": 1.5}, "share"),
        ({"recompute_ratio": float("nan")}, "share"),
        ({"recompute_ratio": "0.1"}, "number"),
        ({"mode": "fast"}, "blend"),
        ({"selector": "best"}, "query"),
        ({"selector_options": {"windw": 3}}, "window"),
        ({"selector_options": {"window": 4}}, "odd"),
        ({"selector": "hkvd", "selector_options": {"check_layer": 0}}, "at least 1"),
        ({"min_chunk_tokens": 8}, "32"),
        ({"ingest_prefix": "long"}, "auto, prompt_prefix, document"),
    ],
)
def test_config(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BlendConfig(**options)  # type: ignore[arg-type]


def test_store_of_someone_else(tmp_path: Path, tiny_models: Path) -> None:
    (tmp_path / "letters.txt").write_text("not a store")
    config = BlendConfig(store=f"file://{tmp_path}", ingest_prefix=())
    with pytest.raises(StoreError, match="folder"):
        start(make("llama", tiny_models), config=config)
    assert (tmp_path / "letters.txt").read_text() == "not a store"


def test_store_scheme(tiny_models: Path) -> None:
    config = BlendConfig(store="ftp://example", ingest_prefix=())
    with pytest.raises(StoreError, match="memory://"):
        start(make("llama", tiny_models), config=config)


def test_prompts_and_chunks(tiny_models: Path) -> None:
    words = Words(5)
    with start(make("llama", tiny_models), max_model_len=256) as blend:
        with pytest.raises(EmptyTextError):
            blend.generate([])
        with pytest.raises(PromptTooLongError, match="256"):
            blend.generate(words(256))
        report = blend.ingest([words(300), words(100)], progress=False)
        assert (report.too_long, report.computed) == (1, 1)
        with pytest.raises(EmptyTextError):
            blend.ingest([()])
        with pytest.raises(PromptError, match="token ids only"):
            blend.generate("text, but no tokenizer")
        with pytest.raises(ConfigError, match="temperature"):
            blend.generate(words(5), temperatur=0.5)
        with pytest.raises(ConfigError, match="vLLM refused"):
            blend.generate(words(5), temperature=-1.0)
        assert blend.generate(words(5), max_tokens=2).token_ids  # and it goes on


def test_store_of_another_model_is_left_alone(tmp_path: Path, tiny_models: Path) -> None:
    words, store = Words(6), f"file://{tmp_path}/store"
    chunk, config = words(64), BlendConfig(store=store, ingest_prefix=())
    with start(make("llama", tiny_models), config=config) as blend:
        assert blend.ingest([chunk], progress=False).computed == 1
    with start(make("qwen3", tiny_models), config=config) as blend:
        prompt = chunk + words(40)
        assert not blend.generate(prompt, max_tokens=1).report.blended
        assert blend.ingest([chunk], progress=False).computed == 1
    with start(make("llama", tiny_models), config=config) as blend:
        assert blend.ingest([chunk], progress=False).present == 1
        assert blend.generate(prompt, max_tokens=1).report.blended
