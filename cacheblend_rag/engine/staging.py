"""Host to GPU: chunk KV in groups of layers, on a stream of its own, through a few buffers.

Shape legend: L layers, S source chunks, K layers of a group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from cacheblend_rag.engine.device_cache import CachedChunk, DeviceCache
from cacheblend_rag.engine.outcome import gpu_seconds
from cacheblend_rag.store.base import ChunkKV
from cacheblend_rag.undo import on_failure

_BUFFERS = 4, 8  # of a transfer, the least and the most
_SHARE = 100  # they take this part of the GPU's memory, between the two
_GROUP_BYTES = 96 << 20  # aimed at: small enough to start soon, large enough to run at full speed
_ALIGNMENT = 16  # bytes that the kernel moves at once


_Pieces = Sequence[torch.Tensor]  # of consecutive layers each


class Buffers:
    """A few equal pieces of GPU memory that one transfer at a time uses in turn.

    The copy stream writes a buffer, the computing stream reads it; an event each way keeps them
    apart.
    """

    def __init__(
        self, count: int, nbytes: int, device: torch.device, stream: torch.cuda.Stream
    ) -> None:
        self.nbytes = nbytes
        self.memory = torch.empty(count, nbytes, dtype=torch.uint8, device=device)
        self.memory.record_stream(stream)
        # PyTorch hands out memory in the order of one stream. What it was before may still be read
        # by what the computing stream has queued, so the copy stream waits for that; and it must
        # not go back while the copy stream writes.
        stream.wait_stream(torch.cuda.current_stream(device))
        self.free: list[torch.cuda.Event | None] = [None] * count


class Staging:
    """The copy stream of one rank, and buffers that wait for a transfer."""

    def __init__(self, device: torch.device, num_layers: int, device_cache: DeviceCache) -> None:
        self.device, self.num_layers, self.device_cache = device, num_layers, device_cache
        self.stream = torch.cuda.Stream(device)
        # As many as a question's layers fill while vLLM prepares the step, where there is room.
        least, most = _BUFFERS
        memory = torch.cuda.get_device_properties(device).total_memory
        self.num_buffers = min(max(memory // _SHARE // _GROUP_BYTES, least), most)
        self._pause = torch.zeros(1, dtype=torch.uint8, device=device)
        self._idle: list[Buffers] = []
        self._expected: tuple[dict[str, ChunkKV], Transfer] | None = None

    def stage(self, sources: Mapping[str, ChunkKV], through: int) -> None:
        """Start the transfer that ``begin`` will be asked for next, up to layer ``through``; in
        vain if it is another.
        """
        self._forget()
        self._expected = dict(sources), Transfer(self, sources)
        self._expected[1].start(through)

    def begin(self, sources: Mapping[str, ChunkKV]) -> Transfer:
        """A transfer of all layers of ``sources``, chunks by key, to the GPU."""
        if self._expected is not None:
            # By identity and order: addresses are laid out for exactly these chunks.
            expected, transfer = self._expected
            if list(expected) == list(sources) and all(
                expected[key] is chunk for key, chunk in sources.items()
            ):
                self._expected = None
                return transfer
        self._forget()
        return Transfer(self, sources)

    def _forget(self) -> None:
        """Give up the transfer that was expected."""
        expected, self._expected = self._expected, None
        if expected is not None:
            expected[1].give_up()

    def seconds_per_byte(self) -> float:
        """Of a copy from pinned memory."""
        host = torch.empty(_GROUP_BYTES, dtype=torch.uint8, pin_memory=True)
        there = torch.empty_like(host, device=self.device)
        with torch.cuda.stream(self.stream):
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            # On the copy stream, as transfers are: its speed beside nothing else.
            seconds = gpu_seconds(lambda: there.copy_(host, non_blocking=True))
        return seconds / _GROUP_BYTES

    def pause(self) -> None:
        """Called on the copy stream between two groups. A GPU has one engine for copies from the
        host, which takes all copies that one stream has ready before it turns to another: a small
        upload, vLLM's own ones too, would wait for the whole transfer. A stream that waits for a
        kernel has none ready.
        """
        self._pause.add_(1)

    def take(self, nbytes: int) -> Buffers:
        """Buffers of ``nbytes`` each at least; a transfer under way keeps its own."""
        if self._idle and self._idle[-1].nbytes >= nbytes:
            return self._idle.pop()
        # Too small ones are freed. At most one set is kept, so that the memory that idles stays
        # bounded.
        self._idle.clear()
        return Buffers(self.num_buffers, nbytes, self.device, self.stream)

    def give_back(self, buffers: Buffers) -> None:
        """For the next transfer."""
        self._idle = [buffers]


class Transfer:
    """All layers of one request's chunks on their way to the GPU.

    A chunk is there already (cached), goes into GPU memory to stay (filling), or passes through the
    buffers.

    Attributes:
        address_LS: int64, where each layer of each source is, or will be once ``arrive`` returned.
        is_aligned: all of them are multiples of 16.
    """

    def __init__(self, staging: Staging, sources: Mapping[str, ChunkKV]) -> None:
        self._staging = staging
        self._ready: dict[int, torch.cuda.Event] = {}
        self._cached: list[CachedChunk] = []  # kept until the request is done with them
        self._filling: list[tuple[str, CachedChunk, ChunkKV]] = []
        # Bytes of each group of layers on the host, and where they go: to a place in GPU memory
        # each, or to an offset in a buffer.
        self._to_stay: list[tuple[_Pieces, _Pieces]] = []
        self._passing: list[tuple[int, _Pieces]] = []
        self._buffers: Buffers | None = None
        self._started = 0
        self._most: int | None = None  # groups that may be started, where not all
        self.address_LS = np.empty((staging.num_layers, len(sources)), dtype=np.int64)
        with on_failure(self.give_up):  # no memory
            self._lay_out(sources)
        self.is_aligned = not (self.address_LS % _ALIGNMENT).any()

    def _lay_out(self, sources: Mapping[str, ChunkKV]) -> None:
        """Find room for every source."""
        staging, num_layers = self._staging, self._staging.num_layers
        passing: list[tuple[int, ChunkKV]] = []
        layers = np.arange(num_layers)
        for i, (key, chunk) in enumerate(sources.items()):
            cached = staging.device_cache.get(key)
            if cached is None:
                cached = staging.device_cache.room(key, chunk)
                if cached is not None:
                    cached.kv.record_stream(staging.stream)
                    self._filling.append((key, cached, chunk))
            # Its KV is on its way for another request, by events that this one does not know. To
            # copy it a second time costs less than to order the two.
            elif not cached.is_complete:
                cached = None  # another request's transfer is not through
            if cached is None:
                passing.append((i, chunk))
                continue
            self._cached.append(cached)
            self.address_LS[:, i] = cached.kv.data_ptr() + layers * (chunk.nbytes // num_layers)
        if self._filling:  # their memory may still be read by what was queued before
            staging.stream.wait_stream(torch.cuda.current_stream(staging.device))
        copied = [chunk for _, chunk in passing] + [chunk for _, _, chunk in self._filling]
        a_layer = sum(chunk.nbytes for chunk in copied) // num_layers
        # A copy of few bytes does not reach the bus's speed, and a copy of many keeps the first
        # layer waiting.
        self._group = max(1, min(_GROUP_BYTES // max(1, a_layer), num_layers))
        self._num_groups = -(-num_layers // self._group) if copied else 0
        for _, cached, chunk in self._filling:
            there = cached.kv.split(self._group)
            self._to_stay.append((there, chunk.kv_L2NHD.split(self._group)))
        offset = 0
        for i, chunk in passing:
            step = chunk.nbytes // num_layers
            self.address_LS[:, i] = offset + layers % self._group * step
            # As plain bytes, cut at once: the host queues these copies while a GPU has nothing to
            # do, and each operation on a tensor takes it as long as a copy.
            flat = chunk.kv_L2NHD.reshape(-1).view(torch.uint8)
            self._passing.append((offset, flat.split(step * self._group)))
            offset += step * self._group
        self._buffers = staging.take(offset) if passing else None
        if self._buffers is not None:
            # Known before anything is copied, so that all addresses go to the GPU in one upload.
            slot = layers // self._group % staging.num_buffers
            starts = self._buffers.memory.data_ptr() + slot * self._buffers.nbytes
            self.address_LS[:, [i for i, _ in passing]] += starts[:, None]

    def start(self, through: int) -> None:
        """Bring layers up to ``through``, as far as there are buffers for them, and no more by
        itself.
        """
        self.hold(through)
        if self._num_groups:
            self._arrive(0)

    def hold(self, index: int) -> None:
        """Start nothing behind the group of layer ``index`` by itself, until ``resume``: what the
        step uploads meanwhile would wait for it.
        """
        self._most = min(index // self._group + 1, self._num_groups)

    def resume(self, index: int) -> None:
        """Layer ``index`` is the next one to be read. Bring as much as there are buffers for."""
        self._most = None
        if self._num_groups and index < self._staging.num_layers:
            self._arrive(index)

    def give_up(self) -> None:
        """Nothing more will be read: what is half filled would be held for ever."""
        for key, cached, _ in self._filling:
            self._staging.device_cache.give_up(key, cached)

    def arrive(self, index: int) -> range:
        """Make the computing stream wait for layer ``index``; returns it and those that come along.
        The first call starts the transfer.
        """
        if not self._num_groups:
            return range(index, self._staging.num_layers)
        number = self._arrive(index)
        torch.cuda.current_stream(self._staging.device).wait_event(self._ready[number])
        last = min((number + 1) * self._group, self._staging.num_layers)
        return range(index, last)

    def used(self, layers: range) -> None:
        """These layers were read, up to the end of what came with them, and all before them."""
        # The next group that goes into this buffer waits for this event, and not for the whole
        # stream.
        if self._buffers is not None:
            done = torch.cuda.current_stream(self._staging.device).record_event()
            self._buffers.free[layers.start // self._group % len(self._buffers.free)] = done
        if layers.stop == self._staging.num_layers:
            # Whole on the computing stream's clock: whoever reads it next is queued behind this.
            for _, cached, _ in self._filling:
                cached.is_complete = True
            if self._buffers is not None:
                self._staging.give_back(self._buffers)
                self._buffers = None

    def _arrive(self, index: int) -> int:
        """The number of the group of layer ``index``, which is under way from here on."""
        number = index // self._group
        # As many groups ahead as there are buffers. More would have to wait for the layers that
        # read them.
        most = self._num_groups if self._most is None else max(self._most, number + 1)
        while self._started < min(number + self._staging.num_buffers, most):
            self._start(self._started)
            self._started += 1
        return number

    def _start(self, number: int) -> None:
        stream = self._staging.stream
        with torch.cuda.stream(stream):
            if number:
                self._staging.pause()
            for there, here in self._to_stay:
                there[number].copy_(here[number], non_blocking=True)
            if self._buffers is not None:
                slot = number % len(self._buffers.free)
                free, memory = self._buffers.free[slot], self._buffers.memory[slot]
                if free is not None:
                    stream.wait_event(free)
                for offset, pieces in self._passing:
                    piece = pieces[number]
                    memory[offset : offset + len(piece)].copy_(piece, non_blocking=True)
            self._ready[number] = stream.record_event()
