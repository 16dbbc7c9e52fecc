"""Running vLLM's own, unmodified ``model.forward`` under attention of our choosing.

vLLM's attention is an opaque op that finds its layer by name in the forward context and calls
``layer.impl.forward``. That context is plain data, made anew for each pass; ours maps every
attention layer to a proxy: the same layer with another ``impl``. Q, K and V of each layer then
arrive in a ``Pass``; norms, projections, experts and collectives stay vLLM's own. Nothing is
patched, and every decoder-only model works without a line of its own.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from vllm.forward_context import create_forward_context, override_forward_context
from vllm.model_executor.layers.attention import (
    Attention,
    ChunkedLocalAttention,
    MLAAttention,
)
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from cacheblend_rag.engine import compat, layout
from cacheblend_rag.engine.adapters import Adapters
from cacheblend_rag.engine.ranks import Ranks
from cacheblend_rag.reason import Reason, RefusedError

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class UnsupportedModelError(RefusedError):
    """The model can't be blended exactly. Reported, never raised to users."""


class _StopForward(Exception):
    """A pass has what it came for."""


class Pass(ABC):
    """One forward over chosen tokens: what attention does at each layer.

    Attributes:
        last: the layer at which it stops, if not before.

    Shape legend: T tokens of the pass, H query heads, G KV heads, D head size.
    """

    last: int

    @abstractmethod
    def attend(
        self,
        index: int,
        layer: Any,
        q_THD: torch.Tensor,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
        out_THD: torch.Tensor,
    ) -> None:
        """Write the attention output of layer ``index`` into ``out_THD``, or call ``self.stop``."""

    def stop(self) -> None:
        """End the pass here: nothing above this layer runs."""
        raise _StopForward


class _Guarded(Pass):
    """A pass of one of several ranks: what it raises waits until all are through, since the others
    run the model's collectives meanwhile.
    """

    def __init__(self, step: Pass) -> None:
        self._step, self.last = step, step.last
        self.error: Exception | None = None

    def attend(
        self,
        index: int,
        layer: Any,
        q_THD: torch.Tensor,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
        out_THD: torch.Tensor,
    ) -> None:
        if self.error is None:
            try:
                return self._step.attend(index, layer, q_THD, k_TGD, v_TGD, out_THD)
            except _StopForward:
                raise
            except Exception as error:  # raised again behind the pass
                self.error = error
        out_THD.zero_()
        if index == self.last:
            self.stop()


