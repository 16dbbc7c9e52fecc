"""Which executor this engine's requests take."""

from __future__ import annotations

from collections.abc import Mapping

from cacheblend_rag.engine.attention import PagedCache
from cacheblend_rag.engine.executor import BlendExecutor, Region
from cacheblend_rag.engine.forward import ModelHandle
from cacheblend_rag.engine.isolated import prefill_seconds
from cacheblend_rag.engine.rope import Rerotator
from cacheblend_rag.engine.torch_executor import TorchExecutor
from cacheblend_rag.store.base import ChunkKV


class ExecutorFactory:
    """Makes requests' executors. ``reason`` says why they are the plain ones; empty if they are
    not.
    """

    def __init__(
        self, handle: ModelHandle, rope: Rerotator, cache: PagedCache, reason: str
    ) -> None:
        self._handle, self._rope, self._cache, self.reason = handle, rope, cache, reason

    def __call__(self, region: Region, first: range) -> BlendExecutor:
        """The executor of a request.

        Args:
            first: the layers whose KV is wanted before that of the others.
        """
        return TorchExecutor(region, self._handle, self._rope, self._cache)

    def stage(self, sources: Mapping[str, ChunkKV], first: range) -> None:
        """Begin to bring the chunks of a request whose executor is not made yet, if that helps:
        the layers ``first``, and no more before the executor asks for it.
        """

    def unstage(self) -> None:
        """What was begun so is in vain."""

    def costs(self) -> dict[str, float]:
        """Measured seconds, see ``cacheblend_rag.costs.Costs``; empty where none were measured."""
        if self._handle.device.type == "cpu" or not self._handle.ranks.alone:
            return {}
        prefill = prefill_seconds(self._handle)
        # To choose and to place without our kernels takes a GPU about as long as a prefill, until
        # requests have shown how long.
        plain = {"prefill_s": prefill, "recompute_s": prefill, "context_s": prefill}
        return {**plain, "blend_s": 0.0, "load_s": 0.0}

    def resident(self, key: str) -> ChunkKV | None:
        """The chunk, if a copy is at hand and the store need not be read; from any thread."""
        return None

    def forget(self, key: str) -> None:
        """Drop copies of a chunk outside the store; from any thread."""


def open_executors(
    handle: ModelHandle, rope: Rerotator, cache: PagedCache, gpu_cache: int = 0
) -> ExecutorFactory:
    """The quickest executors that are right here.

    Args:
        gpu_cache: bytes of GPU memory for chunks that are used often.
    """
    if handle.groups > 1:
        return ExecutorFactory(
            handle, rope, cache, "the kernels need one block table, layers have several"
        )
    if handle.device.type != "cuda":
        return ExecutorFactory(
            handle, rope, cache, f"the kernels need a GPU, the engine is on {handle.device}"
        )
    # Triton is imported with it, which a machine without a GPU need not have.
    from cacheblend_rag.engine.kernel_executor import KernelExecutorFactory, KernelsUnusableError

    try:
        return KernelExecutorFactory(handle, rope, cache, gpu_cache)
    except KernelsUnusableError as error:
        return ExecutorFactory(handle, rope, cache, str(error))
