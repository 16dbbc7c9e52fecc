"""What happens before the first request: the model check, costs, and the space of prompts."""

from __future__ import annotations

import hashlib
import statistics
import time
import uuid
from array import array
from contextlib import suppress
from dataclasses import replace
from typing import Any

from cacheblend_rag import calibration, model_check
from cacheblend_rag.config import BlendConfig
from cacheblend_rag.costs import Costs
from cacheblend_rag.engine import EngineRequest, ModelCheck
from cacheblend_rag.engine.base import adapter_name
from cacheblend_rag.errors import (
    UnavailableError,
)
from cacheblend_rag.front.answers import Answers, PreparedRequest
from cacheblend_rag.front.base import ONE_TOKEN
from cacheblend_rag.front.ingestion import Ingestion
from cacheblend_rag.ingest import Chunk
from cacheblend_rag.keys import KeySpace
from cacheblend_rag.plan import Plan, PromptPrefix
from cacheblend_rag.planner import Space
from cacheblend_rag.prefix import ingest_prefix
from cacheblend_rag.reason import Reason
from cacheblend_rag.store.url import parse_size

_TIMING_ROUNDS = 7
_TRIES = 3  # to have the probe's chunk from the store
_PROBE_SAMPLING = {**ONE_TOKEN, "logprobs": 20}


