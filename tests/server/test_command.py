"""``cacheblend serve``: which ``vllm serve`` it stands for."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from live_server import entry_points
from tiny import make, make_with_tokenizer

from cacheblend_rag.cli import main, serve
from cacheblend_rag.engine import launch, register, start
from cacheblend_rag.errors import ConfigError, StoreError
from cacheblend_rag.server.service import state_folder


@pytest.fixture(scope="module")
def model(tiny_models: Path) -> str:
    return str(make_with_tokenizer("llama", tiny_models))


@pytest.fixture
def printed(model: str, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    def printed(*words: str, of: str | None = model) -> tuple[list[str], dict[str, Any]]:
        given = [] if of is None else [of]
        assert main(["serve", *given, "--print-command", *words]) == 0
        line = shlex.split(capsys.readouterr().out)
        at = line.index("vllm")
        assert line[at + 1] == "serve" and line[-2] == "--kv-transfer-config"
        return line[at + 2 : -2], json.loads(line[-1])

    return printed


def test_options_of_ours_and_of_vllms(printed: Callable[..., Any], model: str) -> None:
    words, config = printed(
        "--port", "81", "--store", "kv?capacity=1GiB", "--recompute-ratio", "0.3", "--blend-if",
        "always", "--selector-options", '{"window": 33}', "--ingest-prefix", "1, 2",
        "--system-prompt", "It's \"so\"", "--max-body", "1MiB", "--state", "s",
        "--chat-template-kwargs", '{"a": false}', "--max-model-len=512",
    )  # fmt: skip
    assert words[0] == model and words[1:4] == ["--port", "81", "--max-model-len=512"]
    assert json.loads(words[words.index("--default-chat-template-kwargs") + 1]) == {"a": False}
    assert words[-2:] == ["--worker-extension-cls", "cacheblend_rag.engine.worker.WorkerExtension"]
    assert "--enable-prompt-tokens-details" in words
    extra = config.pop("kv_connector_extra_config")
    assert config == {
        "kv_connector": "CacheBlendConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "fail",
    }
    assert extra == {
        "store": str(Path("kv").absolute()) + "?capacity=1GiB",
        "recompute_ratio": 0.3,
        "blend_if": "always",
        "selector_options": {"window": 33},
        "ingest_prefix": [1, 2],
        "system_prompt": 'It\'s "so"',
        "chat_template_kwargs": {"a": False},
        "server": {"max_body": 1 << 20, "state": str(Path("s").absolute())},
    }


def test_the_connector_goes_with_the_hybrid_manager(printed: Callable[..., Any]) -> None:
    for word, name in (("--no-", "CacheBlendHybridConnector"), ("--", "CacheBlendConnector")):
        words, config = printed(f"{word}disable-hybrid-kv-cache-manager")
        assert config["kv_connector"] == name
        assert f"{word}disable-hybrid-kv-cache-manager" in words
    _, config = printed("--no_disable_hybrid_kv_cache_manager")
    assert config["kv_connector"] == "CacheBlendHybridConnector"


def test_nothing_given(printed: Callable[..., Any]) -> None:
    assert printed()[1]["kv_connector_extra_config"] == {}
    words, _ = printed("--no-enable-prompt-tokens-details")
    assert "--enable-prompt-tokens-details" not in words


def test_a_cpus_memory_is_bounded_unless_the_user_bounds_it(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def line(**environment: str) -> str:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert main(["serve", model, "--print-command"]) == 0
        return capsys.readouterr().out

    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "VLLM_CPU_KVCACHE_SPACE"):
        monkeypatch.delenv(name, raising=False)
    assert "VLLM_CPU_KVCACHE_SPACE=4 ONEDNN_PRIMITIVE_CACHE_CAPACITY=256 vllm serve" in line()
    assert "CAPACITY=1024 vllm serve" in line(ONEDNN_PRIMITIVE_CACHE_CAPACITY="1024")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert "CAPACITY" not in line() and "KVCACHE" not in line()


def test_steps_as_large_as_a_blends_are_cuda_graphs(
    printed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "--cudagraph-capture-sizes" not in printed()[0], "there is no GPU here"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    words, _ = printed("--seed", "1")
    first = words.index("--cudagraph-capture-sizes") + 1
    sizes = [int(word) for word in words[first : first + len(start.graph_sizes())]]
    assert sizes == sorted(set(sizes)) and sizes[0] == 1 and 512 in sizes and sizes[-1] == 2048
    assert words[first + len(sizes)].startswith("--"), "vLLM reads numbers up to the next option"
    assert "--enforce-eager" not in words and "--block-size" not in words
    for theirs in (
        ["--max-cudagraph-capture-size", "256"],
        ["--cudagraph_capture_sizes=8"],
        ["--compilation-config.mode=0"],
        ["-O1"],
        ["--enforce-eager"],
        ["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 2}'],
    ):
        assert str(sizes[-1]) not in printed(*theirs)[0], theirs
    monkeypatch.setattr("vllm.platforms.current_platform.is_cpu", lambda: False)
    assert start._defaults({})["cudagraph_capture_sizes"] == sizes
    for name in start.GRAPH_OPTIONS:
        assert "cudagraph_capture_sizes" not in start._defaults({name: 1})


def test_chat_templates_are_for_requests_and_chunks(
    printed: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    """vLLM's options for the one, ours for the other: they are set together."""
    file, silent = tmp_path / "t.jinja", '{"enable_thinking": false}'
    file.write_text("{{ messages }}")
    for words in (
        ["--chat-template-kwargs", silent],
        ["--default-chat-template-kwargs", silent],
        [f"--default_chat_template_kwargs={silent}"],
    ):
        theirs, config = printed(*words, "--chat-template", str(file))
        args = parsed(*theirs)
        assert args.default_chat_template_kwargs == {"enable_thinking": False}
        assert args.chat_template == str(file)
        extra = config["kv_connector_extra_config"]
        assert extra["chat_template_kwargs"] == {"enable_thinking": False}
        assert extra["server"] == {"chat_template": str(file)}
    _, config = printed("--chat-template={{ messages }}")
    assert config["kv_connector_extra_config"]["server"] == {"chat_template": "{{ messages }}"}
    for wrong, says in (
        (["--chat-template-kwargs", silent, "--default-chat-template-kwargs", silent], "one of"),
        (["--chat-template-kwargs", silent, "--default-chat-template-kwargs.a", "1"], "one of"),
        (["--default-chat-template-kwargs", "x"], "no JSON object"),
        (["--default-chat-template-kwargs", '{"tokenize": false}'], "can't set tokenize"),
        (["--default-chat-template-kwargs.enable_thinking", "false"], "as one JSON object"),
    ):
        assert main(["serve", model, "--print-command", *wrong]) == 1
        assert says in capsys.readouterr().err


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    monkeypatch.setenv("VLLM_PLUGINS", "")  # set for the whole process; put back at the end
    path = tmp_path / "options.yaml"

    def written(text: str) -> str:
        path.write_text(text)
        return str(path)

    return written


