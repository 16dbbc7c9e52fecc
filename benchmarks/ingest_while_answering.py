"""The longest gap of streams while a server ingests, against a decode step.

    python benchmarks/ingest_while_answering.py [--model DIR] [--streams 2]
        [--tokens 120] [--chunks 40]

Starts `cacheblend serve`, streams answers, and ingests chunks of 512 tokens meanwhile. The aim is a
gap of two steps at most.
"""

from __future__ import annotations

import argparse
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


def row(name: str, found: list[float]) -> None:
    """One line."""
    ordered = sorted(found)
    parts = [statistics.median(ordered), ordered[int(len(ordered) * 0.99)], ordered[-1]]
    print(name.ljust(20), *(f"{1e3 * part:9.1f}" for part in parts))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=120)
    parser.add_argument("--chunks", type=int, default=40)
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
    """Alone, and beside an ingestion; then the ingestion alone."""
    gaps(server, args.streams, 20)
    print("ms".ljust(20), *(name.rjust(9) for name in ("median", "99 %", "longest")))
    row("alone", gaps(server, args.streams, args.tokens))
    chunks = [passage(n) for n in range(2 * args.chunks)]
    name = server.ask("POST", "/ingestions", json={"chunks": chunks[: args.chunks]})["id"]
    row("with an ingestion", gaps(server, args.streams, args.tokens))
    job = server.ask("GET", f"/ingestions/{name}")
    print(f"ingested meanwhile: {job['tokens']} tokens; {job['status']}")
    server.ended(name, 300)
    start = time.perf_counter()
    alone = server.ask(
        "POST", "/ingestions", json={"chunks": chunks[args.chunks :], "wait": True}, timeout=300
    )
    took = time.perf_counter() - start
    print(f"ingestion alone: {alone['tokens'] / took:.0f} tokens a second")


if __name__ == "__main__":
    main()
