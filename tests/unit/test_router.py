"""The router against slow twins, on any text and any order of calls."""

from __future__ import annotations

import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh64_intdigest

from cacheblend_rag import ConfigError, router
from cacheblend_rag.router import (
    MOST_BYTES,
    MOST_HOLDERS,
    MOST_WINDOWS,
    STRIDE_BYTES,
    WINDOW_BYTES,
    WINDOW_MEMORY,
    Sketch,
    WarmRouter,
    request_sketch,
    request_text,
    sketch,
)


def words(seed: int, nbytes: int) -> bytes:
    """Text of a few thousand words, with no stretch repeated."""
    rng = np.random.default_rng(seed)
    return b" ".join(b"w%x" % n for n in rng.integers(0, 5000, nbytes // 4))[:nbytes]


# --- sketches -------------------------------------------------------------------------------------


def slow_sketch(text: bytes, salt: str = "") -> Sketch:
    """One window after the other, by integers of Python."""
    mask64, hashes = (1 << 64) - 1, set[int]()

    def hashed(window: bytes) -> int:
        if len(window) == 1:
            return xxh64_intdigest(window)
        half = len(window) // 2
        mixed = hashed(window[:half]) * 0x9E3779B97F4A7C15 + hashed(window[half:]) & mask64
        return mixed ^ mixed >> 32

    looked_at = text[:MOST_BYTES]
    for begin in range(len(looked_at) - WINDOW_BYTES + 1):
        found = hashed(looked_at[begin : begin + WINDOW_BYTES])
        if found % STRIDE_BYTES == 0:
            hashes.add(found // STRIDE_BYTES)
    first = sorted(hashes)[:MOST_WINDOWS]
    salted = xxh64_intdigest(salt.encode())
    return Sketch(tuple(sorted({(h ^ salted) & (1 << 60) - 1 for h in first})), len(text))


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=2000), st.integers(1, 40), st.sampled_from(["", "m"]))
def test_a_sketch_is_that_of_the_slow_way(part: bytes, times: int, salt: str) -> None:
    text = (part * times)[:3000]
    assert sketch(text, salt) == slow_sketch(text, salt)


def test_blocks_leave_no_window_out(monkeypatch: pytest.MonkeyPatch) -> None:
    text = words(1, 9000)
    whole = sketch(text)
    assert 15 < len(whole.windows) < 60
    for size in (1, 7, 1000, 8999 - WINDOW_BYTES, 9000 - WINDOW_BYTES):
        monkeypatch.setattr(router, "_BLOCK", size)
        assert sketch(text) == whole


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=3000), max_size=5), st.randoms())
def test_a_text_has_the_windows_of_its_parts_in_any_order(
    parts: list[bytes], random: object
) -> None:
    parts = [part + words(n, 700) for n, part in enumerate(parts)]
    apart = set().union(*(sketch(part).windows for part in parts))
    random.shuffle(parts)
    together = sketch(b"\n\n".join(parts))
    assert apart <= set(together.windows)
    assert together.nbytes == sum(map(len, parts)) + 2 * max(0, len(parts) - 1)


def test_texts_share_windows_where_they_share_chunks() -> None:
    chunk, others = words(2, 6000), [words(3, 6000), words(4, 6000)]
    one, two = (set(sketch(b"[1] " + chunk + other).windows) for other in others)
    assert len(sketch(chunk).windows) - 2 <= len(one & two) <= len(sketch(chunk).windows) + 2


def test_windows_come_as_often_as_they_should() -> None:
    text = words(5, 1 << 19)
    assert 0.8 < len(sketch(text).windows) * STRIDE_BYTES / len(text) < 1.2


@pytest.mark.parametrize("byte", range(0, 256, 5))
def test_a_run_of_one_character_has_one_window_at_most(byte: int) -> None:
    assert len(sketch(bytes([byte]) * 100_000).windows) <= 1