def test_a_file_of_options_is_read_before_ours_are_added(
    printed: Callable[..., Any], written: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM would put the file's words in front of all: behind them, ours would win."""
    file = written(
        "block-size: 16\nenforce-eager: false\nenable-prompt-tokens-details: false\nport: 81\n"
        'chat-template: "{{ messages }}"\ndefault-chat-template-kwargs: {enable_thinking: false}\n'
    )
    for given in (["--config", file], [f"--config={file}"]):
        words, config = printed(*given, "--port", "82")
        args = parsed(*words)
        assert (args.block_size, args.port, args.enable_prompt_tokens_details) == (16, 82, False)
        assert args.enforce_eager is False and args.config is None
        extra = config["kv_connector_extra_config"]
        assert extra["chat_template_kwargs"] == {"enable_thinking": False}
        assert extra["server"] == {"chat_template": "{{ messages }}"}
    assert parsed(*printed("--config", file, "--block-size", "32")[0]).block_size == 32
    file = written("compilation-config: {mode: 0}\n")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    words, _ = printed("--config", file)
    assert "--cudagraph-capture-sizes" not in words
    assert json.loads(words[words.index("--compilation-config") + 1]) == {"mode": 0}


def test_a_file_may_have_our_options_and_the_model(
    printed: Callable[..., Any], written: Callable[[str], str], model: str
) -> None:
    file = written(
        f"model: {model}\nrecompute_ratio: 0.3\nnamespace: red\nselector-options: {{window: 33}}\n"
        "page: true\nserved-model-name: [a, b]\n"
    )
    words, config = printed("--config", file, "--namespace", "blue", of=None)
    assert words[0] == model and "--model" not in words
    assert parsed(*words).served_model_name == ["a", "b"]
    assert config["kv_connector_extra_config"] == {
        "recompute_ratio": 0.3,
        "namespace": "blue",
        "selector_options": {"window": 33},
        "server": {"page": True},
    }
    words, _ = printed("--config", file, of="mine")
    assert words[0] == "mine" and model not in words


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kv-transfer-config: {kv_connector: NixlConnector}", "set by cacheblend serve"),
        ("kv_transfer_config: {kv_connector: NixlConnector}", "set by cacheblend serve"),
        ("worker-extension-cls: x", "set by cacheblend serve"),
        ("config: other.yaml", "names another file"),
        ("mode: off", "put its value in quotes"),
        ("store:", "put its value in quotes"),
        ("tenants: a\ntenant-header: b", "not both"),
        ("", "can't be read"),
        ("[a]", "can't be read"),
        ("a: [", "can't be read"),
    ],
    ids=str,
)
def test_a_file_of_options_that_is_refused(
    model: str, capsys: pytest.CaptureFixture[str], written: Any, text: str, says: str
) -> None:
    assert main(["serve", model, "--print-command", "--config", written(text)]) == 1
    told = capsys.readouterr()
    assert told.err.startswith("cacheblend: ") and says in told.err and not told.out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--config", "/none.yaml"], "can't be read"),
        (["--config"], "names no file"),
        (["--config", "a.yaml", "--config=b.yaml"], "2 times"),
    ],
    ids=str,
)
def test_files_of_options_that_are_not_there(
    written: Any, model: str, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    assert main(["serve", model, "--print-command", *words]) == 1
    assert says in capsys.readouterr().err


def test_no_option_of_vllms_is_taken_for_the_beginning_of_another() -> None:
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    command: Any = ServeSubcommand()
    parser = command.subparser_init(FlexibleArgumentParser().add_subparsers())
    names, read = set(parser._option_string_actions), serve._read_here()
    assert set(read) <= names
    serve._check([*sorted(names - set(serve._OURS_ALONE)), "--", "-x", "value"])


def test_every_field_of_the_configuration_has_an_option() -> None:
    from dataclasses import fields

    from cacheblend_rag.config import BlendConfig

    assert [f.name for f in fields(BlendConfig)] == sorted(
        serve._CONFIG, key=[f.name for f in fields(BlendConfig)].index
    )


def test_the_embedded_model(
    printed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.setattr(serve, "resolve_model", lambda name: name or "/the/embedded/model")
    words, _ = printed("--port", "81", of=None)
    assert words[0] == "/the/embedded/model" and "smollm2-135m-instruct" in words
    words, _ = printed("--served-model-name", "x", of=None)
    assert "smollm2-135m-instruct" not in words
    words, _ = printed("--model", model, of=None)
    assert words[:2] == ["--model", model]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--kv-transfer-config", "{}"], "is set by cacheblend serve"),
        (["--kv-transfer-config={}"], "is set by cacheblend serve"),
        (["--kv_transfer_config={}"], "is set by cacheblend serve"),
        (["--kv-transfer", "{}"], "is set by cacheblend serve"),
        (["--kv-transfer-config.kv_role", "x"], "is set by cacheblend serve"),
        (["--worker-extension-cls", "x"], "is set by cacheblend serve"),
        (["--block-siz", "16"], "write --block-siz in full, --block-size"),
        (["--default_chat_templ={}"], "in full, --default-chat-template-kwargs"),
        (["--no-enforce-eag"], "in full, --no-enforce-eager"),
        (["--no-disable-hybrid"], "in full, --no-disable-hybrid-kv-cache-manager"),
        (["--store", "ftp://x"], "can't be opened|cannot be opened"),
        (["--gpu-cache", "much"], "gpu_cache"),
        (["--propagation-length", "-1"], "propagation_length"),
        (["--tenants", "a", "--tenant-header", "b"], "not both"),
    ],
    ids=str,
)
def test_what_is_refused(
    model: str, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    assert main(["serve", model, "--print-command", *words]) == 1
    told = capsys.readouterr().err
    assert told.startswith("cacheblend: ") and any(part in told for part in says.split("|"))


@pytest.mark.parametrize(
    "words",
    [
        ["--recompute-ratio", "2"],
        ["--blend-if", "now"],
        ["--selector-options", "[]"],
        ["--max-body"],
    ],
    ids=str,
)
def test_what_the_parser_refuses(words: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["serve", *words])


@pytest.mark.parametrize(
    ("option", "meant"),
    [("--max-model-length", "--max-model-len"), ("--recompute-ration", "--recompute-ratio")],
)
def test_a_misspelt_option_is_refused_with_the_one_that_was_meant(
    option: str, meant: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ})
    monkeypatch.setattr("cacheblend_rag.engine.launch.has_plugins", lambda: True)
    assert main(["serve", option, "5"]) == 1
    assert f"no option '{option}'. Did you mean '{meant}'?" in capsys.readouterr().err


