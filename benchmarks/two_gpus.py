"""Two GPUs: does an engine over both blend as one GPU does, and do two engines serve twice as much?

    python benchmarks/two_gpus.py --shape llama-8b --sizes 6x1024

Three engines over one store, with the same random weights, which are written to a folder first:
``1``, on the first GPU; ``1 again``, on the second; ``2``, tensor parallel over both. All start
together; they are measured one after the other, so that none disturbs another.

- **Choices**: of the positions that an engine recomputes, how many does ``1`` recompute as well, in
  the same prompt? ``1 again`` shows what of a difference is not tensor parallelism's. Sums over
  two ranks are rounded otherwise, and tokens with all but equal scores change places.
- **Answers**: how far the log-probabilities of the ten likeliest first tokens are from those of
  ``1``'s full prefill. A full prefill by ``2`` shows what rounding alone does.
- **TTFT**: full prefill over blend, medians over rounds, in ``1`` and in ``2``.
- **Replicas**: requests a second of clients that each send a request after the other, for ``1``
  alone, and for ``1`` and ``1 again`` together. vLLM's own ``data_parallel_size`` is refused by
  cacheblend-rag, so a replica is an engine.

It exits with 1 where a bound of ``BOUNDS`` is not kept. On a CPU, three engines share the cores:
the answers mean something there, the times do not, so ``--no-times`` judges the answers only.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import plots
from serving import Load
from shapes import Words, opened, parser, size, versions, write_weights
from ttft import measure

KNOWN_S = 3.0  # within 2 s, an engine learns what another one stored
LIKELIEST = 10  # tokens whose log-probabilities are compared
MODES: dict[str, dict[str, Any]] = {"full": {"mode": "full"}, "blend": {}}
ENGINES = {"1": [0], "1 again": [1], "2": [0, 1]}  # which GPUs
BOUNDS = {  # name: (at least, at most)
    "choices of 2 among those of 1": (0.95, 1.0),
    "error of 2 at ratio 1, in errors of its full prefill": (0.0, 2.0),
    "first tokens of 2 at ratio 1 that are its full prefill's": (0.9, 1.0),
    "speed-up of 2 over that of 1": (0.85, 1.15),
    "requests of two replicas over those of one": (1.9, math.inf),
}
TIMES = list(BOUNDS)[-2:]


def main() -> None:
    args = options(sys.argv[1:])
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = run(args, Path(folder))
    kept = judge(found, BOUNDS.keys() - (set(TIMES) if args.no_times else set()))
    sys.exit(0 if kept else 1)


def options(arguments: Sequence[str]) -> argparse.Namespace:
    options = parser(__doc__)
    options.set_defaults(shape="llama-8b", store=None)
    options.add_argument(
        "--sizes", type=size, nargs="+", default=[(6, 1024)], metavar="NxT",
        help="chunks and tokens a chunk of a prompt; answers and replicas take the first",
    )  # fmt: skip
    options.add_argument("--ratio", type=float, default=0.15)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--prompts", type=int, default=8, help="whose answers are compared")
    options.add_argument("--pool", type=int, default=24, help="chunks that clients ask about")
    options.add_argument("--clients", type=int, default=16, help="of each replica")
    options.add_argument("--output-tokens", type=int, default=16)
    options.add_argument("--seconds", type=float, default=8, help="of each load")
    options.add_argument("--kv-cache", type=int, default=32 << 30, help="bytes on each GPU")
    options.add_argument("--folder", help="for the weights (2 bytes a parameter) and the store")
    options.add_argument("--eager", action="store_true", help="no compilation, no CUDA graphs")
    options.add_argument("--no-times", action="store_true", help="judge the answers only")
    plots.options(options)
    return options.parse_args(arguments)


def run(args: argparse.Namespace, folder: Path, target: Any = None) -> dict[str, float]:
    """Write the weights, start, measure; what ``BOUNDS`` are about. ``target``: what each engine's
    process runs, ``serve`` if nothing is given.
    """
    started = time.perf_counter()
    weights = folder / "weights"
    if args.store is None:
        args.store = f"file://{folder}/kv?memory=32GiB"
    with started_process(write, (weights, args), [0]) as process:
        process.join()
        assert process.exitcode == 0, "the weights could not be written"
    written = time.perf_counter()
    with contextlib.ExitStack() as stack:
        engines = {
            name: stack.enter_context(Remote.starting(name, weights, args, target or serve))
            for name in ENGINES
        }
        about = engines["1"].call("about")  # waits for its start, as do the others' first calls
        print(f"{about}, {os.cpu_count()} cores, {args.dtype}, {time.strftime('%Y-%m-%d')}")
        for engine in engines.values():
            engine.call("ingest")
        print(
            f"{args.shape}{f' of {args.layers} layers' if args.layers else ''}, ratio "
            f"{args.ratio}; weights {written - started:.0f} s, starts and ingestion "
            f"{time.perf_counter() - written:.0f} s",
            flush=True,
        )
        answers = {name: engine.call("answers") for name, engine in engines.items()}
        ttft = {name: engines[name].call("ttft") for name in ("1", "2")}
        load = loads(engines, args)
    rows = {"answers": answers, "ttft": ttft, "load": load}
    plots.save(args, about, rows, [])
    return show_answers(answers) | show_ttft(ttft, args) | show_loads(load)


def judge(found: Mapping[str, float], names: set[str]) -> bool:
    """Print what bounds were kept; whether all of ``names`` were."""
    kept = True
    print(f"{'bound':60}{'measured':>10}{'at least':>10}{'at most':>9}")
    for name, (least, most) in BOUNDS.items():
        is_kept = least <= found[name] <= most
        kept &= is_kept or name not in names
        verdict = "" if is_kept else "   not kept" if name in names else "   not judged"
        print(f"{name:60}{found[name]:10.3f}{least:10.2f}{most:9.2f}{verdict}", flush=True)
    return kept


# ---- a process for each engine -------------------------------------------------------------------


def write(folder: Path, args: argparse.Namespace) -> None:
    write_weights(folder, args.shape, args.layers, args.dtype)


@contextlib.contextmanager
def started_process(target: Any, given: tuple[Any, ...], devices: Sequence[int]) -> Iterator[Any]:
    """A process of its own that sees these GPUs, and is not there any more when this ends."""
    process = multiprocessing.get_context("spawn").Process(target=target, args=given)
    with seeing(devices):
        process.start()
    try:
        yield process
    finally:
        process.join(60)
        if process.is_alive():
            process.kill()
            process.join()


class Remote:
    """An ``Engine`` in another process, which sees its own GPUs only."""

    def __init__(self, name: str, here: Connection) -> None:
        self.name, self._here = name, here

    @classmethod
    @contextlib.contextmanager
    def starting(
        cls, name: str, weights: Path, args: argparse.Namespace, target: Any
    ) -> Iterator[Remote]:
        """It is there with the first ``call``."""
        here, there = multiprocessing.get_context("spawn").Pipe()
        with started_process(target, (there, name, weights, args), ENGINES[name]):
            there.close()
            try:
                yield cls(name, here)
            finally:
                with contextlib.suppress(OSError):  # it has ended already
                    here.send(None)

    def begin(self, method: str, *given: Any) -> None:
        self._here.send((method, given))

    def result(self) -> Any:
        """Of what was begun. Raises RuntimeError with the traceback where it failed."""
        try:
            is_right, found = self._here.recv()
        except EOFError:
            raise RuntimeError(f"engine {self.name} died") from None
        if not is_right:
            raise RuntimeError(f"engine {self.name}: {found}")
        return found

    def call(self, method: str, *given: Any) -> Any:
        self.begin(method, *given)
        return self.result()


@contextlib.contextmanager
def seeing(devices: Sequence[int]) -> Iterator[None]:
    """Processes that are started meanwhile see these of the GPUs that this one sees."""
    mine = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0,1").split(",")
    before = dict(os.environ)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(mine[device] for device in devices)
    # Multicast over NVLink is off on hosts that are shared; vLLM's other ways need none.
    os.environ.setdefault("VLLM_ALLREDUCE_USE_SYMM_MEM", "0")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def serve(there: Connection, name: str, weights: Path, args: argparse.Namespace) -> None:
    """The other process: one engine, until None comes."""
    try:
        with Engine.opened(name, weights, args) as engine:
            while asked := there.recv():
                method, given = asked
                there.send((True, getattr(engine, method)(*given)))
    except EOFError:
        raise SystemExit(1) from None  # who asked is gone
    except Exception:  # whatever it is, the other process raises it
        there.send((False, traceback.format_exc()))


class Row(NamedTuple):
    """One prompt's answers by one engine."""

    chosen: list[int]  # positions that a blend computed, of chunks or not
    computed: int  # of them: of chunks
    full: dict[int, float]  # log-probabilities of the likeliest first tokens
    ratio_one: dict[int, float]
    blend: dict[int, float]


