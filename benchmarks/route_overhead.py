"""What does ``cacheblend route`` add to a request, and how many does one process of it carry?

Four servers in one process answer at once, with a stream of events. The same requests go to one of
them directly, and through the proxy, in turn. The processor time of the proxy's process is what a
busy machine shows, too.

    python benchmarks/route_overhead.py --prompt-kb 6 100
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import numpy as np

EVENTS, EVENT = 64, b'data: {"choices": [{"index": 0, "text": " word"}], "object": "text"}\n\n'
AT_ONCE = 32


async def answers(scope: dict, receive: object, send: object) -> None:
    """An ASGI application in place of a server."""
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body"):  # type: ignore[operator]
        pass
    head = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": head})  # type: ignore[operator]
    for _ in range(EVENTS if scope["method"] == "POST" else 1):
        await send({"type": "http.response.body", "body": EVENT, "more_body": True})  # type: ignore[operator]
    await send({"type": "http.response.body", "body": b""})  # type: ignore[operator]


async def serve(ports: list[int]) -> None:
    import uvicorn

    quiet = {"log_level": "critical", "lifespan": "off"}
    servers = [uvicorn.Server(uvicorn.Config(answers, port=port, **quiet)) for port in ports]
    await asyncio.gather(*(server.serve() for server in servers))


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in found:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in found]


@contextlib.contextmanager
def started(*arguments: str, port: int) -> Iterator[int]:
    """A process that listens at a port; its id."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, *arguments], **quiet)  # type: ignore[call-overload]
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
                break
            time.sleep(0.1)
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def prompts(kilobytes: int, count: int) -> list[dict[str, object]]:
    rng = np.random.default_rng(0)
    topics = [
        " ".join(f"w{w:05x}" for w in rng.integers(0, 1 << 20, 140 * kilobytes)) for _ in range(8)
    ]
    texts = [f"{n} {topics[n % 8]} question {n}" for n in range(count)]
    return [{"model": "m", "prompt": text, "stream": True} for text in texts]


def first_and_last(client: httpx.Client, url: str, body: dict[str, object]) -> tuple[float, float]:
    """Milliseconds until the first byte and the last one."""
    began = time.perf_counter()
    with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
        pieces = answer.iter_raw()
        next(pieces)
        first = time.perf_counter() - began
        for _ in pieces:
            pass
    return 1e3 * first, 1e3 * (time.perf_counter() - began)


async def rate(url: str, bodies: list[dict[str, object]]) -> float:
    """Requests a second, many at once."""
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        waiting = iter(bodies)

        async def one() -> None:
            for body in waiting:
                answer = await client.post(f"{url}/v1/completions", json=body)
                assert answer.content == EVENTS * EVENT

        began = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(AT_ONCE)))
        return len(bodies) / (time.perf_counter() - began)


def cpu_s(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--prompt-kb", type=int, nargs="+", default=[6, 100])
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--serve", type=int, nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        asyncio.run(serve(args.serve))
        return
    *ports, port = free_ports(5)
    replicas = [word for p in ports for word in ("--replica", f"http://127.0.0.1:{p}")]
    route = ["-m", "cacheblend_rag", "route", *replicas, "--port", str(port)]
    with (
        started(__file__, "--serve", *map(str, ports), port=ports[-1]),
        started(*route, port=port) as pid,
        httpx.Client(trust_env=False) as client,
    ):
        urls = {"direct": f"http://127.0.0.1:{ports[0]}", "proxy": f"http://127.0.0.1:{port}"}
        print("| prompt | first byte | by proxy | last byte | by proxy | processor | a second |")
        print("|---|---|---|---|---|---|---|")
        for kilobytes in args.prompt_kb:
            bodies = prompts(kilobytes, args.requests)
            took: dict[str, list[tuple[float, float]]] = {name: [] for name in urls}
            for body in bodies:
                for name, url in urls.items():
                    took[name].append(first_and_last(client, url, body))
            before = cpu_s(pid)
            each_s = asyncio.run(rate(urls["proxy"], bodies))
            work = 1e3 * (cpu_s(pid) - before) / len(bodies)
            first, last = (
                [statistics.median(t[part] for t in took[name]) for name in urls] for part in (0, 1)
            )
            print(
                f"| {kilobytes} kB | {first[0]:.1f} ms | {first[1]:.1f} ms | {last[0]:.1f} ms "
                f"| {last[1]:.1f} ms | {work:.1f} ms | {each_s:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
