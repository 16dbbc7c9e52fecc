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
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

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


def from_embedded(blend: CacheBlend, messages: Messages, mode: str) -> float:
    start = time.perf_counter()
    with blend.stream(messages, mode=mode, max_tokens=2, temperature=0.0, ignore_eos=True) as found:
        next(found)
        took = time.perf_counter() - start
        for _ in found:
            pass
    assert found.result.report.blended is (mode == "blend"), found.result.report
    return took


def from_server(server: LiveServer, messages: Messages, mode: str) -> float:
    body: dict[str, Any] = {"model": "m", "messages": messages, "max_tokens": 2, "stream": True}
    body |= {"temperature": 0.0, "ignore_eos": True}
    body["kv_transfer_params"] = {"cacheblend": {"mode": mode}}
    start = time.perf_counter()
    with server.client.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = (line for line in answer.iter_lines() if line.startswith("data: {"))
        first = next(lines)  # vLLM sends it with the first token
        took = time.perf_counter() - start
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
) -> dict[tuple[str, str], list[float]]:
    """Seconds, by mode and side."""
    number, tokens = args.size
    chunks, draw = [passage(n, tokens) for n in range(number)], random.Random(0)
    blend.ingest(chunks, progress=False)
    server.ask("POST", "/ingestions", json={"chunks": chunks, "wait": True}, timeout=300)
    print(f"{len(blend.tokenize(prompt(chunks, draw)))} tokens a prompt, {number} chunks")
    took: dict[tuple[str, str], list[float]] = {(m, s): [] for m in MODES for s in SIDES}
    for turn in range(args.prompts + WARM_UP):
        for mode in MODES:
            messages = prompt(chunks, draw)
            for side in SIDES if turn % 2 else SIDES[::-1]:
                if side == "server":
                    seconds = from_server(server, messages, mode)
                else:
                    seconds = from_embedded(blend, messages, mode)
                if turn >= WARM_UP:
                    took[mode, side].append(seconds)
                time.sleep(args.rest)  # what follows an answer must not meet the next prompt
    return took


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Of their median, 95 %, by resampling."""
    draw = random.Random(0)
    medians = sorted(
        statistics.median(draw.choices(differences, k=len(differences))) for _ in range(2000)
    )
    return medians[50], medians[-51]


def show(took: dict[tuple[str, str], list[float]]) -> None:
    print(f"{'ms, median':12}{'embedded':>10}{'server':>10}{'difference':>12}   95 % interval")
    for mode in MODES:
        embedded, server = (took[mode, side] for side in SIDES)
        pairs = [b - a for a, b in zip(embedded, server, strict=True)]
        low, high = interval(pairs)
        row = [statistics.median(some) for some in (embedded, server, pairs)]
        print(
            f"{mode:12}{1e3 * row[0]:10.1f}{1e3 * row[1]:10.1f}{1e3 * row[2]:+12.2f}   "
            f"[{1e3 * low:+.2f}, {1e3 * high:+.2f}]"
        )


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