def test_tenants_are_read_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("it was started")

    monkeypatch.setattr(serve, "_start", never)
    assert main(["serve", "--tenants", str(tmp_path / "none.toml")]) == 1
    assert "can't be read" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["serve", "--help"])
    told = capsys.readouterr().out
    assert "--recompute-ratio" in told and "--help=vllm" in told
    with pytest.raises(SystemExit, match="0"):
        main(["serve", "--help=max-model-len"])
    assert "--max-model-len" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "serve" in capsys.readouterr().out


def parsed(*words: str) -> Any:
    """vLLM's own arguments."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers())
    return parser.parse_args(["serve", *words])


def test_a_model_that_is_not_blended_is_served_without_our_connector(
    tiny_models: Path, model: str
) -> None:
    """Some can't start with one. Tenants are then not served at all, rather than as one."""
    hybrid = str(make("mamba-hybrid", tiny_models))
    config = {"kv_connector": "CacheBlendConnector", "kv_role": "kv_both"}
    ours = ["--worker-extension-cls", "w", "--skip-tokenizer-init", "--kv-transfer-config"]
    args = parsed(hybrid, *ours, json.dumps(config))
    launch.without_what_the_model_refuses(args)
    assert args.kv_transfer_config is None and not args.worker_extension_cls
    args = parsed(model, *ours, json.dumps(config))
    launch.without_what_the_model_refuses(args)
    assert args.kv_transfer_config.kv_connector == "CacheBlendConnector"
    config["kv_connector_extra_config"] = {"server": {"tenants": "t"}}  # type: ignore[assignment]
    args = parsed(hybrid, *ours, json.dumps(config))
    with pytest.raises(ConfigError, match="knows no tenants"):
        launch.without_what_the_model_refuses(args)


