"""LoRA adapters in forwards of our own. vLLM's layers add what the rows of its next step ask for: a
forward outside that step says what its own tokens ask for, and puts that back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cacheblend_rag.errors import ConfigError

_FILES = ("adapter_config.json", "*.safetensors", "*.bin", "*.pt")


def request_of(plain: Sequence[Any] | None) -> Any:
    """vLLM's request for an adapter, from its name, number and path; None for the model alone."""
    if plain is None:
        return None
    from vllm.lora.request import LoRARequest

    return LoRARequest(*plain)


def digest(folder: Path) -> str:
    """Of every byte of an adapter, hexadecimal.

    Raises:
        ConfigError: there is none in this folder.
    """
    files = [path for pattern in _FILES for path in sorted(folder.glob(pattern))]
    if not (folder / _FILES[0]).is_file() or len(files) < 2:
        raise ConfigError(
            f"{folder} holds no LoRA adapter. Give a folder with adapter_config.json and weights "
            "as lora_path: chunks are keyed by their content"
        )
    found = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


class Adapters:
    """Which adapter the tokens of our forwards have, on one rank.

    Args:
        runner: vLLM's model runner; None where no adapter is served.
    """

    def __init__(self, runner: Any = None) -> None:
        self._manager = getattr(runner, "lora_manager", None)
        self._current: Any = None
        self._asked: tuple[Any, Any] | None = None  # of the forward under way: adapter, mapping

    def open(self, request: Any) -> str:
        """Load an adapter; returns the digest of what was read."""
        if self._manager is None:
            raise ConfigError("the engine serves no LoRA adapter. Start it with enable_lora=True")
        found = digest(Path(request.lora_path))
        self._manager.add_adapter(request)
        return found

    @contextmanager
    def using(self, request: Any) -> Iterator[None]:
        """All forwards within the block are those of a request's adapter, or of the model alone."""
        before, self._current = self._current, request
        try:
            yield
        finally:
            self._current = before

    @contextmanager
    def during(self, num_tokens: int) -> Iterator[None]:
        """vLLM's layers add the adapter for the tokens of one forward, and behind it again what
        they did.
        """
        if self._manager is None:
            yield
            return
        from vllm.lora.layers import LoRAMapping

        # Its last mapping is kept nowhere else. vLLM sets it before a step's forward and not again,
        # so a forward of ours within that step has to put it back.
        layers = self._manager._adapter_manager
        before, request, outer = layers._last_mapping, self._current, self._asked
        number = request.lora_int_id if request is not None else 0
        self._asked = request, LoRAMapping((number,) * num_tokens, (number,), is_prefill=True)
        try:
            self.renew()
            yield
        finally:
            self._asked = outer
            # Where an adapter of that step has lost its slot to ours, the next step sets its own.
            if before is not None and _in_slots(layers, before):
                layers.set_adapter_mapping(before)

    def renew(self) -> None:
        """A forward of ours goes on, between two of whose parts a step may have run: vLLM's layers
        would add what that step asked for.
        """
        if self._manager is None or self._asked is None:
            return
        (request, mapping), layers = self._asked, self._manager._adapter_manager
        if layers._last_mapping is not mapping:
            layers._last_mapping = None  # or an equal one, over other slots, would be kept
            self._manager.set_active_adapters({request} - {None}, mapping)


def _in_slots(layers: Any, mapping: Any) -> bool:
    """Whether all adapters that a mapping names are loaded into vLLM's layers."""
    named = {*mapping.index_mapping, *mapping.prompt_mapping} - {0}
    return named <= set(layers.lora_index_to_id)
