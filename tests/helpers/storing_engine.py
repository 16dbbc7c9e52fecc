"""A fake engine whose workers have real stores, opened, written and followed as real ones do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pytest
from chunks import chunk_of
from fake_engine import FakeEngine

from cacheblend_rag.engine import EngineRequest
from cacheblend_rag.engine.base import awaited
from cacheblend_rag.engine.start import unwrap
from cacheblend_rag.engine.stored import RankStore
from cacheblend_rag.keys import KeySpace
from cacheblend_rag.planner import Space
from cacheblend_rag.store import ChunkKV, open_store

_OF_STORE = ("missing", "forget", "register", "registered", "unregister")


class StoringEngine(FakeEngine):
    """Its KV is made up."""

    num_ranks: ClassVar[int] = 1

    def __init__(self, model: str, options: Mapping[str, Any]) -> None:
        super().__init__(model, options)
        self.ranks: list[RankStore] = []
        self.near: set[str] = set()  # what is kept beside the stores

    def rpc(self, method: str, *args: Any) -> list[Any]:
        return unwrap(awaited(self._ranks, method, *args))

    def close(self) -> None:
        for rank in self.ranks:
            rank.close()
        super().close()

    def _ranks(self, method: str, *args: Any) -> list[Any]:
        self._open()
        match method.removeprefix("cacheblend_"), args:
            case "bind", [url, fingerprint, _, tenant]:
                for rank in range(self.num_ranks):
                    namespace = fingerprint[:32] + f"-{rank}" * (self.num_ranks > 1)
                    store = open_store(url, namespace=namespace, tenant=tenant)
                    self.ranks.append(RankStore(store, self.near.discard))
                    self.ranks[-1].follower.start(lambda: None)
                return [True for _ in self.ranks]
            case "open", [space]:
                self.planner.learn(0, Space.from_plain(space))
                return [None for _ in self.ranks]
            case "list", []:
                return self._later(lambda rank: rank.follower.list())
            case "taken", [tickets]:
                both = zip(self.ranks, tickets, strict=True)
                return [[] if n is None else rank.thread.take(n) for rank, n in both]
            case "ingest", [keys, chunks, prefix, contexts]:
                kv = [chunk_of(1, num_tokens=len(ids)).kv_L2NHD for ids in chunks]
                computed = [
                    ChunkKV(tuple(ids), len(prefix) + len(context), of_ids)
                    for ids, context, of_ids in zip(chunks, contexts, kv, strict=True)
                ]
                return self._later(lambda rank: rank.put(keys, computed))
            case name, _ if name in _OF_STORE:
                return self._later(lambda rank: getattr(rank, name)(*args))
            case "page", [space, after, limit, document, fresh]:
                keys = KeySpace.from_plain(space)
                return self._later(
                    lambda rank: rank.page(keys, after, limit, document, fresh=fresh)
                )
            case "store_stats", _:
                return self._later(lambda rank: rank.stats())
        return super().rpc(method, *args)

    def _planned(self, request: EngineRequest) -> dict[str, Any]:
        for number, rank in enumerate(self.ranks):
            if (news := rank.follower.take()) is not None:
                self.planner.learn(number, news)
        return super()._planned(request)

    def _later(self, work: Callable[[RankStore], Any]) -> list[Any]:
        return [rank.thread.start(lambda rank=rank: work(rank)) for rank in self.ranks]  # type: ignore[misc]


def install(patch: pytest.MonkeyPatch, *, num_ranks: int = 1) -> None:
    """From here on every CacheBlend runs over one."""
    patch.setattr(StoringEngine, "num_ranks", num_ranks)
    patch.setattr(
        "cacheblend_rag.blend.create_engine",
        lambda kind, model, options: StoringEngine(model, options),
    )