class ProxyImpl:
    """A layer's attention implementation of which a subclass does something itself."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer.impl, name)


class ProxyLayer:
    """An attention layer with a proxy ``impl``."""

    def __init__(self, impl: ProxyImpl) -> None:
        self._real = impl._layer
        self.impl = impl

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class _PassImpl(ProxyImpl):
    """Attention by a pass, which also gets the real layer: what its ``impl`` is decides which
    kernels fit it.
    """

    def __init__(self, layer: Any, index: int, run: Pass) -> None:
        super().__init__(layer)
        self._index, self._run = index, run

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
        **unused: Any,
    ) -> torch.Tensor:
        assert output_scale is None and output_block_scale is None  # eager passes are not fused
        if key is None or value is None:
            detail = "attention layers that put keys and values into the cache themselves"
            raise UnsupportedModelError(Reason.ATTENTION_LAYER, detail)
        self._run.attend(self._index, self._layer, query, key, value, output)
        return output


class LatentProxy(ProxyLayer):
    """A layer of multi-head latent attention, whose op calls the layer itself."""

    hisparse_cache = None  # a class of vLLM's asks for it; such layers are refused


class _LatentPassLayer(LatentProxy):
    """Latent attention by a pass: the latent and the rotated part arrive as one row a token."""

    def __init__(self, layer: Any, index: int, run: Pass) -> None:
        super().__init__(ProxyImpl(layer))
        self._index, self._run = index, run

    def prepare_kv_cache_update(self, attn_metadata: Any) -> None:
        """Nothing: a pass writes what is written."""

    def forward_impl(
        self,
        q: torch.Tensor,
        k_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
        **unused: Any,
    ) -> torch.Tensor:
        assert output_scale is None and output_block_scale is None  # eager passes are not fused
        real = self._real
        k_TGD = layout.packed(k_c_normed, k_pe)
        q_THD = q.view(len(q), real.num_heads, -1)
        out_THD = output.view(len(q), real.num_heads, -1)
        self._run.attend(self._index, real, q_THD, k_TGD, layout.no_values(k_TGD), out_THD)
        return output


def _proxy(layer: Any, index: int, run: Pass) -> ProxyLayer:
    if layout.is_latent(layer):
        return _LatentPassLayer(layer, index, run)
    return ProxyLayer(_PassImpl(layer, index, run))


class ModelHandle:
    """The loaded model, its attention layers in forward order, and the one way to run it.

    Args:
        others: names of attention layers that are not the model's but a draft model's.
    """

    def __init__(
        self,
        model: Any,
        config: VllmConfig,
        device: torch.device,
        others: Collection[str] = (),
    ) -> None:
        self.model, self.config, self.device = model, config, device
        # Compiled only where it saves launches; vLLM compiles for the tokens of one step at most. A
        # model that takes images is compiled for embeddings, among which those of a step's images
        # wait: our passes, of text, give it ids.
        takes_embeddings = any(
            getattr(config.model_config, name, False)
            for name in ("is_multimodal_model", "enable_prompt_embeds")
        )
        self._compiled = device.type == "cuda" and not takes_embeddings
        self._most_compiled = int(config.scheduler_config.max_num_batched_tokens)
        self._context_layers = config.compilation_config.static_forward_context  # experts too
        found = {
            name: layer
            for name, layer in self._context_layers.items()
            if isinstance(layer, AttentionLayerBase) and name not in others
        }
        for layer in found.values():
            _check_layer(layer)
        _check_inputs(model)
        self.attention = {name: layer for name, layer in found.items() if not _shares(layer)}
        if not self.attention:
            raise UnsupportedModelError(Reason.NO_ATTENTION, "the model has no attention layers")
        # those that read what another layer keeps: no pass of ours goes as far as these
        self.sharing = list(found)[len(self.attention) :]
        if not all(_shares(found[name]) for name in self.sharing):
            detail = "layers share KV with one another that have others with KV behind them"
            raise UnsupportedModelError(Reason.SHARED_KV, detail)
        if self.sharing and config.cache_config.kv_sharing_fast_prefill:
            detail = "kv_sharing_fast_prefill is on: layers that share KV do without most rows"
            raise UnsupportedModelError(Reason.SHARED_KV, detail)
        self.layers = list(self.attention.values())
        all_heads = int(config.model_config.get_total_num_kv_heads())
        self.layout = layout.layout_of(self.layers, all_heads)
        self.groups = 1  # KV cache groups that its layers are in
        self.ranks = Ranks()
        if device.type == "cuda":
            self._check_was_run_on_a_gpu()
        self.adapters = Adapters()

    def _check_was_run_on_a_gpu(self) -> None:
        """Nothing is blended where it was never seen to be right."""
        only = "are blended by the CPU engine only: they were not run on a GPU"
        if self.layout.by_layer and not compat.was_run("kv_heads"):
            detail = f"layers whose KV heads differ in number or size {only}"
            raise UnsupportedModelError(Reason.KV_HEADS, detail)
        if self.sharing and not compat.was_run("shared_kv"):
            raise UnsupportedModelError(Reason.SHARED_KV, f"layers that share KV {only}")
        if self.layout.parts == 1:
            self._check_latents_were_run()

    def _check_latents_were_run(self) -> None:
        eager, name = bool(self.config.model_config.enforce_eager), "latent attention (MLA)"
        if not (self.ranks.alone or compat.was_run("latents_on_ranks")):
            raise UnsupportedModelError(Reason.MLA, f"{name} was not run on several GPUs")
        for layer in self.layers:
            backend = layer.get_attn_backend()
            if compat.takes_any_run(backend.get_builder_cls()):
                continue
            if not eager:
                # Its scratch memory is as large as steps that decode need, and vLLM's graphs have
                # its address. As many sequences as a blend has rows would have it allocated anew.
                detail = (
                    f"{name} by the backend {backend.get_name()} in CUDA graphs; start with "
                    "enforce_eager=True"
                )
                raise UnsupportedModelError(Reason.MLA, detail)

    @property
    def num_layers(self) -> int:
        """Number of attention layers."""
        return len(self.layers)

    @functools.cached_property  # each blend asks several times
    def sees_all(self) -> list[bool]:
        """Of each layer, whether it sees all of any prompt, and not only a window."""
        longest = int(self.config.model_config.max_model_len)
        windows = [compat.sight(layer).least() for layer in self.layers]
        return [window is None or window >= longest for window in windows]

    def index(self, name: str) -> int:
        """The number of the layer that vLLM calls ``name``."""
        return list(self.attention).index(name)

    def run(
        self, step: Pass, ids_T: torch.Tensor, positions_T: torch.Tensor
    ) -> torch.Tensor | None:
        """Run the model over these tokens, ``step`` doing the attention. All ranks do it together.
        Returns what the model hands to its output layer, [T, hidden size]; None where it stopped.

        Args:
            step: called once a layer, from the first on, until it stops the pass.
            ids_T: int64 token ids on the model's device.
            positions_T: int64 positions on the model's device.
        """
        if self.ranks.alone:
            return self._run(step, ids_T, positions_T)
        self.ranks.agree()
        # Other ranks go on through the collectives of this forward, so this one goes through them
        # as well, with whatever numbers, and raises at the end.
        guarded = _Guarded(step)
        hidden_TE = self._run(guarded, ids_T, positions_T)
        if guarded.error is not None:
            raise guarded.error
        return hidden_TE

    @torch.inference_mode()
    def _run(
        self, step: Pass, ids_T: torch.Tensor, positions_T: torch.Tensor
    ) -> torch.Tensor | None:
        context = create_forward_context(
            attn_metadata=step,  # only has to be something: our proxies don't read it
            vllm_config=self.config,
            slot_mapping={},  # or the op would write K and V itself
            skip_compiled=not self._compiled or len(ids_T) > self._most_compiled,
        )
        proxies = {
            name: _proxy(layer, i, step) for i, (name, layer) in enumerate(self.attention.items())
        }
        context.no_compile_layers = {**self._context_layers, **proxies}
        try:
            # Also inside a step of vLLM's, whose own context comes back afterwards.
            with override_forward_context(context), self.adapters.during(len(ids_T)):
                hidden_TE: torch.Tensor = self.model(
                    # as vLLM's own: a compiled model does not check the dtype it was compiled for
                    input_ids=ids_T.int(),
                    positions=positions_T,
                    intermediate_tensors=None,
                    inputs_embeds=None,
                )
        except _StopForward:  # where it was to end
            return None
        return hidden_TE

    def write(
        self, index: int, k_TGD: torch.Tensor, v_TGD: torch.Tensor, slots_T: torch.Tensor
    ) -> None:
        """Put K and V of layer ``index`` into the paged cache, in its backend's own layout. Rows of
        [G, D] are contiguous; rows may be apart.
        """
        layout.write(self.layers[index], k_TGD, v_TGD, slots_T)


def _shares(layer: Any) -> bool:
    """Whether a layer keeps no KV, but reads another one's."""
    return getattr(layer, "kv_sharing_target_layer_name", None) is not None