def test_short_texts_have_no_windows_and_do_not_fail() -> None:
    for length in range(WINDOW_BYTES):
        assert sketch(b"x" * length) == Sketch((), length)


def test_salts_keep_texts_apart() -> None:
    text = words(6, 50_000)
    one, two = sketch(text, "a"), sketch(text, "b")
    assert len(one.windows) == len(two.windows) > 100
    assert not set(one.windows) & set(two.windows)


@pytest.fixture(scope="module")
def crafted() -> bytes:
    """Text with as many chosen windows as one can craft, the hash being known."""
    rng = np.random.default_rng(0)
    tries = rng.integers(0, 256, 1 << 19, np.uint8).tobytes()
    chosen = [
        tries[n : n + WINDOW_BYTES]
        for n in range(0, len(tries), WINDOW_BYTES)
        if router._chosen(tries[n : n + WINDOW_BYTES]).size
    ]
    assert len(chosen) > 30
    return b"".join(chosen)


@pytest.mark.parametrize("kind", ["run", "period", "random", "words", "crafted"])
def test_time_and_size_are_bounded_for_any_text(kind: str, crafted: bytes) -> None:
    rng = np.random.default_rng(7)
    size = 16 << 20
    text = {
        "run": b"a" * size,
        "period": b"ab" * (size // 2),
        "random": rng.bytes(size),
        "words": words(8, 1 << 20) * 16,
        "crafted": crafted * (size // len(crafted)),
    }[kind]
    started = time.process_time()
    found = sketch(text)
    assert time.process_time() - started < 1.0  # 0.03 s on an idle core
    assert len(found.windows) <= MOST_WINDOWS and found.nbytes == len(text)


def test_of_a_long_text_the_windows_with_the_smallest_hashes_stand_for_it() -> None:
    """Not the first ones: long prompts that share parts still share windows."""
    text = words(9, MOST_BYTES + 5000)
    whole = sketch(text)
    assert len(whole.windows) == MOST_WINDOWS
    assert whole.windows == sketch(text[:MOST_BYTES]).windows
    everywhere = router._chosen(text[:MOST_BYTES]).tolist()
    salted = xxh64_intdigest(b"")
    smallest = {(h ^ salted) & (1 << 60) - 1 for h in sorted(everywhere)[:MOST_WINDOWS]}
    assert set(whole.windows) == smallest
    shared = len(set(whole.windows) & set(sketch(text[300_000:] + words(11, 400_000)).windows))
    assert shared > MOST_WINDOWS / 3


def test_sketches_do_not_depend_on_the_process() -> None:
    code = (
        "from cacheblend_rag.router import request_sketch, WarmRouter\n"
        "s = request_sketch({'model': 'm', 'prompt': ' '.join(map(str, range(3000)))})\n"
        "r = WarmRouter()\n"
        "for n in ('c', 'a', 'b'): r.add(n)\n"
        "print(s, r.rank(s))\n"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1 and len(seen.pop()) > 200


# --- the text of a request ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"prompt": "a"}, b"a"),
        ({"prompt": ["a", "b"]}, b"a\nb"),
        ({"prompt": [1, 2]}, b"\1\0\0\0\2\0\0\0"),
        ({"prompt": [[1], [2]]}, b"\1\0\0\0\n\2\0\0\0"),
        ({"prompt": "half \ud800"}, b"half \xed\xa0\x80"),
        ({"messages": [{"role": "user", "content": "a"}, {"content": None}]}, b"a"),
        (
            {
                "system": "s",
                "messages": [
                    {
                        "content": [
                            {"type": "text", "text": "a"},
                            {"type": "image_url", "image_url": {"url": "data:..."}},
                            {"type": "tool_result", "content": [{"text": "b"}]},
                        ]
                    }
                ],
            },
            b"s\na\nb",
        ),
        (
            {"instructions": "i", "input": [{"content": [{"text": "a"}]}, {"output": "b"}]},
            b"i\na\nb",
        ),
        ({"input": "a"}, b"a"),
        (SimpleNamespace(messages=[SimpleNamespace(content="a")]), b"a"),
        ({"prompt": [1, -2]}, b""),
        ({"prompt": [1, "a", 1 << 40]}, b""),
        ({"prompt": [True, 1]}, b""),
        ({"prompt": 7}, b""),
        ({"messages": {"content": "a"}}, b"a"),
        ([1], b""),
        (None, b""),
        ("text", b""),
    ],
)
def test_the_text_of_a_request(body: object, text: bytes) -> None:
    assert request_text(body) == text


def test_a_request_that_is_nested_deeply_is_no_trouble() -> None:
    nested: object = "deep"
    for _ in range(10_000):
        nested = [nested]
    assert request_text({"prompt": nested}) == b""


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(
            st.sampled_from(["text", "content", "prompt", "messages", "input"]), inner
        )
    ),
)


