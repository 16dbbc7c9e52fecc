"""CacheBlend on plain transformers, for the tests: shares no code with the engine.

A chunk's KV at its new place is not re-rotated here: the model computes chunk and ingest prefix at
shifted position ids, which is what a right re-rotation has to equal.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tiny import undecorated
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache

_INTERLEAVED = (
    "cohere", "cohere2", "deepseek_v2", "ernie4_5", "ernie4_5_moe", "glm", "glm4",
    "ernie4_5_vl_moe_text", "glm4v_text", "llama4_text",
)  # fmt: skip
_LATENT = ("deepseek_v2", "deepseek_v3", "minicpm3", "mistral4")
_GLOBAL_STILL = (  # only layers with a window rotate
    "afmoe",
    "cohere2",
    "exaone4",
    "muse_glimmer_text",
    "llama4_text",
)


class Part(NamedTuple):
    """Consecutive prompt tokens: a stored chunk, or fresh ones."""

    ids: tuple[int, ...]
    stored: bool


class Answer(NamedTuple):
    """Greedy tokens and their full log-probabilities, float32 [steps, vocab]."""

    tokens: list[int]
    logprobs: torch.Tensor


class _Scatter(DynamicCache):
    """A cache whose update puts new keys and values at chosen positions of a full one; first,
    where it was told so, it moves the tokens around them by the weights [N, chosen].
    """

    def fill(
        self,
        full: list[list[torch.Tensor]],
        at: torch.Tensor,
        moving: tuple[Reference, torch.Tensor] | None = None,
    ) -> _Scatter:
        self.full, self.at, self.moving = full, at, moving
        return self

    def update(self, k, v, layer, *args, **kwargs):  # type: ignore[no-untyped-def]
        keys, values = self.full[layer]
        if self.moving is not None:
            reference, weights = self.moving
            turned, still = (values, keys) if reference.is_latent else (keys, values)
            fresh, other = (v, k) if reference.is_latent else (k, v)
            everywhere = torch.arange(keys.shape[2])
            off = reference.rotated(fresh - turned[:, :, self.at], -self.at, layer)
            turned += reference.rotated(weights @ off, everywhere, layer)
            still += weights @ (other - still[:, :, self.at])
        keys[:, :, self.at], values[:, :, self.at] = k, v
        return keys, values

    def get_seq_length(self, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
        return 0


class _Late(_Scatter):
    """Of the layers from ``sees_from`` on, only the rows that are new are put there."""

    def __init__(self, sees_from: int, is_new: torch.Tensor) -> None:
        super().__init__()
        self._sees_from, self._is_new = sees_from, is_new

    def update(self, k, v, layer, *args, **kwargs):  # type: ignore[no-untyped-def]
        if layer < self._sees_from:
            return super().update(k, v, layer)
        new, at = self._is_new, self.at
        self.at = at[new]
        both = super().update(k[:, :, new], v[:, :, new], layer)
        self.at = at
        return both


class Reference:
    """A model, its layers' KV as lists of [keys, values], each [1, G, N, D]."""

    def __init__(self, path: Path, prefix: Sequence[int], takes_images: bool = False) -> None:
        config = AutoConfig.from_pretrained(path)
        whole = takes_images or config.model_type == "mistral4"
        kind: Any = AutoModelForImageTextToText if whole else AutoModelForCausalLM
        with undecorated(config):
            self.model = kind.from_pretrained(
                path, dtype=torch.float32, attn_implementation="eager"
            ).eval()
        for module in self.model.modules():
            # vLLM's Transformers backend decorates some of these classes in this very process
            module.do_not_compile = True
        inner = getattr(self.model, "model", self.model)
        self._text = inner.language_model if takes_images else self.model
        self.prefix = list(prefix)
        self.config = self.model.config.get_text_config()
        # its cache has latents, without position, in place of keys, and the rotated part as values
        self.is_latent = self.config.model_type in _LATENT
        if self.config.model_type == "cohere2":
            self.config.sliding_window += 1  # vLLM's also see the token just before the window

    @torch.no_grad()
    def kv(self, ids: Sequence[int], first: int = 0) -> list[list[torch.Tensor]]:
        """KV of ``ids`` at positions ``first`` and following."""
        cache = DynamicCache()
        at = torch.arange(first, first + len(ids))[None]
        self.model(torch.tensor([list(ids)]), position_ids=at, past_key_values=cache)
        return [[layer.keys, layer.values] for layer in cache.layers]

    def reused(self, parts: Sequence[Part]) -> list[list[torch.Tensor]]:
        """Fused KV of a prompt: stored chunks as computed behind the prefix, zeros elsewhere."""
        total = sum(len(p.ids) for p in parts)
        whole = self.kv([t for p in parts for t in p.ids])
        fused = [[torch.zeros_like(k), torch.zeros_like(v)] for k, v in whole]
        start, n = 0, len(self.prefix)
        for part in parts:
            if part.stored:
                for layer, (k, v) in zip(fused, self._alone(part, start - n), strict=True):
                    layer[0][:, :, start : start + len(part.ids)] = k[:, :, n:]
                    layer[1][:, :, start : start + len(part.ids)] = v[:, :, n:]
            start += len(part.ids)
        assert start == total
        return fused

    def _alone(self, part: Part, first: int) -> list[list[torch.Tensor]]:
        """KV of the prefix and a chunk, moved to position ``first``."""
        ids = [*self.prefix, *part.ids]
        if not self.config.rope_parameters.get("llama_4_scaling_beta"):
            return self.kv(ids, first)
        by = torch.full((len(ids),), first)  # attention is another one there: queries are scaled
        return [
            [k, self.rotated(v, by, n)] if self.is_latent else [self.rotated(k, by, n), v]
            for n, (k, v) in enumerate(self.kv(ids))
        ]

    def _frequencies(self, layer: int) -> torch.Tensor | None:
        """Of a layer's rotation; None where it does not rotate."""
        config, kind = self.config, ""
        if getattr(config, "layer_types", None):
            kind = config.layer_types[layer]
        if config.model_type in _GLOBAL_STILL and kind == "full_attention":
            return None
        if config.model_type == "smollm3" and not config.no_rope_layers[layer]:
            return None
        if config.model_type == "ernie4_5_vl_moe_text":  # its module has them in another order
            at = torch.arange(0, 1, 2 * config.num_attention_heads / config.hidden_size)
            return config.rope_parameters["rope_theta"] ** -at
        found = [
            getattr(m, name)
            for m in self._text.modules()
            for name in (f"{kind}_inv_freq", "inv_freq")
            if hasattr(m, name)
        ]
        return found[0]

    def rotated(self, k: torch.Tensor, by: torch.Tensor, layer: int) -> torch.Tensor:
        """Keys [1, G, N, D] of a layer rotated by ``by`` positions each, which may be negative."""
        frequencies = self._frequencies(layer)
        if frequencies is None:
            return k
        angle = by[:, None].float() * frequencies
        cos, sin = angle.cos(), angle.sin()
        turned, rest = k.split([2 * len(frequencies), k.shape[-1] - 2 * len(frequencies)], -1)
        interleaved = self.config.model_type in _INTERLEAVED
        a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
        pair = a * cos - b * sin, b * cos + a * sin
        turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
        return torch.cat([turned, rest], -1)

    @torch.no_grad()
    def blend(
        self,
        parts: Sequence[Part],
        question: Sequence[int],
        selected: Sequence[int],
        steps: int,
        propagation_length: int = 0,
    ) -> Answer:
        """Reuse, recompute exactly the ``selected`` positions, answer greedily."""
        ids = [t for p in parts for t in p.ids]
        fused = self.reused(parts)
        if selected:
            at = torch.tensor(list(selected))
            moving = (
                (self, _weights(parts, selected, propagation_length))
                if propagation_length
                else None
            )
            self.model(
                torch.tensor([[ids[i] for i in selected]]),
                position_ids=at[None],
                attention_mask=self._masks(at, len(ids)),
                past_key_values=_Scatter().fill(fused, at, moving),
            )
        return self._decode(self._cache(fused), [*question], len(ids), steps)

    def full(self, ids: Sequence[int], steps: int) -> Answer:
        """A full prefill, answered greedily."""
        return self._decode(DynamicCache(), list(ids), 0, steps)

    @torch.no_grad()
    def question_scores(
        self,
        parts: Sequence[Part],
        question: Sequence[int],
        layers: Sequence[int],
        sees_from: int = 0,
    ) -> torch.Tensor:
        """Attention of the question per context token over the reused KV; fresh tokens run too.
        Below layer ``sees_from`` they see themselves, and the prompt's first four tokens.
        """
        ids = [t for p in parts for t in p.ids]
        fused, stored = self.reused(parts), [p.stored for p in parts for _ in p.ids]
        rows = [i for i, is_stored in enumerate(stored) if not is_stored or (sees_from and i < 4)]
        end, asked = len(ids), len(question)
        at = torch.tensor([*rows, *range(end, end + asked)])
        grown = [[torch.nn.functional.pad(t, (0, 0, 0, asked)) for t in kv] for kv in fused]
        is_new = torch.tensor([*[not stored[i] for i in rows], *[True] * asked])
        with self._blind(range(sees_from), at):
            out = self.model(
                torch.tensor([[*[ids[i] for i in rows], *question]]),
                position_ids=at[None],
                attention_mask=self._masks(at, end + asked),
                past_key_values=_Late(sees_from, is_new).fill(grown, at),
                output_attentions=True,
            )
        return sum(out.attentions[i][0, :, len(rows) :, :end].sum((0, 1)) for i in layers)

    @contextlib.contextmanager
    def _blind(self, layers: range, at: torch.Tensor) -> Iterator[None]:
        """In these layers, no query sees a key at another position than ``at``."""

        def hide(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            mask = kwargs["attention_mask"]
            hidden = torch.full_like(mask, torch.finfo(mask.dtype).min)
            hidden[..., at] = mask[..., at]
            return args, {**kwargs, "attention_mask": hidden}

        found = [m.self_attn for m in self.model.modules() if hasattr(m, "self_attn")]
        handles = [found[i].register_forward_pre_hook(hide, with_kwargs=True) for i in layers]
        yield
        for handle in handles:
            handle.remove()

    @property
    def sees_all(self) -> list[bool]:
        """Of each layer, whether it has no window that is shorter than a test's prompt."""
        kinds = getattr(self.config, "layer_types", None)
        windows = (
            getattr(self.config, n, None) for n in ("sliding_window", "attention_chunk_size")
        )
        window = min(filter(None, windows), default=1 << 20)
        is_wide = window > 1024
        count = self.config.num_hidden_layers
        return [is_wide or (bool(kinds) and kinds[i] == "full_attention") for i in range(count)]

    def _masks(self, at: torch.Tensor, count: int) -> torch.Tensor | dict[str, torch.Tensor]:
        """What queries at positions ``at`` see of the first ``count`` keys, by kind of layer."""
        config = self.config
        full = _mask(at, count, count)
        kinds = set(getattr(config, "layer_types", None) or ())
        if "chunked_attention" in kinds:
            chunk = config.attention_chunk_size
            other = at[:, None] // chunk != torch.arange(count)[None] // chunk
            least = torch.finfo(torch.float32).min
            return {"full_attention": full, "chunked_attention": full.masked_fill(other, least)}
        if not getattr(config, "sliding_window", None):
            return full
        sliding = _mask(at, count, config.sliding_window)
        if "full_attention" not in kinds:
            return sliding
        return {"full_attention": full, "sliding_attention": sliding}

    @staticmethod
    def _cache(fused: list[list[torch.Tensor]]) -> DynamicCache:
        cache = DynamicCache()
        for layer, (k, v) in enumerate(fused):
            cache.update(k, v, layer)
        return cache

    @torch.no_grad()
    def _decode(self, cache: DynamicCache, ids: list[int], first: int, steps: int) -> Answer:
        tokens: list[int] = []
        logprobs = []
        for _ in range(steps):
            at = torch.arange(first, first + len(ids))[None]
            out = self.model(torch.tensor([ids]), position_ids=at, past_key_values=cache)
            logprobs.append(out.logits[0, -1].float().log_softmax(-1))
            first += len(ids)
            ids = [int(logprobs[-1].argmax())]
            tokens += ids
        return Answer(tokens, torch.stack(logprobs))


def _mask(at: torch.Tensor, count: int, window: int) -> torch.Tensor:
    distance = at[:, None] - torch.arange(count)[None]
    hidden = (distance < 0) | (distance >= window)
    mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
    return mask[None, None]


def _weights(
    parts: Sequence[Part], selected: Sequence[int], propagation_length: int
) -> torch.Tensor:
    """What each recomputed token says of each reused one, in words of one token at a time."""
    chunk_of = [number for number, p in enumerate(parts) for _ in p.ids]
    weights = torch.zeros(len(chunk_of), len(selected))
    for token, chunk in enumerate(chunk_of):
        if parts[chunk].stored and token not in selected:
            for column, other in enumerate(selected):
                if chunk_of[other] == chunk and abs(token - other) <= 4 * propagation_length:
                    weights[token, column] = math.exp(-abs(token - other) / propagation_length)
            weights[token] /= 1 + weights[token].sum()
    return weights
