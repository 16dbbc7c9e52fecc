"""What is asked of a rank's worker: its store, its notes on documents, and what it did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.distributed import get_tensor_model_parallel_rank
from vllm.distributed.kv_transfer import get_kv_transfer_group

from cacheblend_rag.engine import connectors, shadow
from cacheblend_rag.engine.names import answering, answers_to
from cacheblend_rag.engine.outcome import BlendOutcome
from cacheblend_rag.engine.stored import RankStore
from cacheblend_rag.engine.worker_state import WorkerSide, WorkerState
from cacheblend_rag.keys import KeySpace
from cacheblend_rag.shadow import Shadowed


class Queries:
    """Part of ``WorkerExtension``."""

    def cacheblend_register(self, documents: list[tuple[str, list[str]]]) -> Any:
        """Note which keys each document consists of."""
        return self._later(lambda store: store.register(documents))

    def cacheblend_registered(self, documents: list[str]) -> Any:
        """Which of ``documents`` something is noted for."""
        return self._later(lambda store: store.registered(documents))

    def cacheblend_unregister(
        self, documents: list[str], only: list[str] | None, forgotten: list[str]
    ) -> Any:
        """Drop the notes on ``documents``, or only those on the keys ``only`` among theirs, but for
        what is yet to be forgotten: the keys that no other document consists of, without those
        ``forgotten``. These are returned.
        """
        return self._later(lambda store: store.unregister(documents, only, forgotten))

    def cacheblend_document_keys(self, document: str) -> Any:
        """The keys that are noted for a document."""
        return self._later(lambda store: store.document_keys(document))

    def cacheblend_list(self) -> Any:
        """Have the scheduler's side know all that is stored; takes long where that is much."""
        return self._listed(lambda store: store.follower.list())

    def cacheblend_contains(self, key: str) -> Any:
        """Whether this rank's store has a chunk; fails where the store can't be asked."""
        return self._from_answering_rank(lambda store: store.store.contains(key))

    def cacheblend_page(
        self, keys: list[Any], after: str, limit: int, document: str | None, fresh: bool = False
    ) -> Any:
        """Keys of stored chunks of a key space (``KeySpace.to_plain``) in order, at most ``limit``
        behind ``after``, or those of a document; None where another rank speaks for the store.
        ``fresh``: the store is listed anew.
        """
        space = KeySpace.from_plain(keys)
        return self._listed(lambda store: store.page(space, after, limit, document, fresh=fresh))

    def cacheblend_owned(self, space: list[Any], keys: list[str]) -> Any:
        """Those of ``keys`` that are chunks of this key space; None where another rank speaks."""
        return self._listed(lambda store: store.owned(KeySpace.from_plain(space), keys))

    def cacheblend_count(self, space: list[Any]) -> Any:
        """How many chunks of this key space are stored; None where another rank speaks."""
        return self._listed(lambda store: store.count(KeySpace.from_plain(space)))

    def cacheblend_store_stats(self) -> Any:
        """Counts of this rank's store; None where another speaks for it."""
        return self._listed(lambda store: store.stats())

    def cacheblend_taken(self, tickets: list[int | None]) -> list[Any]:
        """The result that this rank's ticket of ``tickets`` stands for, in a list, once; an empty
        list while there is none.
        """
        number = tickets[get_tensor_model_parallel_rank()]
        return [] if number is None else self._state().store.thread.take(number)

    def cacheblend_state(self) -> dict[str, Any]:
        """What was found and sent when this worker was bound, for a front that did not start it:
        ``facts`` as ``cacheblend_inspect`` has them, ``limits``, the default ``space``, and whether
        the scheduler's side learns at once what this rank does.
        """
        state, connector = self._state(), self._connector()
        facts = {k: v for k, v in state.facts.items() if k not in ("checks", "attention")}
        limits = state.limits._asdict()
        return {
            "facts": facts,
            "why_not": None if state.limits.why_not is None else list(state.limits.why_not),
            "longest": limits["longest"],
            "proving": limits["proving"],
            "space": None if state.space is None else state.space.to_plain(),
            "is_open": state.is_open,
            "has_scheduler": connector.link.has_scheduler,
            "instance": state.instance,
        }

    def cacheblend_learnt(self) -> dict[str, Any]:
        """The chunks that were learnt since the call before: ``spans``, each a ``learn.Span`` in a
        list. And of the engine, ``steps`` so far and ``step_s`` of a recent one.
        """
        connector = self._connector()
        spans = [list(span) for span in connector.link.take_spans()]
        return {"spans": spans, **connector.step_timer.to_plain()}

    def cacheblend_shadow(self, parts: int, steps: int) -> dict[str, Any]:
        """Compute so many parts of the answers that are to be computed again, where the engine has
        made no step but the first ``steps``. Returns the ``steps`` so far, the ``step_s`` of a
        recent one, the ``seconds`` of the slice, what waits (see ``ShadowWorker.news``), and of
        an answer that is ``done`` its namespace, template, ratio and ``Figures``.
        """
        connector, worker = self._connector(), self._state().shadow
        timer = connector.step_timer.to_plain()
        found: dict[str, Any] = {**timer, "seconds": 0.0, "done": None}
        if worker is None:  # the model is not blended
            return {**found, "waiting": 0, "tokens": 0, "dropped": {}}
        worker.add(connector.link.take_shadows())
        # Counted alike by all ranks, so all of them compute, or none.
        done = worker.go_on(parts) if timer["steps"] == steps else None
        if timer["steps"] == steps:
            connector.step_timer.exclude(worker.seconds)
            found["seconds"] = worker.seconds
        job, figures = done or (None, None)
        if job is not None and figures is not None:
            drawn = job.drawn
            connector.link.send(Shadowed(drawn.key, job.ratio, figures.changed))
            found["done"] = [drawn.namespace, drawn.template, job.ratio, list(figures)]
        return {**found, **worker.news()}

    def cacheblend_shadow_refusal(self) -> str:
        """Why answers of this engine can't be computed again; empty if they can."""
        state = self._state()
        return shadow.why_not(state.parts[0]) if state.shadow is not None else ""

    def cacheblend_reports(self, request: str, space: str | None = None) -> list[dict[str, Any]]:
        """What was done for the requests of vLLM's that answered a client's request, in order. With
        ``space`` (``KeySpace.key`` of nothing), for those in that key space.
        """
        recent = self._connector().recent
        own = {n: _report(recent[n]) for n in list(recent) if answers_to(n, request)}
        if space is not None:
            own = {name: done for name, done in own.items() if done["space"] == space}
        return [own[name] for name in answering(own, request)]

    def cacheblend_outcome(self, name: str, positions: bool = False) -> dict[str, Any]:
        """What was done for a request whose last output could not carry it: it ended in the step of
        its blend, or the front end ended it. With ``positions``, the recomputed positions too.
        """
        done = self._connector().recent.get(name, {})
        if not isinstance(done, BlendOutcome):
            return done
        return {**done.report(), **({"selected": done.positions()} if positions else {})}

    def _from_answering_rank(
        self, work: Callable[[RankStore], Any], *, aside: bool = False
    ) -> dict[str, int] | None:
        """As ``_later``; None where another rank speaks for the store."""
        return None if self._state().is_replica else self._later(work, aside=aside)

    def _listed(self, work: Callable[[RankStore], Any]) -> dict[str, int] | None:
        """As ``_from_answering_rank``, for what may go through all that is stored: no ingestion
        waits for it.
        """
        return self._from_answering_rank(work, aside=True)

    def _later(self, work: Callable[[RankStore], Any], *, aside: bool = False) -> dict[str, int]:
        """Have a thread of the store do ``work``: no step waits for a disk or a network."""
        store = self._state().store
        return store.thread.start(lambda: work(store), aside=aside)

    def _connector(self) -> WorkerSide:
        return connectors.ours(get_kv_transfer_group())

    def _state(self) -> WorkerState:
        """Shared with whoever else stands for this worker: see ``engine/binding.py``."""
        return self._connector().worker_state


def _report(done: BlendOutcome | dict[str, Any]) -> dict[str, Any]:
    return done.report() if isinstance(done, BlendOutcome) else done
