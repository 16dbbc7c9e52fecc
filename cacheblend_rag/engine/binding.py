"""An engine that others start, such as ``vllm serve`` with our connector: the worker opens the
store itself, by what stands in ``kv_connector_extra_config``.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
from vllm.distributed import get_tp_group
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata
from vllm.logger import init_logger

from cacheblend_rag import calibration, model_check
from cacheblend_rag.config import BlendConfig
from cacheblend_rag.costs import Costs
from cacheblend_rag.engine import compat, connectors, shadow
from cacheblend_rag.engine.chat import VllmChat
from cacheblend_rag.engine.link import Link
from cacheblend_rag.engine.start import WORKER, EngineSetup, chat_template, make_info
from cacheblend_rag.engine.worker import WorkerExtension
from cacheblend_rag.engine.worker_state import WorkerSide
from cacheblend_rag.errors import CacheBlendError, ConfigError
from cacheblend_rag.keys import KeySpace
from cacheblend_rag.learn import LearnOptions
from cacheblend_rag.plan import PromptPrefix
from cacheblend_rag.planner import Learning, Limits, Message, Space
from cacheblend_rag.prefix import ingest_prefix, prompt_prefix_ids
from cacheblend_rag.reason import Reason, Why
from cacheblend_rag.server.options import SERVER, ServerOptions
from cacheblend_rag.store import open_store
from cacheblend_rag.store.follow import Follower
from cacheblend_rag.store.url import parse_size, parse_url

_SPACE = "default"

logger = init_logger("vllm.cacheblend_rag")


@dataclasses.dataclass
class RankMessages(KVConnectorHandshakeMetadata):
    """From a rank to the scheduler's side, once the worker is bound.

    Attributes:
        messages: what it sends.
        store: URL, namespace and tenant of a store that the scheduler's side is to follow itself.
    """

    messages: list[Message]
    store: tuple[str, str, str] | None = None


class _Worker(WorkerExtension):
    """What vLLM mixes into its worker where our front door starts it."""

    def __init__(self, connector: WorkerSide, runner: Any, config: Any) -> None:
        self._own, self.model_runner, self.vllm_config = connector, runner, config
        self.device = runner.device

    def get_model(self) -> Any:
        """The loaded model."""
        return self.model_runner.get_model()

    def _connector(self) -> WorkerSide:
        return self._own


def model_runner() -> Any:
    """The model runner that registers its KV caches: up the stack of who calls this."""
    # vLLM gives a connector its KV caches, and never the model. Its own runner calls
    # ``register_kv_caches``, so it is among the callers; nothing of it is changed.
    frame = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("self")
        if all(hasattr(found, name) for name in ("get_model", "device", "kv_cache_config")):
            return found
        frame = frame.f_back  # type: ignore[assignment]
    raise RuntimeError("no model runner of vLLM's registers these KV caches")


def bind(connector: WorkerSide, runner: Any, vllm_config: Any, *, linked: bool) -> RankMessages:
    """Check the model, open the store, and say how requests are planned. All ranks do it together.
    What can't be blended is served without.

    Args:
        linked: the scheduler's side learns from this process what becomes of the store. Else it
            follows a shared store itself: news from here would reach it with the next step only.
    """
    why_not = connectors.refusal(connector, get_kv_transfer_group(), runner.vllm_config)
    if why_not is not None:
        logger.warning("requests are served without blending: %s", why_not.detail)
        return _refused(connector, why_not)
    try:
        given = vllm_config.kv_transfer_config.kv_connector_extra_config
        ours = {name: value for name, value in given.items() if name != SERVER}
        config = BlendConfig.of(ours, "kv_connector_extra_config")
        server = ServerOptions.of(given.get(SERVER, {}))
        return _bind(_Worker(connector, runner, vllm_config), config, server, linked)
    # A server that others started must come up. It serves exactly, and every report says why not
    # more.
    except CacheBlendError as error:
        why_not = Why(Reason.NOT_READY, f"{type(error).__name__}: {error}")
    logger.error("requests are served without blending: %s", why_not.detail)
    return _refused(connector, why_not)


def _refused(connector: WorkerSide, why_not: Why) -> RankMessages:
    connector.worker_state.limits = Limits(why_not=why_not)
    return RankMessages([_nothing(), connector.worker_state.limits])


def _bind(
    worker: _Worker, config: BlendConfig, server: ServerOptions, linked: bool
) -> RankMessages:
    vllm_config, link = worker.vllm_config, worker._connector().link
    refusal = compat.model_refusal(vllm_config.model_config)
    prepared = EngineSetup(None, refusal, compat.installed_version())
    # Together, since a model that one rank refuses is refused by all.
    info = make_info(prepared, vllm_config, lambda: _of_all_ranks(worker.cacheblend_inspect()))
    report = model_check.check_layers(info)
    if not report.passed:
        assert report.reason is not None
        logger.warning("requests are served without blending: %s", report.detail)
        return _refused(worker._connector(), Why(report.reason, report.detail))
    worker._rows().proved = lambda why_not: worker._send(
        Limits(why_not=why_not, longest=report.max_tokens, costs=worker._blender().costs)
    )
    learning = _learning(config, vllm_config)
    _check_shadow(worker, config)
    # what is learnt is in the memory of this process
    follows = linked or parse_url(config.store).scheme == "memory" or learning is not None
    memory = parse_size(config.gpu_cache) if config.gpu_cache else 0
    where = config.store, info.fingerprint, memory, config.namespace
    worker._open_store(*where, follows=follows, learning=learning)
    worker._send(_space(worker, config, server, info))
    measured = worker.cacheblend_costs()
    costs = Costs(**measured) if measured else None
    # Until one has shown that rows are right, every blend that begins is a proof.
    worker._limit(Limits(longest=report.max_tokens, costs=costs, proving=True))
    if follows:
        worker._list_store()
        return RankMessages([] if link.has_scheduler else link.take())
    # The scheduler's side is in another process, and would hear of this one's store by steps only:
    # where nobody asks anything, never.
    return RankMessages(link.take(), (config.store, info.fingerprint[:32], config.namespace))


def _learning(config: BlendConfig, vllm_config: Any) -> Learning | None:
    """Whether and how requests teach chunks.

    Raises:
        ConfigError: nobody would have them computed.
    """
    if config.learn == "off":
        return None
    _needs_endpoints("learn", "which have computed what was learnt", vllm_config)
    return Learning(LearnOptions.of(config.learn_options), config.learn == "store")


def _needs_endpoints(option: str, why: str, vllm_config: Any) -> None:
    if vllm_config.parallel_config.worker_extension_cls != WORKER:
        raise ConfigError(
            f"{option} needs our endpoints, {why}: start the server by `cacheblend serve`, or add "
            f"VLLM_PLUGINS=cacheblend and --worker-extension-cls {WORKER}"
        )


def _check_shadow(worker: _Worker, config: BlendConfig) -> None:
    """That answers can be computed again, where they are to be.

    Raises:
        ConfigError: they can't.
    """
    if not config.shadow:
        return
    _needs_endpoints("shadow", "which have answers computed again", worker.vllm_config)
    if refusal := shadow.why_not(worker._state().parts[0]):
        raise ConfigError(f"shadow={config.shadow} can't be had: {refusal}. Leave it out")


def follow(
    link: Link, url: str, namespace: str, tenant: str
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Have the scheduler's side follow a store itself; returns what lists it anew, and what closes
    it.
    """
    store = open_store(url, namespace=namespace, tenant=tenant)
    follower = Follower(store, lambda key: None)
    link.follow(follower)
    follower.list()

    def close() -> None:
        follower.close()
        store.close()

    return follower.list, close


