"""How many chunks are in the memory of the replica that a request is sent to? Simulated, with the
real router over real text.

A corpus of chunks is asked for by Zipf's law, six chunks a request. With topics, four of five
requests draw from 40 neighbours. Every replica keeps a share of the corpus in memory, the chunks
used last. Requests come as a Poisson process and take an exponential time at the replica, so that
some are in flight when the next one comes; a replica has eight places, seven tenths of them busy.

The rivals: round robin, the less busy of two random replicas ("two choices"), and a prefix router
that does what the documentation of Ray's PrefixCacheAffinityRouter says: where the numbers in
flight differ by less than 10, the replica with the longest common beginning, if that is a tenth of
the prompt; else the one with the least text; where they differ by more, two choices.

    python benchmarks/route.py                           # the table
    python benchmarks/route.py --replicas 4 --memory .2 --remember-factors .25 1 4
"""

from __future__ import annotations

import argparse
import bisect
import functools
import heapq
import inspect
import itertools
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from cacheblend_rag.router import WarmRouter, sketch

CHUNKS, CHUNK_BYTES, PER_REQUEST, GROUP = 4000, 900, 6, 40
ZIPF, TOPICAL = 0.9, 0.8
PLACES, BUSY = 8, 0.7
SYSTEM = "Answer from the passages below, briefly, and say so where they have no answer.\n\n"
SLACK = inspect.signature(WarmRouter).parameters["in_flight_slack"].default
WINDOW = 500  # requests, over which load is compared


class Request(NamedTuple):
    """One request of the traffic."""

    at_s: float
    took_s: float
    chunks: Sequence[int]
    text: str


class Result(NamedTuple):
    """Of one policy over one traffic, behind a warm-up of a third."""

    hits: float  # share of chunks that were in the replica's memory
    load: float  # most requests of a replica over the mean
    window_load: float  # the same within 500 requests in a row, mean of these
    in_flight: float  # most in flight at a replica over the mean, mean over requests
    choose_us: float  # microseconds of a choice, sketch included


class Replicas:
    """Counts of what is in flight, and each replica's memory."""

    def __init__(self, count: int, chunks_in_memory: int) -> None:
        self.in_flight = [0] * count
        self._memory = [OrderedDict[int, None]() for _ in range(count)]
        self._most = chunks_in_memory

    def use(self, replica: int, chunks: Sequence[int]) -> int:
        """How many of the chunks were in memory; then all are."""
        memory, found = self._memory[replica], 0
        for chunk in chunks:
            found += chunk in memory
            memory[chunk] = None
            memory.move_to_end(chunk)
            if len(memory) > self._most:
                memory.popitem(last=False)
        return found


class Policy:
    """Chooses a replica; is informed of ends."""

    def __init__(self, replicas: Replicas, seed: int) -> None:
        self.replicas, self.rng = replicas, np.random.default_rng(seed)

    def choose(self, text: str) -> int:
        raise NotImplementedError

    def done(self, replica: int) -> None:
        pass


class RoundRobin(Policy):
    """One after the other."""

    last = -1

    def choose(self, text: str) -> int:
        self.last = (self.last + 1) % len(self.replicas.in_flight)
        return self.last


class TwoChoices(Policy):
    """The less busy of two."""

    def choose(self, text: str) -> int:
        return self.less_busy(range(len(self.replicas.in_flight)))

    def less_busy(self, among: Sequence[int]) -> int:
        two = self.rng.choice(among, size=min(2, len(among)), replace=False)
        return int(min(two, key=lambda replica: self.replicas.in_flight[replica]))


class Prefix(TwoChoices):
    """As Ray's documentation describes its prefix router, with its defaults: nothing is evicted."""

    imbalanced, matched = 10, 0.1

    def __init__(self, replicas: Replicas, seed: int) -> None:
        super().__init__(replicas, seed)
        self._texts = [list[str]() for _ in replicas.in_flight]  # sorted
        self._size = [0] * len(replicas.in_flight)

    def choose(self, text: str) -> int:
        chosen = self._choose(text)
        bisect.insort(self._texts[chosen], text)
        self._size[chosen] += len(text)
        return chosen

    def _choose(self, text: str) -> int:
        flying = self.replicas.in_flight
        if max(flying) - min(flying) >= self.imbalanced or not any(self._size):
            return self.less_busy(range(len(flying)))
        common = [self._common(texts, text) for texts in self._texts]
        if max(common) >= self.matched * len(text):
            return self.less_busy([r for r, n in enumerate(common) if n == max(common)])
        return self.less_busy([r for r, n in enumerate(self._size) if n == min(self._size)])

    def _common(self, texts: list[str], text: str) -> int:
        """The longest common beginning, which is one with a neighbour in the order of texts."""
        at = bisect.bisect_left(texts, text)
        return max((common_beginning(text, t) for t in texts[max(0, at - 1) : at + 1]), default=0)


def common_beginning(one: str, two: str) -> int:
    """Characters, by halving."""
    low, high = 0, min(len(one), len(two))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == two[:middle] else (low, middle - 1)
    return low