def test_options_that_go_with_our_connector_are_told(
    tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page is 404 then."""
    told = list[str]()
    monkeypatch.setattr(launch.logger, "warning", lambda text, *args: told.append(text % args))
    hybrid = str(make("mamba-hybrid", tiny_models))
    server = {"page": True, "max_body": 5, "chat_template": "{{ x }}"}
    for extra in ({"store": "/kv", "server": server}, {"server": {"chat_template": "t"}}):
        config = {
            "kv_connector": "CacheBlendConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": extra,
        }
        ours = ["--skip-tokenizer-init", "--kv-transfer-config", json.dumps(config)]
        launch.without_what_the_model_refuses(parsed(hybrid, *ours))
    [why, page, why_again] = told
    assert "--max-body, --page, --store has no effect" in page
    assert why == why_again and "without blending" in why


def test_plugins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "theirs,cacheblend")
    assert launch.allowed_plugins() == "theirs,cacheblend"
    monkeypatch.setenv("VLLM_PLUGINS", "")
    assert launch.allowed_plugins() == "cacheblend"
    monkeypatch.delenv("VLLM_PLUGINS")
    other = tmp_path / "other-1.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1\n")
    (other / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nadds_a_model = x:y\n[vllm.endpoint_plugins]\nadds_routes = x:y\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    names = launch.allowed_plugins().split(",")
    assert "adds_a_model" in names and "adds_routes" not in names and "cacheblend" in names


def test_entry_points_of_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM loads what they name."""
    from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

    monkeypatch.syspath_prepend(entry_points(tmp_path))
    assert launch.has_plugins()
    from importlib.metadata import entry_points as found

    [endpoints] = [e for e in found(group="vllm.endpoint_plugins") if e.name == "cacheblend"][:1]
    assert isinstance(endpoints.load()(), EndpointPlugin)
    [general] = [e for e in found(group="vllm.general_plugins") if e.name == "cacheblend"][:1]
    assert general.load() is register.register
    register.register()
    register.register()
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.distributed.kv_transfer.kv_connector.v1.base import supports_hma

    for hybrid in (False, True):
        name = start.connector_name(hybrid=hybrid)
        named = KVConnectorFactory.get_connector_class_by_name(name)
        assert named.__name__ == name and named.__module__ == "cacheblend_rag.engine.connector"
        assert supports_hma(named) is hybrid


def test_where_the_jobs_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHEBLEND_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    kv = tmp_path / "kv"
    assert state_folder(None, f"{kv}?capacity=1GiB", 1) == tmp_path / "kv-serve"
    assert state_folder(None, "redis://h:1/0", 1) == tmp_path / "home/serve"
    assert state_folder(str(tmp_path / "mine"), str(kv), 1) == tmp_path / "mine"
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="--state DIR"):
        state_folder(str(tmp_path / "file/x"), str(kv), 1)
    old = state_folder(None, "memory://", 2**30)  # a process that is not there
    import os

    mine = state_folder(None, "memory://", os.getpid())
    assert mine.is_dir() and not old.exists() and mine.parent.stat().st_mode & 0o77 == 0
    mine.parent.chmod(0o777)
    with pytest.raises(StoreError, match="yours alone"):
        state_folder(None, "memory://", 1)