@settings(max_examples=60, deadline=None)
@given(_JSON)
def test_no_request_fails(body: object) -> None:
    assert request_sketch(body).nbytes == len(request_text(body))


def test_models_have_sketches_of_their_own() -> None:
    prompt = words(10, 9000).decode()
    one, two = (request_sketch({"model": name, "prompt": prompt}) for name in "ab")
    assert one.windows and not set(one.windows) & set(two.windows)


# --- choosing -------------------------------------------------------------------------------------


def with_replicas(count: int, **options: object) -> WarmRouter:
    made = WarmRouter(**options)  # type: ignore[arg-type]
    for n in range(count):
        made.add(f"r{n}")
    return made


def text(seed: int, nbytes: int = 9000) -> Sketch:
    return sketch(words(seed, nbytes))


def test_a_request_goes_where_its_text_went() -> None:
    made = with_replicas(4)
    homes = dict[int, str]()
    for seed in range(8):
        homes[seed] = made.choose(text(seed)) or ""
        made.sent(homes[seed], text(seed))
        made.done(homes[seed])
    assert Counter(homes.values()) == {f"r{n}": 2 for n in range(4)}
    for seed in (5, 0, 3):
        assert made.choose(text(seed)) == homes[seed]
        assert made.rank(text(seed))[0] == homes[seed]
        assert sorted(made.rank(text(seed))) == ["r0", "r1", "r2", "r3"]


def test_two_of_three_chunks_weigh_more_than_one() -> None:
    made = with_replicas(2)
    chunks = [words(seed, 4000) for seed in range(3)]
    made.sent("r0", sketch(chunks[0] + b"\n" + chunks[1]))
    made.sent("r1", sketch(chunks[2]))
    asked = sketch(b"\n".join(reversed(chunks)))
    assert made.choose(asked) == "r0"
    warm = made.warm_bytes(asked)
    assert warm["r0"] == pytest.approx(8000, rel=0.3) and warm["r1"] == pytest.approx(4000, rel=0.3)


def test_a_busy_replica_is_left_alone() -> None:
    made = with_replicas(4)
    made.sent("r2", text(1))
    assert made.choose(text(1)) != "r2"  # one in flight, where the mean is half
    for n in (0, 1, 3):
        made.sent(f"r{n}", text(9 + n))
    assert made.choose(text(1)) == "r2"
    assert made.choose(text(1), in_flight={"r2": 9}) != "r2"
    assert made.rank(text(1), in_flight={"r2": 9})[-1] == "r2"


def test_only_those_that_may_be_chosen_are() -> None:
    made = with_replicas(3)
    made.sent("r1", text(1))
    made.done("r1")
    assert made.choose(text(1)) == "r1"
    assert made.choose(text(1), among=["r0", "r2", "unknown"]) in ("r0", "r2")
    assert made.choose(text(1), among=[]) is None and made.rank(text(1), among=["unknown"]) == []
    assert WarmRouter().choose(text(1)) is None


