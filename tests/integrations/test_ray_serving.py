"""A fleet on Ray Serve without Ray: what is refused, and what Ray is given."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cacheblend_rag import BlendConfig
from cacheblend_rag.errors import CacheBlendError, ConfigError, MissingExtraError, StoreError
from ray_cacheblend.serving import Fleet, app, build_app

EXAMPLES = Path(__file__).parents[2] / "examples" / "ray"
STORE = "redis://host:6379/0"
GIVEN: dict[str, Any] = {"model": "org/model", "store": STORE}


def fleet(**options: Any) -> Fleet:
    return Fleet.of({**GIVEN, **options})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"replica": 2}, "replica"),
        ({"replicas": 0}, "1 or more"),
        ({"replicas": True}, "a number, or Ray's autoscaling_config"),
        ({"replicas": "2"}, "a number, or Ray's autoscaling_config"),
        ({"store": "memory://", "replicas": 2}, "which each replica would have for itself"),
        ({"store": "memory://", "replicas": {"max_replicas": 1}}, "have for itself"),
        ({"store": ""}, "store is ''"),
        ({"model": None}, "model is None"),
        ({"config": [1]}, "it must be a table"),
        ({"config": {"store": "x"}}, "leave it out of config"),
        ({"engine_kwargs": {"kv_transfer_config": {}}}, "set by build_app"),
        ({"engine_kwargs": {"worker_extension_cls": "x"}}, "set by build_app"),
        ({"engine_kwargs": {"api_key": "sk"}}, "not checked by Ray's ingress; put a proxy"),
        ({"engine_kwargs": {"served_model_name": "x"}}, "given as model_id"),
        ({"deployment": {"num_replicas": 2}}, "given as replicas"),
        ({"deployment": {"autoscaling_config": {}}}, "given as replicas"),
        ({"deployment": {"request_router_config": {}}}, "give router=None too"),
        ({"router": {"slack": 0.5}}, "slack must be 1 or more"),
        ({"router": {"slak": 2}}, "router: .*slak"),
    ],
)
def test_options_that_contradict_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fleet(**given)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"server": {"tenants": "/f.toml"}}, ConfigError, "an app for each tenant"),
        ({"server": {"tenant_header": "X-Tenant"}}, ConfigError, "an app for each tenant"),
        ({"server": {"page": True}}, ConfigError, "no page"),
        ({"server": {"paeg": True}}, ConfigError, "paeg"),
        ({"config": {"recompute_ratio": 2}}, ConfigError, "recompute_ratio"),
        ({"store": "ftp://x"}, StoreError, "ftp"),
        (
            {
                "config": {"chat_template_kwargs": {"a": 1}},
                "engine_kwargs": {"default_chat_template_kwargs": {"a": 2}},
            },
            ConfigError,
            "give one of them",
        ),
    ],
)
def test_values_are_refused_before_an_engine_starts(
    given: dict[str, Any], error: type[CacheBlendError], message: str
) -> None:
    with pytest.raises(error, match=message):
        fleet(**given).engine()


@pytest.mark.parametrize("missing", ["model", "store"])
def test_what_lacks_is_named(missing: str) -> None:
    with pytest.raises(ConfigError, match=f"lack {missing}"):
        app({name: value for name, value in GIVEN.items() if name != missing})


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n == "ray" or n.startswith("ray.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"cacheblend-rag\[ray\]"):
        build_app(**GIVEN)


def test_what_ray_is_given() -> None:
    made = fleet(
        replicas={"min_replicas": 1, "max_replicas": 4},
        config={"recompute_ratio": 0.3, "namespace": "red"},
        engine_kwargs={"max_model_len": 4096},
        deployment={"graceful_shutdown_timeout_s": 60},
        router={"slack": 2},
        accelerator="H100",
        runtime_env={"env_vars": {"A": "b"}},
    ).llm_config()
    assert json.loads(json.dumps(made)) == made  # plain data
    assert made["model_loading_config"] == {"model_id": "org/model", "model_source": "org/model"}
    assert made["deployment_config"]["autoscaling_config"]["max_replicas"] == 4
    assert made["deployment_config"]["graceful_shutdown_timeout_s"] == 60
    assert made["deployment_config"]["request_router_config"] == {
        "request_router_class": "ray_cacheblend.routing.WarmRequestRouter",
        "request_router_kwargs": {"slack": 2},
    }
    assert "request_router_config" not in fleet(router=None).llm_config()["deployment_config"]
    assert made["accelerator_type"] == "H100"
    assert made["runtime_env"]["env_vars"] == {"VLLM_NO_USAGE_STATS": "1", "A": "b"}
    engine = made["engine_kwargs"]
    assert engine["max_model_len"] == 4096
    transfer = engine["kv_transfer_config"]
    assert transfer["kv_load_failure_policy"] == "fail"
    assert transfer["kv_connector"] == "CacheBlendConnector"
    extra = transfer["kv_connector_extra_config"]
    assert BlendConfig.of(extra, "x") == BlendConfig(
        store=STORE, recompute_ratio=0.3, namespace="red"
    )


def test_on_a_cpu() -> None:
    made = fleet(replicas=2, accelerator="cpu", model_id="m").llm_config()
    assert made["accelerator_config"] == {"kind": "cpu"}
    assert made["deployment_config"]["num_replicas"] == 2
    assert made["engine_kwargs"]["enforce_eager"] is True
    hybrid = fleet(engine_kwargs={"disable_hybrid_kv_cache_manager": False}).llm_config()
    transfer = hybrid["engine_kwargs"]["kv_transfer_config"]
    assert transfer["kv_connector"] == "CacheBlendHybridConnector"
    assert made["model_loading_config"]["model_id"] == "m"
    assert made["runtime_env"]["env_vars"]["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


def test_chats_are_rendered_alike_for_answers_and_for_the_prefix_of_chunks() -> None:
    arguments = {"enable_thinking": False}
    ours = fleet(config={"chat_template_kwargs": arguments}).engine()
    theirs = fleet(
        engine_kwargs={"default_chat_template_kwargs": arguments, "chat_template": "{{ x }}"},
        server={"max_body": 1000},
    ).engine()
    for engine in (ours, theirs):
        assert engine["default_chat_template_kwargs"] == arguments
        extra = engine["kv_transfer_config"]["kv_connector_extra_config"]
        assert extra["chat_template_kwargs"] == arguments
    assert extra["server"] == {"max_body": 1000, "chat_template": "{{ x }}"}


# ---- the examples --------------------------------------------------------------------------------


def applications(name: str) -> list[dict[str, Any]]:
    """Those of a Serve config file, or of one in a RayService of KubeRay's."""
    found = yaml.safe_load((EXAMPLES / name).read_text())
    if found.get("kind") == "RayService":
        found = yaml.safe_load(found["spec"]["serveConfigV2"])
    return list(found["applications"])


@pytest.mark.parametrize("name", ["serve.yaml", "kuberay.yaml"])
def test_the_examples_name_options_that_there_are(name: str) -> None:
    [application] = applications(name)
    assert application["import_path"] == "ray_cacheblend.serving:app"
    made = Fleet.of(application["args"]).llm_config()
    assert made["deployment_config"]["autoscaling_config"]["min_replicas"] == 2
