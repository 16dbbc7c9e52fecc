"""The longest gap of streams while a server ingests, against a decode step.

    python benchmarks/ingest_while_answering.py [--model DIR] [--streams 2]
        [--tokens 120] [--chunks 40] [--rounds 3]

Starts `cacheblend serve`, and streams answers alone and while chunks of 512 tokens are ingested, in
turns. The aim is that no gap is longer than two steps, as long as these are alone.

On a machine that does other work, too, a gap says little: alone, some are longer than two steps
there as well. The last column says how many.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
from live_server import LiveServer

from cacheblend_rag.models import resolve_model

WORDS = "the ship sailed from harbour {} on day {} with salt, timber and {} barrels of tar. "


def passage(number: int, tokens: int = 512) -> str:
    """About so many tokens, unlike those of other numbers."""
    return "".join(WORDS.format(number, day, number * day) for day in range(tokens // 24))


def gaps(server: LiveServer, streams: int, tokens: int) -> list[float]:
    """Seconds between two pieces of an answer, of several at once; the first one left out."""
    found: list[float] = []

    def stream(number: int) -> None:
        body = {"model": "m", "prompt": f"Tell me of ship {number}.", "max_tokens": tokens}
        body |= {"stream": True, "ignore_eos": True, "temperature": 0}
        last = 0.0
        with server.client.stream("POST", "/v1/completions", json=body) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    now = time.perf_counter()
                    if last:
                        found.append(now - last)
                    last = now

    threads = [threading.Thread(target=stream, args=(n,)) for n in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def row(name: str, found: list[float], step_s: float) -> None:
    """One line."""
    ordered = sorted(found)
    parts = [statistics.median(ordered), ordered[int(len(ordered) * 0.99)], ordered[-1]]
    numbers = [f"{1e3 * part:9.1f}" for part in parts] + [f"{ordered[-1] / step_s:9.2f}"]
    slow = sum(gap > 2 * step_s for gap in ordered)
    print(name.ljust(20), *numbers, f"{slow:5} of {len(ordered)}", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=120)
    parser.add_argument("--chunks", type=int, default=40, help="ingested in each round")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options = ["--served-model-name", "m", "--max-model-len", "4096"]
        server = LiveServer(Path(resolve_model(args.model)), Path(folder), options)
        try:
            server.start()
            measure(server, args)
        finally:
            server.kill()


def measure(server: LiveServer, args: argparse.Namespace) -> None:
    """Alone, and with an ingestion, in turns; then the ingestion alone."""
    chunks = iter(passage(n) for n in range(2, sys.maxsize))
    gaps(server, args.streams, 20)
    server.ask("POST", "/ingestions", json={"chunks": [passage(1)], "wait": True}, timeout=300)
    names = ("median", "99 %", "longest", "in steps", "above two")
    print("ms".ljust(20), *(name.rjust(9) for name in names))
    for _ in range(args.rounds):
        alone = gaps(server, args.streams, args.tokens)
        step_s = statistics.median(alone)
        row("alone", alone, step_s)
        given = {"chunks": list(itertools.islice(chunks, args.chunks))}
        name = server.ask("POST", "/ingestions", json=given)["id"]
        start = time.perf_counter()
        row("with an ingestion", gaps(server, args.streams, args.tokens), step_s)
        job, took = server.ask("GET", f"/ingestions/{name}"), time.perf_counter() - start
        print(f"  {job['tokens'] / took:.0f} tokens a second were ingested; {job['status']}")
        if job["status"] == "in_progress":
            server.ask("POST", f"/ingestions/{name}/cancel")
            server.ended(name, 300)
    given = {"chunks": list(itertools.islice(chunks, args.chunks)), "wait": True}
    start = time.perf_counter()
    job = server.ask("POST", "/ingestions", json=given, timeout=300)
    took = time.perf_counter() - start
    print(f"ingestion alone: {job['tokens'] / took:.0f} tokens a second")


if __name__ == "__main__":
    main()