def _nothing() -> Space:
    """A space of requests that are not blended, so that their reports say why."""
    return Space(name=_SPACE, keys=KeySpace("", ()), default=True)


def _space(worker: _Worker, config: BlendConfig, server: ServerOptions, info: Any) -> Space:
    """Of all requests; their usual prompt prefix is stored, if it is not there yet."""
    renderer = compat.renderer(worker.vllm_config)
    tokenizer = renderer.tokenizer
    chat = VllmChat(renderer, template=chat_template(server.chat_template))
    config = dataclasses.replace(
        config, chat_template_kwargs=chat.known(config.chat_template_kwargs)
    )
    prefix = ingest_prefix(config, tokenizer, chat, positions=info.positions)
    by_document = config.ingest_prefix == "document"
    keys = KeySpace(info.fingerprint, prefix, config.namespace, by_document)
    ids = prompt_prefix_ids(config, tokenizer, chat)
    prompt_prefix = None
    if len(ids) >= 2:
        prompt_prefix = PromptPrefix(keys.prompt_prefix_key(ids), ids)
        worker._store_prompt_prefix(prompt_prefix)
    return Space(
        name=_SPACE,
        keys=keys,
        prompt_prefix=prompt_prefix,
        options=config.request_defaults(),
        calibration=calibration.find(info.fingerprint, config.calibration),
        default=True,
    )


def _of_all_ranks(facts: Any) -> list[Any]:
    group = get_tp_group()
    if group.world_size == 1:
        return [facts]
    every: list[Any] = [None] * group.world_size
    torch.distributed.all_gather_object(every, facts, group=group.cpu_group)
    return every
