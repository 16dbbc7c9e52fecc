"""A fleet on Ray Serve LLM: Ray's ingress, health, autoscaling and draining; our connector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from cacheblend_rag.config import BlendConfig
from cacheblend_rag.errors import ConfigError
from cacheblend_rag.models import resolve_model
from cacheblend_rag.options import refuse_unknown
from cacheblend_rag.router import WarmRouter
from cacheblend_rag.server.options import SERVER, ServerOptions
from cacheblend_rag.store.url import parse_url
from ray_cacheblend.extra import ray_module

WORKER = "cacheblend_rag.engine.worker.WorkerExtension"
ROUTER = "ray_cacheblend.routing.WarmRequestRouter"
_OURS = {
    "kv_transfer_config": "is set by build_app; leave it out",
    "worker_extension_cls": "is set by build_app; leave it out",
    "api_key": "is not checked by Ray's ingress; put a proxy that checks keys before it",
    "model": "is given as model",
    "served_model_name": "is given as model_id",
}
_NO_TENANTS = (
    "tenants and tenant_header are read from each request's headers, which Ray's ingress does not "
    "hand on to engines: build an app for each tenant, with a namespace and route_prefix of its own"
)


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """What ``build_app`` takes, checked.

    Attributes:
        model: hub name or folder.
        store: URL of a store that all replicas reach.
        replicas: how many engines; or Ray's ``autoscaling_config``, such as
            ``{"min_replicas": 1, "max_replicas": 8}``.
        model_id: by which clients ask for it; None: ``model``.
        config: other fields of ``BlendConfig``.
        server: of our endpoints: ``max_body``, ``max_queued_tokens`` and ``state``.
        engine_kwargs: vLLM's engine and server arguments.
        accelerator: ``cpu``, or Ray's name of a GPU, such as ``H100``; None: any GPU.
        router: options of ``cacheblend_rag.router.WarmRouter``, which sends requests where their
            text was sent before; None: Ray's own router.
        deployment: others of Ray's ``deployment_config``, such as ``health_check_period_s``,
            ``graceful_shutdown_timeout_s`` or ``max_ongoing_requests``.
        placement_group: Ray's ``placement_group_config``.
        runtime_env: Ray's, of the replicas.
    """

    model: str
    store: str
    replicas: int | Mapping[str, Any] = 1
    model_id: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    server: Mapping[str, Any] = field(default_factory=dict)
    engine_kwargs: Mapping[str, Any] = field(default_factory=dict)
    accelerator: str | None = None
    router: Mapping[str, Any] | None = field(default_factory=dict)
    deployment: Mapping[str, Any] = field(default_factory=dict)
    placement_group: Mapping[str, Any] | None = None
    runtime_env: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("model", "store"):
            if not (isinstance(getattr(self, name), str) and getattr(self, name)):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be a text")
        for name in ("config", "server", "engine_kwargs", "deployment", "runtime_env"):
            if not isinstance(getattr(self, name), Mapping):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be a table")
        self._check_replicas()
        if "store" in self.config:
            raise ConfigError("the store is given as store; leave it out of config")
        for name in sorted(_OURS.keys() & self.engine_kwargs.keys()):
            raise ConfigError(f"{name} in engine_kwargs {_OURS[name]}")
        for name in sorted({"num_replicas", "autoscaling_config"} & self.deployment.keys()):
            raise ConfigError(f"{name} is given as replicas; leave it out of deployment")
        self._check_router()

    def _check_replicas(self) -> None:
        count = self.replicas
        if isinstance(count, bool) or not isinstance(count, int | Mapping):
            raise ConfigError(
                f"replicas is {count!r}; it must be a number, or Ray's autoscaling_config"
            )
        if isinstance(count, int) and count < 1:
            raise ConfigError(f"replicas is {count}; it must be 1 or more")
        if parse_url(self.store).scheme in ("memory", "null") and count != 1:
            raise ConfigError(
                f"the store is {self.store}, which each replica would have for itself: what one "
                "ingests no other finds. Name one that they share, such as redis://host:6379/0, "
                "s3://bucket/path or a folder that all machines have, or take replicas=1"
            )

    def _check_router(self) -> None:
        if self.router is None:
            return
        if "request_router_config" in self.deployment:
            raise ConfigError(
                "request_router_config in deployment names another router: give router=None too"
            )
        try:
            WarmRouter(**self.router)
        except TypeError as error:
            raise ConfigError(f"router: {error}") from error

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Fleet:
        """From plain data, such as the ``args`` of a Serve config file.

        Raises:
            ConfigError: unknown options or refused values.
        """
        refuse_unknown(options, {f.name for f in fields(cls)}, "args")
        lacking = [name for name in ("model", "store") if name not in options]
        if lacking:
            raise ConfigError(f"args lack {', '.join(lacking)}")
        return cls(**options)

    @property
    def name(self) -> str:
        """By which clients ask for the model."""
        return self.model_id or self.model

    def server_options(self) -> ServerOptions:
        """Of our endpoints.

        Raises:
            ConfigError: one that Ray's ingress has no place for.
        """
        options = ServerOptions.of(dict(self.server))
        if options.has_tenants:
            raise ConfigError(_NO_TENANTS)
        if options.page:
            raise ConfigError("Ray's ingress serves no page at /; leave page out")
        return options

    def extra_config(self) -> dict[str, Any]:
        """Of the connector.

        Raises:
            ConfigError, StoreError: a value is refused.
        """
        ours = {**self.config, "store": self.store}
        theirs = self.engine_kwargs.get("default_chat_template_kwargs")
        if theirs is not None and ours.get("chat_template_kwargs") is not None:
            raise ConfigError(
                "chat_template_kwargs in config and default_chat_template_kwargs in engine_kwargs "
                "are the same here; give one of them"
            )
        if theirs is not None:  # what vLLM renders chats with holds for the prefix of chunks too
            ours["chat_template_kwargs"] = dict(theirs)
        BlendConfig.of(ours, "config")
        server = self.server_options().to_plain()
        if template := self.engine_kwargs.get("chat_template"):
            server.setdefault("chat_template", template)
        return {**ours, **({SERVER: server} if server else {})}

    def engine(self) -> dict[str, Any]:
        """vLLM's arguments, ours among them."""
        from cacheblend_rag.engine.start import asks_for_hybrid, connector_name

        # Compiling takes a compiler and half a minute; small blocks leave less of a prompt's last
        # chunk to compute.
        on_cpu = {"enforce_eager": True, "block_size": 32} if self.accelerator == "cpu" else {}
        arguments = self.config.get("chat_template_kwargs")
        templates = {} if arguments is None else {"default_chat_template_kwargs": dict(arguments)}
        return {
            "enable_prompt_tokens_details": True,
            **on_cpu,
            **templates,
            **self.engine_kwargs,
            "worker_extension_cls": WORKER,
            "kv_transfer_config": {
                "kv_connector": connector_name(hybrid=asks_for_hybrid(self.engine_kwargs)),
                # By its module, so that it is found where this package is on the path only.
                "kv_connector_module_path": "cacheblend_rag.engine.connector",
                "kv_role": "kv_both",
                "kv_load_failure_policy": "fail",
                "kv_connector_extra_config": self.extra_config(),
            },
        }

    def llm_config(self) -> dict[str, Any]:
        """Ray's ``LLMConfig`` as plain data."""
        count: dict[str, Any] = (
            {"num_replicas": self.replicas}
            if isinstance(self.replicas, int)
            else {"autoscaling_config": dict(self.replicas)}
        )
        if self.router is not None:
            count["request_router_config"] = {
                "request_router_class": ROUTER,
                "request_router_kwargs": dict(self.router),
            }
        variables = {"VLLM_NO_USAGE_STATS": "1", **self.runtime_env.get("env_vars", {})}
        config: dict[str, Any] = {
            "model_loading_config": {
                "model_id": self.name,
                "model_source": resolve_model(self.model),
            },
            "engine_kwargs": self.engine(),
            "deployment_config": {**self.deployment, **count},
        }
        if self.accelerator == "cpu":
            config["accelerator_config"] = {"kind": "cpu"}
            variables.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # replicas share cores
        elif self.accelerator is not None:
            config["accelerator_type"] = self.accelerator
        if self.placement_group is not None:
            config["placement_group_config"] = dict(self.placement_group)
        return {**config, "runtime_env": {**self.runtime_env, "env_vars": variables}}