def test_replicas_come_and_go() -> None:
    made = with_replicas(2)
    made.sent("r0", text(1))
    made.add("r0")  # known: stays as it is
    assert made.state()["r0"] == (1, 1, len(text(1).windows))
    made.forget("r0")
    assert made.state()["r0"] == (1, 1, 0) and made.warm_bytes(text(1)) == {}
    made.remove("r0")
    made.remove("r0")
    made.done("r0")
    made.sent("r0", text(1))
    made.forget("r0")
    assert made.state().keys() == {"r1"} and made.choose(text(1)) == "r1"
    made.add("r0")
    assert made.state()["r0"] == (0, 0, 0)
    assert made._holders == {}


def test_what_all_hold_is_not_counted_above_a_number_of_replicas() -> None:
    made = with_replicas(MOST_HOLDERS + 1)
    for n in range(MOST_HOLDERS):
        made.sent(f"r{n}", text(1))
    assert len(made.warm_bytes(text(1))) == MOST_HOLDERS
    made.sent(f"r{MOST_HOLDERS}", text(1))
    assert made.warm_bytes(text(1)) == {}


@pytest.mark.parametrize(
    "options",
    [{"remember_bytes": 255}, {"slack": 0.9}, {"slack": float("nan")}, {"slack": float("inf")},
     {"in_flight_slack": 0}, {"recent": 0}, {"load_penalty": -1}, {"load_penalty": float("nan")}],
)  # fmt: skip
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        WarmRouter(**options)  # type: ignore[arg-type]


# --- any order of calls, against a slow twin ------------------------------------------------------