class Startup(Ingestion, Answers):
    """Opens an engine for blending."""

    _longest: int | None

    def _check_model(self) -> ModelCheck:
        """Check the model, open the store, and prove ratio 1 on a probe prompt."""
        report = model_check.check_layers(self.info)
        if not report.passed:
            return report
        self._space = self._key_space(self.config)
        has_scheduler = self._engine.rpc(
            "cacheblend_bind",
            self.config.store,
            self.info.fingerprint,
            parse_size(self.config.gpu_cache) if self.config.gpu_cache else 0,
            self.config.namespace,
        )
        self._has_scheduler = all(has_scheduler)
        self._longest = report.max_tokens
        self._limit(None)
        report = self._probe(report)
        if report.passed:
            self._longest = report.max_tokens
            # What is measured at start is no traffic.
            self._open_space(replace(self.config, shadow=0.0))
        else:
            self._engine.rpc("cacheblend_unbind")
        return report

    def _limit(self, costs: Costs | None) -> None:
        self._engine.rpc("cacheblend_limit", self._longest, costs and costs._asdict())
        self._sync()

    def _probe(self, report: ModelCheck) -> ModelCheck:
        probe = model_check.probe(self.info)
        if probe is None:
            return report
        name = f"probe-{self._name}"
        # behind the probe's own prefix, so that the first chunk's KV is exact, and has no rows; and
        # by a key of this front alone: others that start over the same store forget theirs
        own = hashlib.sha256(f"{self.info.fingerprint}/{name}".encode()).hexdigest()
        space = KeySpace(own, probe.prompt_prefix, self.config.namespace)
        key = space.key(probe.chunk)
        self._ingest([Chunk(key, probe.chunk)], probe.prompt_prefix)
        # whether the store took it or not: then it is missing, and computed with the others
        known = [[key, array("i", probe.chunk).tobytes(), len(probe.prompt_prefix)]]
        self._engine.rpc("cacheblend_open", Space(name=name, keys=space).to_plain(), known)
        self._sync()
        [[alone]] = self._engine.generate([_probing(probe.ids)])
        # with a request of one row and a plain prefill in the same step: were rows mixed up there,
        # nothing else would say so
        config = self.config.for_call(
            {"mode": "blend", "recompute_ratio": 1.0, "blend_if": "always"}
        )
        for _ in range(_TRIES):
            neighbours = [_probing(probe.ids[:1]), _probing(probe.ids)]
            blended = _probing(probe.ids, self._params(config, name, name))
            _, *together = self._engine.generate([*neighbours, blended])
            prepared = PreparedRequest(blended, None, "blend", 0.0, name)
            done = self._engine_part(prepared, together[1])
            if done.get("reason") != Reason.CHUNKS_MISSING:
                break  # a store that is slow just now says nothing of the model
        why_not = "" if "recomputed" in done else str(done.get("detail") or "it did not say why")
        with suppress(UnavailableError):  # the store keeps the probe then
            self._engine.rpc("cacheblend_forget", [key])
        for [piece] in together:
            assert alone.logprobs is not None and piece.logprobs is not None
            both = alone.logprobs[0], piece.logprobs[0]
            why_not = (
                "" if "recomputed" in done else str(done.get("detail") or "it did not say why")
            )
            report = model_check.check_prefill(report, *both, why_not)
            if not report.passed:
                return report
        return model_check.within_what_was_proved(report, self.info, len(probe.ids))

    def _measure_costs(self) -> Costs | None:
        """What the workers measured, corrected by requests from end to end; None on a CPU."""
        measured = self._engine.rpc("cacheblend_costs")[0]
        if not measured:
            return None
        costs, prompts = Costs(**measured), model_check.timing_ids(self.info, _TIMING_ROUNDS)
        if not prompts:
            return costs
        ids = prompts[0][1]
        chunk = Chunk(self._space.key(ids), ids)
        self._ingest([chunk], self._space.prefix_ids)
        self._sync()
        plain, blended = {"mode": "full"}, {"mode": "blend", "blend_if": "always"}
        taken: dict[str, list[float]] = {"full": [], "blend": []}
        plan: Plan | None = None
        for parts in prompts:
            for options in (plain, blended):
                start = time.perf_counter()
                prepared = self._prepare(sum(parts, ()), {**options, **ONE_TOKEN})
                pieces = self._engine.generate([prepared.request])[0]
                seconds = time.perf_counter() - start
                # the store's speed is known apart
                done = self._engine_part(prepared, pieces)
                fetched = done.get("seconds", {}).get("fetch", 0.0)
                taken[options["mode"]].append(seconds - fetched)
            plan = Plan.from_dict(done["plan"]) if done.get("plan") else None
        with suppress(UnavailableError):
            self.forget_keys([chunk.key])
        if plan is None:
            return costs
        return costs.corrected(plan, *(statistics.median(taken[mode]) for mode in taken))

    def _key_space(self, config: BlendConfig) -> KeySpace:
        prefix = ingest_prefix(
            config, self._tokenizer, self._engine.chat, positions=self._positions
        )
        by_document = config.ingest_prefix == "document"
        weights = self.info.fingerprint
        if self._adapter:
            weights = hashlib.sha256(f"{weights}/{self._adapter}".encode()).hexdigest()
        return KeySpace(weights, prefix, config.namespace, by_document)

    def _open_space(self, config: BlendConfig | None = None) -> None:
        """Have this front's requests planned by its own configuration, or by ``config``."""
        options = calibration.sent(config or self.config, self.calibration).request_defaults()
        prompt_prefix = self._store_prompt_prefix()
        adapter = "" if self._lora is None else adapter_name(self._lora)
        space = Space(
            name=self._name,
            keys=self._space,
            prompt_prefix=prompt_prefix,
            options=options,
            calibration=self.calibration,
            adapter=adapter,
        )
        self._engine.rpc("cacheblend_open", space.to_plain())
        self._list_stored()
        self._sync()

    def _list_stored(self) -> None:
        """Have prompts searched for all that is stored."""
        self._ask_stores("cacheblend_list")

    def _store_prompt_prefix(self) -> PromptPrefix | None:
        """The prompt prefix of chats, stored at position 0: exact where a prompt starts with it."""
        ids = self._prompt_prefix_ids()
        if len(ids) < 2:
            return None
        key = self._space.prompt_prefix_key(ids)
        if any(self._ask_stores("cacheblend_missing", [key])):
            stable = self._prompt_prefix_ids(timeless=True)
            if stable == ids:
                self._ingest([Chunk(key, ids)], ())
            else:
                self._replace_prompt_prefix(
                    f"cacheblend/head/{self._space.prompt_prefix_key(stable)}", Chunk(key, ids)
                )
        return PromptPrefix(key, ids)

    def _replace_prompt_prefix(self, name: str, prompt_prefix: Chunk) -> None:
        """One with a date is another every day, and only the newest is kept."""
        old = self._to_forget([name], None)
        self._engine.rpc("cacheblend_forget", sorted(old))
        self._to_forget([name], None, old)
        self._ingest([prompt_prefix], ())
        self._engine.rpc("cacheblend_register", [(name, [prompt_prefix.key])])


def _probing(ids: tuple[int, ...], params: dict[str, Any] | None = None) -> EngineRequest:
    """A request of the model check's, of which nothing is in vLLM's prefix cache."""
    return EngineRequest(
        token_ids=ids,
        sampling=_PROBE_SAMPLING,
        params=params,
        cache_salt=f"full:{uuid.uuid4().hex}",
    )