class Engine:
    """Measures one engine, in the process that has it."""

    def __init__(self, name: str, blend: Any, words: Words, args: argparse.Namespace) -> None:
        self._name, self._args = name, args
        number, each = args.sizes[0]
        self._load = Load(blend, words, [words(each) for _ in range(max(args.pool, number))])

    @classmethod
    @contextlib.contextmanager
    def opened(cls, name: str, weights: Path, args: argparse.Namespace) -> Iterator[Engine]:
        # What is compiled is kept apart: engines that start together would write the same files.
        os.environ["VLLM_CACHE_ROOT"] = str(weights.parent / f"compiled {name}")
        from vllm.platforms import current_platform

        options: dict[str, Any] = {"enforce_eager": True} if args.eager else {}
        if current_platform.is_cuda():  # asked so that no process of vLLM's inherits a CUDA context
            # Two engines share each GPU: neither may take what is free for its own.
            options |= {"kv_cache_memory_bytes": args.kv_cache, "gpu_memory_utilization": 0.45}
        if len(ENGINES[name]) > 1:
            options["tensor_parallel_size"] = len(ENGINES[name])
            options["distributed_executor_backend"] = "mp"
        longest = max(number * each for number, each in args.sizes)
        with opened(
            args,
            longest,
            weights=weights,
            engine={"max_logprobs": 2 * LIKELIEST, **options},
            blend_if="always",
            recompute_ratio=args.ratio,
        ) as (blend, words):
            yield cls(name, blend, words, args)

    def about(self) -> str:
        return versions(self._load.blend)

    def ingest(self) -> None:
        """The first engine computes the pool, the others find it in the store."""
        computed = self._stored(self._load.pool)
        assert computed == (len(self._load.pool) if self._name == "1" else 0), computed

    def _stored(self, chunks: Sequence[tuple[int, ...]]) -> int:
        """How many this engine had to compute. It knows them all afterwards."""
        report = self._load.blend.ingest(chunks, progress=False)
        if report.computed < len(chunks):
            time.sleep(KNOWN_S)
        return int(report.computed)

    def answers(self) -> list[Row]:
        """To the same prompts in each engine."""
        number, words = self._args.sizes[0][0], Words(self._args.shape, seed=1)
        found = []
        for _ in range(self._args.prompts):
            chosen = words.draw.sample(range(len(self._load.pool)), number)
            prompt = words(48) + sum((self._load.pool[n] for n in chosen), ()) + words(32)
            full, _ = self._first(prompt, mode="full")
            ratio_one, _ = self._first(prompt, recompute_ratio=1.0)
            blend, result = self._first(prompt)
            assert result.report.blended, result.report.detail
            outcome = self._load.blend._engine.rpc("cacheblend_outcome", result.request_id, True)
            positions = [rank["selected"] for rank in outcome]
            assert all(of_rank == positions[0] for of_rank in positions), "ranks chose otherwise"
            computed = result.report.tokens_recomputed
            found.append(Row(positions[0], computed, full, ratio_one, blend))
        return found

    def _first(self, prompt: tuple[int, ...], **call: Any) -> tuple[dict[int, float], Any]:
        """Log-probabilities of the likeliest first tokens, and the result."""
        result = self._load.blend.generate(
            prompt, max_tokens=1, temperature=0.0, logprobs=2 * LIKELIEST, detokenize=False, **call
        )
        return dict(result.logprobs[0]), result

    def ttft(self) -> dict[str, dict[str, list[float]]]:
        """Seconds to the first token in each round, by size and mode."""
        found = {}
        for number, each in self._args.sizes:
            words = Words(self._args.shape, seed=2 + each)
            chunks = [words(each) for _ in range(number)]
            self._stored(chunks)
            modes = {"full": MODES["full"], "blend": {"recompute_ratio": self._args.ratio}}
            rows = measure(self._load.blend, words, chunks, modes, self._args.rounds)
            assert all(row["report"]["blended"] for row in rows["blend"]), rows["blend"][-1]
            self._show_stages(number, each, [row["report"]["stages_s"] for row in rows["blend"]])
            found[f"{number} x {each}"] = {
                mode: [row["ttft_s"] for row in of_mode] for mode, of_mode in rows.items()
            }
        return found

    def _show_stages(self, number: int, each: int, stages: list[dict[str, float]]) -> None:
        of = {name: statistics.median(s.get(name, 0.0) for s in stages) for name in stages[-1]}
        parts = ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in of.items())
        print(f"{number} x {each}, engine {self._name}, stages, ms: {parts}", flush=True)

    def warm_up(self) -> None:
        """Have the whole pool in this engine's memory, and all that is compiled late compiled."""
        pool = range(len(self._load.pool))
        for call in MODES.values():
            asyncio.run(self._all(list(pool), call))

    async def _all(self, pool: list[int], call: dict[str, Any]) -> None:
        number = self._args.sizes[0][0]
        groups = [pool[i : i + number] for i in range(0, len(pool), number)]
        tokens = self._args.output_tokens
        asked = (self._load.request(self._load.prompt(g), tokens, **call) for g in groups)
        await asyncio.gather(*asked)

    def load(self, mode: str, at: float) -> tuple[int, float]:
        """Requests that ended in ``--seconds`` from the monotonic time ``at`` on, and the share of
        them that was blended.
        """
        return asyncio.run(self._clients(MODES[mode], at))

    async def _clients(self, call: dict[str, Any], at: float) -> tuple[int, float]:
        args, load, ended = self._args, self._load, 0
        blended, until = load.blended, at + args.seconds

        async def client() -> None:
            nonlocal ended
            while time.monotonic() < until:
                prompt = load.some(args.sizes[0][0])
                await load.request(prompt, args.output_tokens, **call)
                ended += time.monotonic() < until

        await asyncio.sleep(at - time.monotonic())
        await asyncio.gather(*(client() for _ in range(args.clients)))
        # Those in flight at the end are blended too, and not counted: the share is of what ended.
        return ended, min(1.0, (load.blended - blended) / max(ended, 1))


