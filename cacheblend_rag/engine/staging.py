"""Host to GPU: chunk KV in groups of layers, on a stream of its own, through a few buffers.

Shape legend: L layers, S source chunks, K layers of a group.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from cacheblend_rag.engine.device_cache import CachedChunk, DeviceCache
from cacheblend_rag.engine.outcome import gpu_seconds
from cacheblend_rag.store.base import ChunkKV
from cacheblend_rag.undo import on_failure

# Transfers under way share this part of a GPU's memory, or this many bytes if that is less: vLLM,
# which fills the rest up to a few percent, does not know of it.
_SHARE, _LEAST_BYTES = 100, 384 << 20
_BUFFERS = 4, 8  # of a transfer, the least that is worth it and the most
_GROUP_BYTES = 96 << 20  # aimed at: small enough to start soon, large enough to run at full speed
# Of a transfer that finds too little left, so that its buffers take next to nothing.
_SCARCE_BUFFERS, _SCARCE_BYTES = 2, 24 << 20
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
        self.count, self.nbytes = count, nbytes
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
        memory = int(torch.cuda.get_device_properties(device).total_memory)
        self.nbytes = max(memory // _SHARE, _LEAST_BYTES)
        self._pause = torch.zeros(1, dtype=torch.uint8, device=device)
        # Those of a transfer that was given up go with it.
        self._under_way: weakref.WeakSet[Buffers] = weakref.WeakSet()
        self._idle: list[Buffers] = []
        self._expected: tuple[dict[str, ChunkKV], range, Transfer] | None = None

    def stage(self, sources: Mapping[str, ChunkKV], first: range) -> None:
        """Start the transfer that ``begin`` will be asked for next, as far as the layers ``first``
        go; in vain if it is another.
        """
        self.unstage()
        self._expected = dict(sources), first, Transfer(self, sources, first)
        self._expected[-1].start()

    def begin(self, sources: Mapping[str, ChunkKV], first: range) -> Transfer:
        """A transfer of all layers of ``sources``, chunks by key, to the GPU: ``first`` those that
        are wanted before the others, then the others in ascending order.
        """
        if self._expected is not None:
            # By identity and order: addresses are laid out for exactly these chunks.
            expected, expected_first, transfer = self._expected
            if (first, list(expected)) == (expected_first, list(sources)) and all(
                expected[key] is chunk for key, chunk in sources.items()
            ):
                self._expected = None
                return transfer
        self.unstage()
        return Transfer(self, sources, first)

    def unstage(self) -> None:
        """Give up the transfer that was expected."""
        expected, self._expected = self._expected, None
        if expected is not None:
            expected[-1].give_up()

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

    def room(self, a_layer: int) -> tuple[int, int]:
        """How many buffers a transfer may have, and the layers of ``a_layer`` bytes in each. A step
        with many blends has as many transfers, of which each needs some.
        """
        layers = min(max(1, _GROUP_BYTES // a_layer), self.num_layers)
        left = self.nbytes - sum(b.count * b.nbytes for b in self._under_way)
        least, most = (min(n, -(-self.num_layers // layers) + 1) for n in _BUFFERS)
        count = min(left // (layers * a_layer), most)
        if count >= least:
            return count, layers
        return _SCARCE_BUFFERS, min(max(1, _SCARCE_BYTES // a_layer), self.num_layers)

    def take(self, count: int, nbytes: int) -> Buffers:
        """So many buffers of ``nbytes`` each at least; a transfer under way keeps its own."""
        buffers = self._idle.pop() if self._idle else None
        # At most one set is kept, so that the memory that idles stays bounded. Another one than is
        # wanted is freed.
        if buffers is None or buffers.count != count or buffers.nbytes < nbytes:
            buffers = Buffers(count, nbytes, self.device, self.stream)
        self._under_way.add(buffers)
        return buffers

    def give_back(self, buffers: Buffers) -> None:
        """For the next transfer."""
        self._under_way.discard(buffers)
        self._idle = [buffers]


class Transfer:
    """All layers of one request's chunks on their way to the GPU, some of them at a time.

    A chunk is there already (cached), goes into GPU memory to stay (filling), or passes through the
    buffers.

    Attributes:
        address_LS: int64, where each layer of each source is, or will be once ``arrive`` returned.
        is_aligned: all of them are multiples of 16.
    """

    def __init__(self, staging: Staging, sources: Mapping[str, ChunkKV], first: range) -> None:
        self._staging = staging
        self._ready: list[torch.cuda.Event] = []  # of each group that was started
        self._cached: list[CachedChunk] = []  # kept until the request is done with them
        self._filling: list[tuple[str, CachedChunk, ChunkKV]] = []
        # Bytes of each group of layers on the host, and where they go: to a place in GPU memory
        # each, or one behind the other into a buffer.
        self._to_stay: list[tuple[_Pieces, _Pieces]] = []
        self._passing: list[_Pieces] = []
        self._rooms: list[int] = []  # bytes of a buffer for each of these
        self._buffers: Buffers | None = None
        self._arrived = 0  # groups
        self._ahead = 1  # groups that may be under way
        self._most: int | None = None  # groups that may be started, where not all
        self.address_LS = np.empty((staging.num_layers, len(sources)), dtype=np.int64)
        with on_failure(self.give_up):  # no memory
            self._lay_out(sources, first)
        self.is_aligned = not (self.address_LS % _ALIGNMENT).any()

    def _lay_out(self, sources: Mapping[str, ChunkKV], first: range) -> None:
        """Find room for every source."""
        staging, num_layers = self._staging, self._staging.num_layers
        passing: list[tuple[int, ChunkKV]] = []
        layers = np.arange(num_layers)
        for i, (key, chunk) in enumerate(sources.items()):
            cached = staging.device_cache.get(key, chunk)
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
        # layer waiting. What need not be copied is all there.
        self._ahead, most = staging.room(a_layer) if a_layer else (1, num_layers)
        self._is_copied = bool(copied)
        self._groups = _groups(num_layers, first, most)
        self._num_first = sum(group.start in first for group in self._groups)
        for _, cached, chunk in self._filling:
            self._to_stay.append((self._cut(cached.kv), self._cut(chunk.kv_L2NHD)))
        if passing:
            self._lay_out_passing(passing)

    def _lay_out_passing(self, passing: list[tuple[int, ChunkKV]]) -> None:
        """Find room in the buffers, which the groups fill in turn."""
        staging, num_layers = self._staging, self._staging.num_layers
        count, longest = self._ahead, max(map(len, self._groups))
        slot, inside = np.empty((2, num_layers), dtype=np.int64)
        for number, group in enumerate(self._groups):
            slot[group.start : group.stop] = number % count
            inside[group.start : group.stop] = np.arange(len(group))
        offset = 0
        for i, chunk in passing:
            step = chunk.nbytes // num_layers
            self.address_LS[:, i] = offset + inside * step
            # As plain bytes, cut at once: the host queues these copies while a GPU has nothing to
            # do, and each operation on a tensor takes it as long as a copy.
            flat = chunk.kv_L2NHD.reshape(-1).view(torch.uint8)
            self._passing.append(self._cut(flat, step))
            self._rooms.append(step * longest)
            offset += step * longest
        self._buffers = staging.take(count, offset)
        # Known before anything is copied, so that all addresses go to the GPU in one upload.
        starts = self._buffers.memory.data_ptr() + slot * self._buffers.nbytes
        self.address_LS[:, [i for i, _ in passing]] += starts[:, None]

    def _cut(self, layers: torch.Tensor, step: int = 1) -> _Pieces:
        """All layers, ``step`` rows each, in pieces by group."""
        order = sorted(self._groups, key=lambda group: group.start)
        pieces = layers.split([len(group) * step for group in order])
        by_start = {group.start: piece for group, piece in zip(order, pieces, strict=True)}
        return [by_start[group.start] for group in self._groups]

    def start(self) -> None:
        """Bring the layers that are wanted first, as far as there are buffers for them, and no more
        by itself.
        """
        self._most = self._num_first
        self._begin(self._ahead)

    def hold(self) -> None:
        """Start nothing by itself behind the group that follows the layers that are wanted first,
        until ``resume``: what the step uploads meanwhile would wait for it.
        """
        self._most = self._num_first + 1

    def resume(self) -> None:
        """Bring as much as there are buffers for."""
        self._most = None
        self._begin(self._arrived + self._ahead)

    def give_up(self) -> None:
        """Nothing more will be read: what is half filled would be held for ever."""
        for key, cached, _ in self._filling:
            self._staging.device_cache.give_up(key, cached)

    def arrive(self) -> range:
        """Make the computing stream wait for the next layers; returns them. The first call starts
        the transfer.
        """
        number = self._arrived
        if self._is_copied:
            # As many groups ahead as there are buffers. More would have to wait for the layers that
            # read them.
            self._begin(number + self._ahead)
            torch.cuda.current_stream(self._staging.device).wait_event(self._ready[number])
        self._arrived += 1
        return self._groups[number]

    def used(self) -> None:
        """The layers that arrived last were read."""
        # The next group that goes into this buffer waits for this event, and not for the whole
        # stream.
        if self._buffers is not None:
            done = torch.cuda.current_stream(self._staging.device).record_event()
            self._buffers.free[(self._arrived - 1) % len(self._buffers.free)] = done
        if self._arrived == len(self._groups):
            # Whole on the computing stream's clock: whoever reads it next is queued behind this.
            for _, cached, _ in self._filling:
                cached.is_complete = True
            if self._buffers is not None:
                self._staging.give_back(self._buffers)
                self._buffers = None

    def _begin(self, count: int) -> None:
        """Start the first ``count`` groups, as far as they may be; the next one to be read may."""
        most = len(self._groups) if self._most is None else max(self._most, self._arrived + 1)
        while self._is_copied and len(self._ready) < min(count, most, len(self._groups)):
            self._start(len(self._ready))

    def _start(self, number: int) -> None:
        stream = self._staging.stream
        with torch.cuda.stream(stream):
            if number:
                self._staging.pause()
            there = [there[number] for there, _ in self._to_stay]
            here = [here[number] for _, here in self._to_stay]
            if self._buffers is not None:
                slot = number % len(self._buffers.free)
                free, memory = self._buffers.free[slot], self._buffers.memory[slot]
                if free is not None:
                    stream.wait_event(free)
                pieces = [pieces[number] for pieces in self._passing]
                rooms = memory.split([*self._rooms, len(memory) - sum(self._rooms)])
                there += [room[: len(p)] for room, p in zip(rooms, pieces, strict=False)]
                here += pieces
            # All by one call: each from Python takes a host several times as long as a copy's
            # own launch.
            torch._foreach_copy_(there, here, non_blocking=True)
            self._ready.append(stream.record_event())


def _groups(num_layers: int, first: range, most: int) -> list[range]:
    """Layers 0 up to ``num_layers`` in pieces of at most ``most``: those of ``first``, then those
    below, then those above.
    """
    stretches = (first, range(first.start), range(first.stop, num_layers))
    return [
        range(start, min(start + most, stretch.stop))
        for stretch in stretches
        for start in range(stretch.start, stretch.stop, most)
    ]
