"""Two servers of one model and the same options: ``cacheblend serve``, and vLLM alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from live_server import LiveServer

FACTS = [
    "The bell in the lighthouse was cast in {} by two brothers. ",
    "A storm in the winter of {} broke the old pier of the village. ",
    "The school on the hill was opened in {} with eleven pupils. ",
    "The ferry to the mainland first sailed in {}, and only in summer. ",
    "The last wolf of the island was seen in {} near the northern cliffs. ",
    "The market hall got its glass roof in {}, after a fire. ",
]
CHUNKS = [(fact.format(1874 + i) * 4).strip() for i, fact in enumerate(FACTS)]
# what the command sets by itself on a CPU
_OURS = ("--enforce-eager", "--block-size", "32", "--enable-prompt-tokens-details")


class Pair(NamedTuple):
    """Both, by the name ``m``."""

    ours: LiveServer
    plain: LiveServer


@contextlib.contextmanager
def pair(model: Path, folder: Path, *options: str) -> Iterator[Pair]:
    """Started at once."""
    common = ["--dtype", "float32", "--max-model-len", "2048", "--served-model-name", "m"]
    common += [*options, "--num-gpu-blocks-override", "256"]
    threads = str(max(1, (os.cpu_count() or 2) // 2))
    environment = {"OMP_NUM_THREADS": threads, "VLLM_WORKER_MULTIPROC_METHOD": "fork"}
    for name in ("ours", "plain"):
        (folder / name).mkdir()
    blending = ["--store", str(folder / "ours/kv"), "--blend-if", "always"]
    both = Pair(
        LiveServer(model, folder / "ours", [*common, *blending], environment),
        LiveServer(model, folder / "plain", [*common, *_OURS], environment, plain=True),
    )
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(LiveServer.start, both))
        yield both
    finally:
        for server in both:
            server.client.close()
            if server.process is not None:
                server.kill()


def ask(server: LiveServer, path: str, body: dict[str, Any], **cacheblend: Any) -> Any:
    """A request, with these options of ours; the response as it came."""
    sent = dict(body)
    if cacheblend:
        sent["kv_transfer_params"] = {"cacheblend": cacheblend}
    return server.client.post(path, json=sent)


def numbered(count: int, orders: Sequence[Sequence[int]]) -> list[str]:
    """Prompts of chunks in these orders, no two alike."""
    places = (orders[i % len(orders)] for i in range(count))
    return [
        "\n\n".join([f"{i + 1}.", *(CHUNKS[at] for at in place), "Which year is named last?"])
        for i, place in enumerate(places)
    ]