# ---- what it comes to ----------------------------------------------------------------------------


def loads(engines: Mapping[str, Remote], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Requests a second of one replica, and of two, by mode."""
    replicas = [engines["1"], engines["1 again"]]
    for replica in replicas:
        replica.call("warm_up")
    found: dict[str, dict[str, Any]] = {}
    for mode in MODES:
        for count in (1, 2):
            at = time.monotonic() + 0.5  # of one clock for all processes of a machine
            for replica in replicas[:count]:
                replica.begin("load", mode, at)
            done = [replica.result() for replica in replicas[:count]]
            found.setdefault(mode, {})[str(count)] = {
                "rps": sum(ended for ended, _ in done) / args.seconds,
                "blended": min(share for _, share in done),
            }
    return found


def common(one: Row, other: Row) -> float:
    """The share of what a blend of ``other`` computed that ``one`` computed as well. Counted are
    tokens of chunks: the others are computed by all.
    """
    apart = len(set(other.chosen) - set(one.chosen))
    return 1.0 - apart / max(other.computed, 1)


def distance(reference: Mapping[int, float], other: Mapping[int, float]) -> float:
    """Mean distance of log-probabilities, over the reference's likeliest tokens that both have."""
    likeliest = sorted(reference, key=lambda token: reference[token], reverse=True)[:LIKELIEST]
    apart = [abs(reference[token] - other[token]) for token in likeliest if token in other]
    return statistics.mean(apart) if apart else math.inf


def first(row: Mapping[int, float]) -> int:
    """The likeliest token."""
    return max(row, key=lambda token: row[token])


def show_answers(answers: Mapping[str, Sequence[Row]]) -> dict[str, float]:
    one, two = answers["1"], answers["2"]
    print(
        f"{'engine':10}{'choices as 1':>14}{'least':>8}   distance to the full prefill of 1, nats"
    )
    print(f"{'':32}{'full':>10}{'ratio 1':>10}{'blend':>10}")
    for name, rows in answers.items():
        shares = [common(a, b) for a, b in zip(one, rows, strict=True)]
        apart = [
            statistics.mean(
                distance(a.full, getattr(b, mode)) for a, b in zip(one, rows, strict=True)
            )
            for mode in ("full", "ratio_one", "blend")
        ]
        print(
            f"{name:10}{statistics.mean(shares):14.4f}{min(shares):8.4f}"
            f"{''.join(f'{d:10.4f}' for d in apart)}",
            flush=True,
        )
    # what rounding does: the same prefill by one GPU and by two
    rounding = statistics.mean(distance(a.full, b.full) for a, b in zip(one, two, strict=True))
    error = statistics.mean(distance(row.full, row.ratio_one) for row in two)
    values = (
        statistics.mean(common(a, b) for a, b in zip(one, two, strict=True)),
        error / max(rounding, 1e-6),
        statistics.mean(first(row.full) == first(row.ratio_one) for row in two),
    )
    return dict(zip(BOUNDS, values, strict=False))


def show_ttft(
    ttft: Mapping[str, Mapping[str, Mapping[str, list[float]]]], args: argparse.Namespace
) -> dict[str, float]:
    print(f"{'chunks':12}{'engine':8}{'full ms':>10}{'blend ms':>10}{'full/blend':>12}")
    worst = 1.0
    for name in ttft["1"]:
        speed_ups = []
        for engine, of_engine in ttft.items():
            full, blend = (statistics.median(of_engine[name][mode]) for mode in MODES)
            speed_ups.append(full / blend)
            print(
                f"{name:12}{engine:8}{1e3 * full:10.1f}{1e3 * blend:10.1f}{full / blend:12.2f}",
                flush=True,
            )
        ratio = speed_ups[1] / speed_ups[0]
        worst = max(worst, ratio, key=lambda value: abs(value - 1.0))
    return {TIMES[0]: worst}


def show_loads(found: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    print(f"{'mode':8}{'one: requests/s':>17}{'two':>10}{'two/one':>10}{'blended':>9}")
    ratios = {}
    for mode, by_count in found.items():
        one, two = by_count["1"], by_count["2"]
        ratios[mode] = two["rps"] / one["rps"]
        print(
            f"{mode:8}{one['rps']:17.2f}{two['rps']:10.2f}{ratios[mode]:10.2f}"
            f"{two['blended']:9.0%}",
            flush=True,
        )
    return {TIMES[1]: ratios["blend"]}


if __name__ == "__main__":
    main()