def _check_inputs(model: Any) -> None:
    if getattr(model, "per_layer_embeddings", None) is not None:  # by row of vLLM's step
        detail = "the model takes images, and keeps more of each token than its embedding"
        raise UnsupportedModelError(Reason.ENCODER_INPUTS, detail)
    if hasattr(model, "get_model_state_cls"):  # such as hashes of the tokens before a token
        detail = "the model gets more of a step than tokens and positions, by a state of its own"
        raise UnsupportedModelError(Reason.OWN_INPUTS, detail)


def _check_layer(layer: Any) -> None:
    # The exact class, not a subclass: one that overrides ``forward`` attends in a way that proxies
    # of ``impl`` would pass over. Attention within chunks is a matter of metadata only.
    if type(layer) not in (Attention, ChunkedLocalAttention, MLAAttention):
        detail = f"attention layers of type {type(layer).__name__}"
        raise UnsupportedModelError(Reason.ATTENTION_LAYER, detail)
    if type(layer) is MLAAttention:
        _check_latent(layer)
    elif getattr(layer, "head_size_v", layer.head_size) != layer.head_size:
        raise UnsupportedModelError(Reason.KV_HEADS, "values are of another size than keys")
    impl = layer.impl
    if getattr(impl, "alibi_slopes", None) is not None:
        raise UnsupportedModelError(
            Reason.ALIBI, "ALiBi positions: keys can't be moved by rotation"
        )
    if getattr(layer, "has_sink", False) and compat.sinks(layer) is None:
        detail = f"attention sinks that the backend {type(impl).__name__} does not show"
        raise UnsupportedModelError(Reason.ATTENTION_SINKS, detail)
    if str(getattr(layer, "attn_type", "decoder")) not in ("decoder", "AttentionType.DECODER"):
        raise UnsupportedModelError(Reason.NOT_CAUSAL, "attention that is not causal")
    # Some backends write the cache within ``forward``. A step of such a one gives no moment at
    # which a layer's stored KV could be put in first.
    if not hasattr(impl, "do_kv_cache_update"):
        detail = f"attention backend {type(impl).__name__} does not expose its cache update"
        raise UnsupportedModelError(Reason.ATTENTION_BACKEND, detail)


def _check_latent(layer: Any) -> None:
    sparse = ("indexer", "hisparse_cache")
    if any(getattr(layer, name, None) is not None for name in sparse) or layer.impl.is_sparse:
        detail = (
            "latent attention (MLA) over keys that an indexer picks, which has a cache of its own"
        )
        raise UnsupportedModelError(Reason.MLA, detail)
    window = getattr(layer, "sliding_window", None)  # 0.26 has none
    if window is not None or not layer.qk_rope_head_dim:
        raise UnsupportedModelError(
            Reason.MLA, "latent attention (MLA) with a window or no rotation"
        )
    if layer.use_direct_call:
        raise UnsupportedModelError(Reason.MLA, "latent attention (MLA) that is no op of vLLM's")
    weight = getattr(layer.kv_b_proj, "weight", None)
    if weight is not None and not weight.numel():
        detail = (
            f"the backend {type(layer.impl).__name__} keeps no projection of latents (MLA); start "
            "the engine with attention_backend='CPU_MLA'"
        )
        raise UnsupportedModelError(Reason.ATTENTION_BACKEND, detail)
