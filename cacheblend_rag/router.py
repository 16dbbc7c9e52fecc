"""Which replica has a request's chunks near: what each was sent before, by the text of prompts.

Whoever routes sees all prompts. So no replica has to report what it holds, and no tokenizer and no
list of chunks is needed: a *sketch* of a prompt is some windows of its text, chosen by their
content alone. A chunk has the same windows wherever it stands, so two prompts share windows where
they share chunks. What a replica holds is guessed by an LRU of the windows that it was sent.

A guess that is wrong costs time, never an answer. Pure: no clock, no I/O, no randomness. The same
calls lead to the same choices in every process. Not safe to be used by two threads at once.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh64_intdigest

from cacheblend_rag.errors import ConfigError

WINDOW_BYTES = 32  # a power of two
STRIDE_BYTES = 256  # a window is chosen once in so many bytes, on average
MOST_BYTES = 1 << 20  # of a prompt that are looked at: its first ones
MOST_WINDOWS = 2048  # of a sketch
MOST_HOLDERS = 64  # what more replicas hold tells nothing
WINDOW_MEMORY = 280  # bytes of memory that a remembered window takes at most
_BLOCK = 1 << 16  # bytes hashed at once, which a processor's cache holds
_MULTIPLIER, _HALF = np.uint64(0x9E3779B97F4A7C15), np.uint64(32)
_MASK = (1 << 60) - 1  # such integers take 32 bytes of memory in Python
_FEWEST = 8  # requests of late, for each replica, from which on their mean says something
_DEPTH = 8  # of lists and tables in a request

_Hashes = NDArray[np.uint64]
_BYTES: _Hashes = np.array([xxh64_intdigest(bytes([b])) for b in range(256)], np.uint64)


class Sketch(NamedTuple):
    """Attributes:
    windows: hashes, each once, ascending; at most ``MOST_WINDOWS``.
    nbytes: of the prompt's text.
    """

    windows: tuple[int, ...] = ()
    nbytes: int = 0


def sketch(text: bytes, salt: str = "") -> Sketch:
    """Windows of a text, chosen by content.

    A text has the windows of all its parts, and those that cross the parts' edges; so it does up to
    ``MOST_BYTES`` and ``MOST_WINDOWS``. Above these, the windows with the smallest hashes of its
    beginning stand for it. Time is bounded for any text.

    Args:
        text: in UTF-8, or the bytes of token ids.
        salt: texts with other salts have other windows; for what shares no KV, such as models.
    """
    found = [_chosen(part) for part in _blocks(text[:MOST_BYTES])]
    hashes = np.unique(np.concatenate(found)) if found else np.empty(0, np.uint64)
    salted = _hash(salt)
    windows = sorted({(int(h) ^ salted) & _MASK for h in hashes[:MOST_WINDOWS]})
    return Sketch(tuple(windows), len(text))


def _hash(name: str) -> int:
    return xxh64_intdigest(name.encode(errors="surrogatepass"))


def _blocks(text: bytes) -> Iterator[bytes]:
    for begin in range(0, len(text) - WINDOW_BYTES + 1, _BLOCK):
        yield text[begin : begin + _BLOCK + WINDOW_BYTES - 1]


def _chosen(text: bytes) -> _Hashes:
    """The hashes of the windows of a text that are multiples of ``STRIDE_BYTES``, divided by it."""
    hashes, width = _BYTES[np.frombuffer(text, np.uint8)], 1
    while width < WINDOW_BYTES:  # the hash of two stretches, one after the other
        hashes = hashes[:-width] * _MULTIPLIER + hashes[width:]
        hashes ^= hashes >> _HALF
        width *= 2
    found: _Hashes = np.unique(hashes[hashes % STRIDE_BYTES == 0] // STRIDE_BYTES)
    return found


def request_text(request: object) -> bytes:
    """The text of a request to an OpenAI-compatible server: of its prompts or messages.

    Args:
        request: its parsed body, or an object with attributes of the same names. What is of
            another form has no text.
    """
    names = ("system", "instructions", "prompt", "input", "messages")
    return b"\n".join(_texts([_part(request, name) for name in names], _DEPTH))


def request_sketch(request: object) -> Sketch:
    """The sketch of a request, salted with the name of its model."""
    model = _part(request, "model")
    return sketch(request_text(request), model if isinstance(model, str) else "")


def _part(value: object, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)


def _texts(value: object, depth: int) -> Iterator[bytes]:
    """Text within lists, messages and their parts; never that of images and sounds."""
    if isinstance(value, str):
        yield value.encode(errors="surrogatepass")
    elif isinstance(value, Sequence) and not isinstance(value, bytes | bytearray) and depth:
        if value and isinstance(value[0], int):
            yield _ids(value)
        else:
            for part in value:
                yield from _texts(part, depth - 1)
    elif value is not None and depth:
        for name in ("text", "content", "output"):
            yield from _texts(_part(value, name), depth - 1)


def _ids(values: Sequence[Any]) -> bytes:
    if all(type(value) is int and 0 <= value < 1 << 32 for value in values):
        return np.array(values, "<u4").tobytes()
    return b""


_Key = tuple[bool, bool, float, int, int]


class ReplicaState(NamedTuple):
    """What is known of a replica: counts of requests and of windows."""

    in_flight: int
    recent: int
    windows: int


class _Replica:
    def __init__(self, name: str) -> None:
        self.name, self.seed = name, _hash(name)
        self.windows = OrderedDict[int, None]()  # the one sent longest ago comes first
        self.in_flight = self.recent = 0
        self.alone = (self,)  # one for all windows that nobody else holds


class WarmRouter:
    """Sends requests where most of their text was sent before, within bounds of load.

    Of the replicas within both bounds, one is chosen by the bytes of the request that it was sent
    before, less a penalty for its load. The bounds: no replica gets more than ``slack`` times the
    mean of the requests sent of late, nor has more than ``in_flight_slack`` times the mean of those
    in flight. It may always have one more than the mean, rounded down. Where none is within both
    bounds, the second one counts alone.

    Args:
        remember_bytes: of text, for each replica: about what its memory holds the KV of. A replica
            takes ``WINDOW_MEMORY / STRIDE_BYTES`` of that in memory, at most.
        slack, in_flight_slack: 1 or more.
        recent: requests that were sent of late, for each replica.
        load_penalty: for each request in flight above the replica with the fewest, this share
            of the request's text counts as cold.

    Raises:
        ConfigError: a value is out of range.
    """

    def __init__(
        self,
        *,
        remember_bytes: int = 4 << 20,
        slack: float = 1.25,
        in_flight_slack: float = 1.5,
        recent: int = 64,
        load_penalty: float = 0.02,
    ) -> None:
        _check("remember_bytes", remember_bytes, STRIDE_BYTES)
        _check("slack", slack, 1)
        _check("in_flight_slack", in_flight_slack, 1)
        _check("recent", recent, 1)
        _check("load_penalty", load_penalty, 0)
        self._remembered = max(1, remember_bytes // STRIDE_BYTES)
        self._slack, self._recent, self._load_penalty = slack, recent, load_penalty
        self._in_flight_slack = in_flight_slack
        self._replicas = dict[str, _Replica]()
        self._holders = dict[int, tuple[_Replica, ...]]()  # by window
        self._last = deque[_Replica]()  # to whom the last requests went

    # --- replicas ---------------------------------------------------------------------------------

    def add(self, name: str) -> None:
        """There is a replica, which holds nothing yet. One that is known stays as it is."""
        if name not in self._replicas:
            self._replicas[name] = _Replica(name)

    def remove(self, name: str) -> None:
        """There is none of this name any more; no error where there was none."""
        if replica := self._replicas.pop(name, None):
            self._forget(replica)
            self._last = deque(other for other in self._last if other is not replica)

    def forget(self, name: str) -> None:
        """A replica was started anew: its memory is empty."""
        if replica := self._replicas.get(name):
            self._forget(replica)

    def state(self) -> dict[str, ReplicaState]:
        """What is known, by replica."""
        return {
            name: ReplicaState(replica.in_flight, replica.recent, len(replica.windows))
            for name, replica in self._replicas.items()
        }

    # --- requests ---------------------------------------------------------------------------------

    def choose(
        self,
        request: Sketch,
        among: Iterable[str] | None = None,
        in_flight: Mapping[str, int] | None = None,
    ) -> str | None:
        """The replica to send a request to; None where there is none. Changes nothing.

        Args:
            among: names of replicas that may be chosen; all by default, unknown ones are left out.
            in_flight: requests of each replica, from whoever knows better: who sees only a part of
                the traffic, or never says when an answer has ended.
        """
        order = self._order(request, among, in_flight)
        if not order:
            return None
        best = min(order)[0]
        return min((self._tie(request, r), r.name) for key, _, r in order if key == best)[1]

    def rank(
        self,
        request: Sketch,
        among: Iterable[str] | None = None,
        in_flight: Mapping[str, int] | None = None,
    ) -> list[str]:
        """All replicas that ``choose`` may choose from, the best first."""
        order = self._order(request, among, in_flight)
        ranked = sorted((key, self._tie(request, r), r.name) for key, _, r in order)
        return [name for _, _, name in ranked]

    def sent(self, name: str, request: Sketch) -> None:
        """A request was sent to a replica, and is in flight until ``done``."""
        if (replica := self._replicas.get(name)) is None:
            return
        replica.in_flight += 1
        replica.recent += 1
        self._last.append(replica)
        while len(self._last) > self._recent * len(self._replicas):
            self._last.popleft().recent -= 1
        self._remember(replica, request.windows)

    def done(self, name: str) -> None:
        """A request that was sent there has ended, however it did."""
        if (replica := self._replicas.get(name)) and replica.in_flight:
            replica.in_flight -= 1

    def warm_bytes(self, request: Sketch) -> dict[str, float]:
        """Bytes of a request's text that each replica was sent before, where it was sent any. What
        more than ``MOST_HOLDERS`` replicas hold counts for none.
        """
        return {name: self._weight(request) * n for name, n in self._held(request).items()}

    # --- inside -----------------------------------------------------------------------------------

    def _order(
        self, request: Sketch, among: Iterable[str] | None, in_flight: Mapping[str, int] | None
    ) -> list[tuple[_Key, int, _Replica]]:
        """What replicas are ordered by, the best first: within the bounds, most warm bytes less the
        penalty, fewest in flight, fewest sent of late. Behind it a number, and the replica.
        """
        names = self._replicas if among is None else dict.fromkeys(among)
        replicas = [r for name in names if (r := self._replicas.get(name)) is not None]
        flying = [
            r.in_flight if in_flight is None else in_flight.get(r.name, r.in_flight)
            for r in replicas
        ]
        if not replicas:
            return []
        held, weight = self._held(request), self._weight(request)
        most_flying = _most(self._in_flight_slack, sum(flying), len(replicas))
        recent = sum(r.recent for r in replicas)
        most_recent = _most(self._slack, max(recent, _FEWEST * len(replicas)), len(replicas))
        least, penalty = min(flying), self._load_penalty * request.nbytes
        return [
            (
                (
                    load >= most_flying,
                    r.recent >= most_recent,
                    penalty * (load - least) - (weight * held[r.name] if r.name in held else 0),
                    load,
                    r.recent,
                ),
                number,
                r,
            )
            for number, (r, load) in enumerate(zip(replicas, flying, strict=True))
        ]

    def _tie(self, request: Sketch, replica: _Replica) -> int:
        """By the text, so that all routers choose alike where nothing else decides."""
        first = request.windows[0] if request.windows else 0
        return (replica.seed ^ first) * 0x9E3779B97F4A7C15 & _MASK

    def _weight(self, request: Sketch) -> float:
        """Bytes of text that a window of the request stands for."""
        return request.nbytes / max(1, len(request.windows))

    def _held(self, request: Sketch) -> Counter[str]:
        held = Counter[str]()
        for window in request.windows:
            holders = self._holders.get(window, ())
            if len(holders) <= MOST_HOLDERS:
                for replica in holders:
                    held[replica.name] += 1
        return held

    def _remember(self, replica: _Replica, windows: Iterable[int]) -> None:
        for window in windows:
            if window in replica.windows:
                replica.windows.move_to_end(window)
                continue
            replica.windows[window] = None
            others = self._holders.get(window, ())
            self._holders[window] = (*others, replica) if others else replica.alone
            if len(replica.windows) > self._remembered:
                self._drop(replica, replica.windows.popitem(last=False)[0])

    def _drop(self, replica: _Replica, window: int) -> None:
        if left := tuple(r for r in self._holders[window] if r is not replica):
            self._holders[window] = left
        else:
            del self._holders[window]

    def _forget(self, replica: _Replica) -> None:
        for window in replica.windows:
            self._drop(replica, window)
        replica.windows.clear()


def _most(slack: float, total: int, replicas: int) -> int:
    """The most that one of them may have when the next request has come."""
    return max(int(slack * (total + 1) / replicas), total // replicas + 1)


def _check(name: str, value: float, least: float) -> None:
    if not least <= value < float("inf"):
        raise ConfigError(f"{name} must be {least} or more, got {value}")