class SlowRouter:
    """Lists that are gone through; the newest window comes last."""

    def __init__(self, remembered: int, slack: float, recent: int, penalty: float) -> None:
        self.remembered, self.recent, self.penalty = remembered, recent, penalty
        self.slack, self.in_flight_slack = slack, slack * 1.5
        self.windows = dict[str, list[int]]()
        self.in_flight = dict[str, int]()
        self.last = list[str]()

    def add(self, name: str) -> None:
        self.windows.setdefault(name, [])
        self.in_flight.setdefault(name, 0)

    def remove(self, name: str) -> None:
        self.windows.pop(name, None)
        self.in_flight.pop(name, None)
        self.last = [other for other in self.last if other != name]

    def forget(self, name: str) -> None:
        if name in self.windows:
            self.windows[name] = []

    def sent(self, name: str, request: Sketch) -> None:
        if name not in self.windows:
            return
        self.in_flight[name] += 1
        self.last = [*self.last, name][-self.recent * len(self.windows) :]
        for window in request.windows:
            self.windows[name] = [w for w in self.windows[name] if w != window] + [window]
        self.windows[name] = self.windows[name][-self.remembered :]

    def done(self, name: str) -> None:
        if self.in_flight.get(name):
            self.in_flight[name] -= 1

    def key(self, name: str, names: list[str], request: Sketch) -> tuple[object, ...]:
        def too_many(count: dict[str, int], slack: float, fewest: int) -> bool:
            total = max(sum(count[other] for other in names), fewest * len(names))
            most = max(int(slack * (total + 1) / len(names)), total // len(names) + 1)
            return count[name] >= most

        recent = {other: self.last.count(other) for other in names}
        held = len(set(request.windows) & set(self.windows[name]))
        least = min(self.in_flight[other] for other in names)
        score = self.penalty * request.nbytes * (self.in_flight[name] - least)
        score -= request.nbytes / max(1, len(request.windows)) * held
        return (
            too_many(self.in_flight, self.in_flight_slack, 0),
            too_many(recent, self.slack, 8),
            score,
            self.in_flight[name],
            recent[name],
        )


NAMES = [f"r{n}" for n in range(5)]
TEXTS = [sketch(b"\n".join(words(10 * n + k, 900) for k in range(4))) for n in range(12)]
TEXTS += [sketch(b"\n".join(words(10 * n, 900) for n in some)) for some in ([1, 2, 3], [3, 5, 7])]
CALLS = st.one_of(
    st.tuples(st.sampled_from(["add", "remove", "forget", "done"]), st.sampled_from(NAMES)),
    *4 * [st.tuples(st.just("sent"), st.sampled_from(NAMES), st.sampled_from(TEXTS))],
    *4 * [st.tuples(st.just("route"), st.sampled_from(TEXTS))],
)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(CALLS, max_size=60),
    st.sampled_from([1, 8, 40, 1000]),
    st.sampled_from([1, 1.25, 3]),
    st.integers(1, 12),
    st.sampled_from([0, 0.05, 1]),
)
def test_any_order_of_calls_chooses_as_the_slow_way(
    calls: list[tuple[object, ...]], remembered: int, slack: float, recent: int, penalty: float
) -> None:
    fast = WarmRouter(
        remember_bytes=remembered * STRIDE_BYTES,
        slack=slack,
        in_flight_slack=1.5 * slack,
        recent=recent,
        load_penalty=penalty,
    )
    slow = SlowRouter(remembered, slack, recent, penalty)
    for router_ in (fast, slow):
        for name in NAMES[:3]:
            router_.add(name)
    for call, *arguments in calls:
        if call == "route":
            [request] = arguments
            chosen = fast.choose(request)
            names = list(slow.windows)
            if not names:
                assert chosen is None
                continue
            keys = {name: slow.key(name, names, request) for name in names}
            assert chosen in names
            assert fast.rank(request)[0] == chosen
            found, best = keys[chosen], min(keys.values())
            assert found[:2] == best[:2] and found[2] == pytest.approx(best[2], abs=1e-6)
            assert found[3:] == best[3:] or found[2] != best[2]
            arguments = [chosen, request]
            call = "sent"
        for router_ in (fast, slow):
            getattr(router_, str(call))(*arguments)
        assert {n: list(r.windows) for n, r in fast._replicas.items()} == slow.windows
        assert [replica.name for replica in fast._last] == slow.last
        state = fast.state()
        assert {n: s.in_flight for n, s in state.items()} == slow.in_flight
        assert all(s.windows <= remembered for s in state.values())
        held = Counter(w for windows in slow.windows.values() for w in windows)
        assert {w: len(holders) for w, holders in fast._holders.items()} == held


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(TEXTS), st.integers(0, 5)), max_size=200),
    st.integers(1, 6),
    st.sampled_from([1, 1.25, 2]),
)
def test_load_is_within_its_bound(
    requests: list[tuple[Sketch, int]], replicas: int, slack: float
) -> None:
    made = with_replicas(replicas, in_flight_slack=slack)
    for request, ended in requests:
        name = made.choose(request)
        assert name is not None
        total = sum(s.in_flight for s in made.state().values())
        made.sent(name, request)
        most = max(int(slack * (total + 1) / replicas), total // replicas + 1)
        assert made.state()[name].in_flight <= most
        for n in range(ended):
            made.done(f"r{n % replicas}")


def test_requests_one_by_one_are_spread_over_time_too() -> None:
    """Nothing is in flight when the next one comes, and all are of one topic."""
    made = with_replicas(4)
    counts, topic = Counter[str](), text(1)
    for _ in range(1000):
        name = made.choose(topic) or ""
        made.sent(name, topic)
        made.done(name)
        counts[name] += 1
    assert max(counts.values()) <= 1.25 * 250 + 1 and len(counts) == 4


def test_memory_of_a_replica_is_bounded() -> None:
    made = with_replicas(8, remember_bytes=1 << 20)
    rng = np.random.default_rng(0)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(30):
        for n in range(8):
            made.sent(f"r{n}", Sketch(tuple(rng.integers(1 << 59, 1 << 60, 500).tolist()), 1))
    took = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert all(s.windows == 4096 for s in made.state().values())
    assert took < 8 * 4096 * WINDOW_MEMORY
