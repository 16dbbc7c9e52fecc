"""How much later does the first token come through a server than from an embedded engine?

    python benchmarks/serve_ttft.py [--size 6x128] [--prompts 40] [--model DIR] [--layers N]

Starts `cacheblend serve` and an embedded engine (`CacheBlend`) with the same options, ingests the
same chunks into both, and asks both the same chat prompts: the server by a stock HTTP client over
loopback, streamed. They take turns prompt by prompt, either one first as often as the other, and
the one that is not asked rests: it needs no core. Each prompt is new to both engines. Half of the
prompts are blended, half are asked with the mode `off`, which is plain vLLM: what its own server
adds is what nobody can spare.

A forward takes tenths of a second on a CPU, and varies by more than what is measured. `--layers`
makes a model of that many layers, with random weights and the same tokenizer, so that the time is
the rest: parsing, tokenising, locating, planning and handing over.

On a machine that does other work, too, times say little: what is short waits for its turn. So the
table also has the times of the quickest tenth of the prompts, and what processors worked for one
request outside of the engine: in this process, and in the server's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from shapes import size

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
from live_server import LiveServer

from cacheblend_rag import BlendConfig, CacheBlend, __version__
from cacheblend_rag.models import resolve_model

WORDS = "the ship sailed from harbour {} on day {} with salt, timber and {} barrels of tar. "
SIDES, MODES = ("embedded", "server"), ("off", "blend")
WARM_UP = 4  # prompts of each mode; the first blend is a proof

Messages = list[dict[str, str]]


def passage(number: int, tokens: int) -> str:
    """About so many tokens, unlike those of other numbers."""
    return "".join(WORDS.format(number, day, number * day) for day in range(max(1, tokens // 24)))


def prompt(chunks: Sequence[str], draw: random.Random) -> Messages:
    """One that shares no prefix with others."""
    chosen = draw.sample(list(chunks), len(chunks))
    text = "\n\n".join([f"Note {draw.random()}.", *chosen, "Where did the ships sail from?"])
    return [{"role": "user", "content": text}]


class Took(NamedTuple):
    """Seconds until the first token, and those that processors worked for it outside the engine."""

    ttft: float
    work: float


def worked(process: int | None = None) -> float:
    """Seconds that processors worked for this process, and for another one."""
    tasks = Path(f"/proc/{process}/task").glob("*/schedstat") if process else ()
    return time.process_time() + sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


def from_embedded(blend: CacheBlend, messages: Messages, mode: str) -> Took:
    before, start = worked(), time.perf_counter()
    with blend.stream(messages, mode=mode, max_tokens=2, temperature=0.0, ignore_eos=True) as found:
        next(found)
        took = Took(time.perf_counter() - start, worked() - before)
        for _ in found:
            pass
    assert found.result.report.blended is (mode == "blend"), found.result.report
    return took


def from_server(server: LiveServer, messages: Messages, mode: str) -> Took:
    body: dict[str, Any] = {"model": "m", "messages": messages, "max_tokens": 2, "stream": True}
    body |= {"temperature": 0.0, "ignore_eos": True}
    body["kv_transfer_params"] = {"cacheblend": {"mode": mode}}
    assert server.process is not None
    before, start = worked(server.process.pid), time.perf_counter()
    with server.client.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = (line for line in answer.iter_lines() if line.startswith("data: {"))
        first = next(lines)  # vLLM sends it with the first token
        took = Took(time.perf_counter() - start, worked(server.process.pid) - before)
        for _ in lines:
            pass
    report = server.ask("GET", f"/requests/{json.loads(first[6:])['id']}")
    assert report["blended"] is (mode == "blend"), report
    return took


def few_layers(model: Path, layers: int, folder: Path) -> Path:
    """The model's folder with fewer layers, and without weights."""
    made = folder / "model"
    shutil.copytree(model, made, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin", "*.gguf"))
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    return made


@contextlib.contextmanager
def both(args: argparse.Namespace, folder: Path) -> Iterator[tuple[CacheBlend, LiveServer]]:
    """The two of them, with the same options."""
    model, load = Path(resolve_model(args.model)), "auto"
    if args.layers:
        model, load = few_layers(model, args.layers, folder), "dummy"
    number, tokens = args.size
    longest = 2 * number * tokens + 512
    options = {"dtype": args.dtype, "max_model_len": longest, "block_size": 32, "load_format": load}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    flags += ["--served-model-name", "m", "--blend-if", "always"]
    server = LiveServer(model, folder, flags)
    try:
        server.start()
        with CacheBlend(model, config=BlendConfig(blend_if="always"), **options) as blend:
            yield blend, server
    finally:
        server.client.close()
        server.kill()


def measure(
    blend: CacheBlend, server: LiveServer, args: argparse.Namespace
) -> dict[tuple[str, str], list[Took]]:
    """By mode and side."""
    number, tokens = args.size
    chunks, draw = [passage(n, tokens) for n in range(number)], random.Random(0)
    blend.ingest(chunks, progress=False)
    server.ask("POST", "/ingestions", json={"chunks": chunks, "wait": True}, timeout=300)
    print(f"{len(blend.tokenize(prompt(chunks, draw)))} tokens a prompt, {number} chunks")
    took: dict[tuple[str, str], list[Took]] = {(m, s): [] for m in MODES for s in SIDES}
    for turn in range(args.prompts + WARM_UP):
        for mode in MODES:
            messages = prompt(chunks, draw)
            for side in SIDES if turn % 2 else SIDES[::-1]:
                if side == "server":
                    found = from_server(server, messages, mode)
                else:
                    found = from_embedded(blend, messages, mode)
                if turn >= WARM_UP:
                    took[mode, side].append(found)
                time.sleep(args.rest)  # what follows an answer must not meet the next prompt
    return took


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Of their median, 95 %, by resampling."""
    draw = random.Random(0)
    medians = sorted(
        statistics.median(draw.choices(differences, k=len(differences))) for _ in range(2000)
    )
    return medians[50], medians[-51]


def show(took: dict[tuple[str, str], list[Took]]) -> None:
    print(f"{'ms':28}{'embedded':>10}{'server':>10}{'difference':>12}   95 % interval")
    for mode in MODES:
        embedded, server = ([found.ttft for found in took[mode, side]] for side in SIDES)
        row(
            f"{mode}, median",
            statistics.median(embedded),
            statistics.median(server),
            paired(took, mode),
        )
        tenth = [statistics.quantiles(some, n=10)[0] for some in (embedded, server)]
        row(f"{mode}, quickest tenth", *tenth)
        work = [statistics.median(found.work for found in took[mode, side]) for side in SIDES]
        row(f"{mode}, work, median", *work)


def paired(took: dict[tuple[str, str], list[Took]], mode: str) -> list[float]:
    both = zip(*(took[mode, side] for side in SIDES), strict=True)
    return [server.ttft - embedded.ttft for embedded, server in both]


def row(name: str, embedded: float, server: float, pairs: Sequence[float] = ()) -> None:
    """One line; the difference is the median of ``pairs`` where these are given."""
    difference, spread = server - embedded, ""
    if pairs:
        low, high = interval(pairs)
        difference, spread = statistics.median(pairs), f"   [{1e3 * low:+.1f}, {1e3 * high:+.1f}]"
    numbers = f"{1e3 * embedded:10.1f}{1e3 * server:10.1f}{1e3 * difference:+12.1f}"
    print(f"{name:28}{numbers}{spread}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model")
    parser.add_argument("--layers", type=int, help="of a model with random weights")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--size", type=size, default=size("6x128"), help="chunks x tokens")
    parser.add_argument("--prompts", type=int, default=40, help="of each mode")
    parser.add_argument("--rest", type=float, default=0.05, help="seconds behind each answer")
    args = parser.parse_args()
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # as the server's: its threads may move
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the server ends with this
    with tempfile.TemporaryDirectory() as name, both(args, Path(name)) as (blend, server):
        layers = f"{args.layers} layers" if args.layers else "all layers"
        print(
            f"cacheblend-rag {__version__}, vLLM {blend.info.vllm_version}, {blend.info.device}, "
            f"{Path(resolve_model(args.model)).name}, {layers}, {args.dtype}, {args.prompts} "
            f"prompts, {time.strftime('%Y-%m-%d')}",
            flush=True,
        )
        show(measure(blend, server, args))


if __name__ == "__main__":
    main()