def build_app(model: str, store: str, replicas: int | Mapping[str, Any] = 1, **options: Any) -> Any:
    """An app for ``serve.run``: OpenAI's endpoints by Ray's own ingress, and ours under
    ``/v1/cacheblend``. Each request goes to one of the replicas, and what one ingests or forgets
    the others learn from the store.

    Args:
        model: hub name or folder.
        store: URL of a store that all replicas reach.
        replicas: how many engines, or Ray's ``autoscaling_config``.
        **options: see ``Fleet``.

    Returns:
        Ray's ``Application``.

    Raises:
        MissingExtraError: there is no Ray.
        ConfigError, ModelError, StoreError: an option is refused.
    """
    return _application(Fleet.of({"model": model, "store": store, "replicas": replicas, **options}))


def app(args: Mapping[str, Any]) -> Any:
    """``build_app`` for a Serve config file: ``import_path: ray_cacheblend.serving:app``."""
    return _application(Fleet.of(args))


def _application(fleet: Fleet) -> Any:
    serve, llm = ray_module("ray.serve"), ray_module("ray.serve.llm")
    from ray.llm._internal.serve.core.configs.openai_api_models import to_model_metadata

    from ray_cacheblend.ingress import CacheBlendIngress, ingress_class
    from ray_cacheblend.replica import CacheBlendServer

    max_body = fleet.server_options().max_body
    try:
        config = llm.LLMConfig(**fleet.llm_config(), server_cls=CacheBlendServer)
        deployment = llm.build_llm_deployment(config)
        options = CacheBlendIngress.get_deployment_options([config])
    except ValueError as error:  # pydantic's are that
        raise ConfigError(f"Ray refuses this: {error}") from error
    return serve.deployment(ingress_class(max_body), **options).bind(
        llm_deployments={config.model_id: deployment},
        model_cards={config.model_id: to_model_metadata(config.model_id, config)},
    )