class Warm(Policy):
    """The real router."""

    def __init__(self, replicas: Replicas, seed: int, remember: int, slack: float) -> None:
        super().__init__(replicas, seed)
        self.router = WarmRouter(remember_bytes=remember, in_flight_slack=slack)
        for n in range(len(replicas.in_flight)):
            self.router.add(str(n))

    def choose(self, text: str) -> int:
        request = sketch(text.encode())
        name = self.router.choose(request)
        assert name is not None
        self.router.sent(name, request)
        return int(name)

    def done(self, replica: int) -> None:
        self.router.done(str(replica))


def corpus(seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 20_000, (CHUNKS, CHUNK_BYTES // 6))
    return [" ".join(f"w{word:04x}" for word in row)[:CHUNK_BYTES] for row in words]


def traffic(
    texts: list[str], replicas: int, topics: bool, count: int, seed: int
) -> Iterator[Request]:
    rng = np.random.default_rng(seed)
    popular = 1 / np.arange(1, CHUNKS + 1) ** ZIPF
    popular /= popular.sum()
    order, at_s = rng.permutation(CHUNKS), 0.0
    for number in range(count):
        at_s += rng.exponential(1 / (replicas * PLACES * BUSY))
        if topics and rng.random() < TOPICAL:
            first = order[rng.choice(CHUNKS, p=popular)] // GROUP * GROUP
            chunks = rng.choice(np.arange(first, min(first + GROUP, CHUNKS)), PER_REQUEST, False)
        else:
            chunks = order[rng.choice(CHUNKS, PER_REQUEST, False, popular)]
        parts = [texts[chunk] for chunk in chunks]
        text = SYSTEM + "\n\n".join(parts) + f"\n\nQuestion {number}: what is {rng.integers(1e9)}?"
        yield Request(at_s, rng.exponential(1.0), chunks.tolist(), text)


def run(requests: list[Request], replicas: Replicas, policy: Policy) -> Result:
    ends, sent = list[tuple[float, int]](), list[int]()
    found, flying, took_s = 0, list[float](), 0.0
    warm_up = len(requests) // 3
    for number, request in enumerate(requests):
        while ends and ends[0][0] <= request.at_s:
            _, ended = heapq.heappop(ends)
            replicas.in_flight[ended] -= 1
            policy.done(ended)
        started = time.perf_counter()
        replica = policy.choose(request.text)
        took_s += time.perf_counter() - started
        replicas.in_flight[replica] += 1
        heapq.heappush(ends, (request.at_s + request.took_s, replica))
        hits = replicas.use(replica, request.chunks)
        if number >= warm_up:
            found += hits
            sent.append(replica)
            flying.append(over_mean(replicas.in_flight))
    count = len(replicas.in_flight)
    windows = [sent[n : n + WINDOW] for n in range(0, len(sent) - WINDOW + 1, WINDOW)]
    return Result(
        found / (PER_REQUEST * len(sent)),
        over_mean(counted(sent, count)),
        float(np.mean([over_mean(counted(window, count)) for window in windows])),
        float(np.mean(flying)),
        1e6 * took_s / len(requests),
    )


def counted(sent: Sequence[int], replicas: int) -> list[int]:
    counts = Counter(sent)
    return [counts[replica] for replica in range(replicas)]


def over_mean(counts: Sequence[int]) -> float:
    return max(counts) * len(counts) / max(1, sum(counts))


Make = Callable[[Replicas], Policy]


def policies(fit: int, factors: Sequence[float], slacks: Sequence[float]) -> dict[str, Make]:
    """By name.

    Args:
        fit: chunks that a replica's memory holds.
    """
    found: dict[str, Make] = {
        "round robin": lambda replicas: RoundRobin(replicas, 1),
        "two choices": lambda replicas: TwoChoices(replicas, 1),
        "prefix": lambda replicas: Prefix(replicas, 1),
    }
    for factor, slack in itertools.product(factors, slacks):
        size = int(fit * CHUNK_BYTES * factor)
        name = "warm" + (f", view x {factor:g}" if len(factors) > 1 else "")
        name += f", in flight {slack:g}" if len(slacks) > 1 else ""
        found[name] = functools.partial(Warm, seed=1, remember=size, slack=slack)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--replicas", type=int, nargs="+", default=[4, 16])
    parser.add_argument(
        "--memory", type=float, nargs="+", default=[0.2, 0.05], help="of the corpus"
    )
    parser.add_argument("--requests", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--remember-factors", type=float, nargs="+", default=[1.0],
        help="what the router remembers of a replica, over what its memory holds",
    )  # fmt: skip
    text = "times the mean in flight that a replica may have"
    parser.add_argument("--slacks", type=float, nargs="+", default=[SLACK], help=text)
    args = parser.parse_args()
    texts = corpus(args.seed)
    print("| traffic | replicas | memory | policy | in memory | load | in 500 | in flight | us |")
    print("|---|---|---|---|---|---|---|---|---|")
    for topics in (True, False):
        for count in args.replicas:
            requests = list(traffic(texts, count, topics, args.requests, args.seed + 1))
            for memory in args.memory:
                fit = max(1, int(CHUNKS * memory))
                for name, make in policies(fit, args.remember_factors, args.slacks).items():
                    replicas = Replicas(count, fit)
                    r = run(requests, replicas, make(replicas))
                    kind = "topics" if topics else "none"
                    print(
                        f"| {kind} | {count} | {memory:.0%} | {name} | {r.hits:.3f} | {r.load:.2f} "
                        f"| {r.window_load:.2f} | {r.in_flight:.2f} | {r.choose_us:.0f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
