"""Does a server stay right, and as large as it was, under load, beside clients that leave, and
through a `kill -9`?

    python benchmarks/serve_load.py [--minutes 30] [--clients 16] [--model DIR]

Starts `cacheblend serve` with its store and its jobs on disk. Clients ask prompts of passages;
about a tenth of the requests are left in the middle. Beside them, passages are ingested and
forgotten. In the middle of the time the server is killed, with ingestions under way, and started
again.

Checked are:

- sampled answers, exact ones (mode off) and blends at ratio 1, against those that the same server
  gave alone at its start, before anything was ingested. Two tokens that are as likely may change
  places by rounding. So prompts are taken whose every token leads by a margin.
- that each report is that of its request;
- that all ingestions that were acknowledged are there, and nothing that was forgotten;
- memory, descriptors and threads of each process of the server: their medians over the last fifth
  of its life against those over the first fifth behind the warm-up.

It exits with 1 where anything is not as it should be.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import random
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import httpx
from watched import Watch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
from live_server import LiveServer

from cacheblend_rag import __version__
from cacheblend_rag.models import resolve_model

LEAVE, CHECK = 0.1, 0.3  # shares of the requests
THINKS_S = 4.0  # a client at most, between two requests
KEPT, CHECKED, DOCUMENTS = 16, 16, 40  # passages that stay, prompts checked, documents that come
TOKENS, MARGIN = 6, 0.05  # of a checked answer; nats between a token and the one behind it
MOST_GROWTH = 0.05
OPTIONS = ["--served-model-name", "m", "--dtype", "float32", "--max-model-len", "2048"]
OPTIONS += ["--block-size", "32", "--blend-if", "always", "--max-num-seqs", "16"]
OPTIONS += ["--num-gpu-blocks-override", "384"]  # soon all in use: memory that is new is not growth
MODES: dict[str, dict[str, Any]] = {"off": {"mode": "off"}, "ratio 1": {"recompute_ratio": 1.0}}
NAMES = ["harbour", "island", "ship", "captain", "lantern", "bridge", "market", "garden"]


def passage(seed: str) -> str:
    """About 110 tokens, unlike those of other seeds."""
    draw = random.Random(seed)
    parts = [
        f"On day {draw.randrange(9000)} the {draw.choice(NAMES)} of {draw.choice(NAMES)} number "
        f"{draw.randrange(9000)} was sold for {draw.randrange(9000)} crowns."
        for _ in range(4)
    ]
    return " ".join(parts)


def asking(passages: Sequence[str], draw: random.Random) -> str:
    return "\n\n".join(passages) + f"\n\nWhat was sold on day {draw.randrange(9000)}?"


class Load:
    """What all threads share.

    Attributes:
        counts: what happened, by name.
        faults: what should not have happened.
    """

    def __init__(self, server: LiveServer) -> None:
        self.server = server
        self.over, self.out = threading.Event(), threading.Event()  # out: the server is not there
        self.counts, self.faults = collections.Counter[str](), list[str]()
        self.kept = [passage(f"kept {n}") for n in range(KEPT)]
        self.right: dict[str, str] = {}  # prompts and their answers
        self.documents: dict[str, list[str]] = {}  # acknowledged, and what each consists of
        self.versions = collections.defaultdict[str, list[list[str]]](list)  # ever sent, in order
        self.unknown = set[str]()  # documents that were sent and not acknowledged
        self.forgotten: list[str] = []  # passages that must not be there
        self.jobs: list[tuple[str, str, list[str]]] = []  # acknowledged; ended ones are taken out
        self.lock, self.writing = threading.Lock(), threading.Lock()

    def count(self, what: str) -> None:
        with self.lock:
            self.counts[what] += 1

    def fault(self, what: str) -> None:
        with self.lock:
            self.faults.append(what)
        print(f"FAULT {what}", flush=True)

    def again(self, name: str, work: Callable[[random.Random, httpx.Client], None]) -> None:
        """A thread's life: ``work`` again and again. It may fail only while the server is out."""
        draw = random.Random(name)
        while not self.over.is_set():
            outs = self.out.is_set()
            try:
                with httpx.Client(base_url=self.server.url, timeout=120) as client:
                    for _ in range(20):  # then another connection
                        if self.over.is_set():
                            return
                        outs = self.out.is_set()
                        work(draw, client)
            except httpx.HTTPError as error:
                if not (outs or self.out.is_set()):
                    self.fault(f"{name}: {type(error).__name__}: {error}")
                self.count("failed while the server was out")
                self.over.wait(0.5)
            except Exception as error:  # the thread goes on: one fault must not hide others
                self.fault(f"{name}: {type(error).__name__}: {error}")

    # ---- clients -------------------------------------------------------------------------------

    def ask(self, draw: random.Random, client: httpx.Client) -> None:
        """One request of a client."""
        if draw.random() < LEAVE:
            self.leave(draw, client)
        elif draw.random() < CHECK / (1 - LEAVE):
            self.check(draw, client)
        else:
            self.blend(draw, client)
        self.over.wait(draw.uniform(0.0, THINKS_S))

    def body(self, draw: random.Random) -> dict[str, Any]:
        with self.lock:
            known = [text for texts in self.documents.values() for text in texts] + self.kept
        chosen = draw.sample(known, draw.randint(1, 3))
        return {"model": "m", "prompt": asking(chosen, draw), "max_tokens": draw.randint(1, 16)}

    def leave(self, draw: random.Random, client: httpx.Client) -> None:
        """Ask, and be gone: before the answer, or in the middle of it."""
        body = {**self.body(draw), "max_tokens": 64}
        if draw.random() < 0.5:
            with contextlib.suppress(httpx.ReadTimeout):
                client.post("/v1/completions", json=body, timeout=draw.uniform(0.02, 1.0))
        else:
            with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
                for _ in zip(answer.iter_lines(), range(draw.randint(0, 20)), strict=False):
                    pass
        self.count("left")

    def check(self, draw: random.Random, client: httpx.Client) -> None:
        """An answer that is known."""
        prompt, (name, options) = draw.choice(list(self.right)), draw.choice(list(MODES.items()))
        answer = completion(client, prompt, options)
        if (text := answer["choices"][0]["text"]) != self.right[prompt]:
            self.fault(f"{name}: {text!r} in the place of {self.right[prompt]!r}")
        self.count(f"checked, {name}")

    def blend(self, draw: random.Random, client: httpx.Client) -> None:
        """A stream that is read to its end, and its report."""
        body = {**self.body(draw), "stream": True, "stream_options": {"include_usage": True}}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                answer.read()
                raise ValueError(f"{answer.status_code} {answer.text}")
            lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: {")]
        last = json.loads(lines[-1])
        if "usage" not in last:
            raise ValueError(f"a stream ended with {last}")
        report = parsed(client.get(f"/v1/cacheblend/requests/{last['id']}"))
        if report["tokens_total"] != last["usage"]["prompt_tokens"]:
            self.fault(f"{last['id']} has {last['usage']}, its report {report}")
        self.count("blended" if report["blended"] else f"not blended: {report['reason']}")

    # ---- who ingests and forgets ---------------------------------------------------------------

    def write(self, draw: random.Random, client: httpx.Client) -> None:
        """A document that is new, or replaced, and one that goes."""
        with self.writing:
            self.ingest(f"document {draw.randrange(DOCUMENTS)}", draw, client)
            self.settle(client)
            if len(self.documents) > DOCUMENTS // 2:
                self.forget(draw.choice(list(self.documents)), client)
        self.over.wait(draw.uniform(0.2, 1.5))

    def ingest(self, name: str, draw: random.Random, client: httpx.Client) -> None:
        """It counts when the server has acknowledged it."""
        texts = [passage(uuid.uuid4().hex) for _ in range(draw.randint(1, 3))]
        body = {"chunks": texts, "wait": draw.random() < 0.5}
        with self.lock:
            self.documents.pop(name, None)
        self.versions[name].append(texts)
        self.unknown.add(name)
        job = parsed(client.put(f"/v1/cacheblend/documents/{name}", json=body))
        self.unknown.discard(name)
        self.jobs.append((job["id"], name, texts))
        self.count("ingestions acknowledged")

    def settle(self, client: httpx.Client) -> None:
        """What ended of the acknowledged is there, and what it took the place of is not."""
        for job in list(self.jobs):
            name, document, texts = job
            found = parsed(client.get(f"/v1/cacheblend/ingestions/{name}"))
            if found["status"] in ("queued", "in_progress"):
                continue
            if found["status"] != "completed" or found["counts"]["not_stored"]:
                self.fault(f"an ingestion became {found}")
            self.jobs.remove(job)
            is_last = self.versions[document][-1] is texts and document not in self.unknown
            if is_last:
                self.forgot(text for old in self.versions[document][:-1] for text in old)
                self.versions[document] = [texts]
                with self.lock:
                    self.documents[document] = texts

    def forget(self, name: str, client: httpx.Client) -> None:
        with self.lock:
            texts = self.documents.pop(name)
        parsed(client.delete(f"/v1/cacheblend/documents/{name}"))
        self.forgot(texts)
        self.versions[name] = []
        self.count("documents forgotten")

    def forgot(self, texts: Iterable[str]) -> None:
        self.forgotten = [*self.forgotten, *texts][-1000:]

    def verify(self) -> None:
        """All that was acknowledged is there, and what was forgotten is not."""
        client, until = self.server.client, time.monotonic() + 180
        while self.jobs and time.monotonic() < until:
            self.settle(client)
            time.sleep(0.2)
        if self.jobs:
            self.fault(f"{len(self.jobs)} ingestions did not end")
        wanted = self.kept + [text for texts in self.documents.values() for text in texts]
        for texts, stored in ((wanted, True), (self.forgotten, False)):
            for at in range(0, len(texts), 100):
                body = {"texts": texts[at : at + 100]}
                for row in self.server.ask("POST", "/chunks/keys", json=body)["data"]:
                    if row["stored"] is not stored:
                        self.fault(f"{row} should be {'stored' if stored else 'forgotten'}")
        print(f"{len(wanted)} chunks are there, {len(self.forgotten)} are forgotten", flush=True)


def parsed(answer: httpx.Response) -> Any:
    """What the server says where it does not refuse."""
    if answer.status_code >= 300:
        raise ValueError(f"{answer.status_code} {answer.text}")
    return answer.json()


def completion(
    client: httpx.Client, prompt: str, options: dict[str, Any], **more: Any
) -> dict[str, Any]:
    body = {"model": "m", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, **more}
    body["kv_transfer_params"] = {"cacheblend": options}
    found: dict[str, Any] = parsed(client.post("/v1/completions", json=body))
    return found


def reference(load: Load) -> None:
    """Prompts of passages that stay, and their exact answers."""
    draw = random.Random("reference")
    while len(load.right) < CHECKED:
        prompt = asking(draw.sample(load.kept, draw.randint(1, 3)), draw)
        answer = completion(load.server.client, prompt, MODES["off"], logprobs=2)["choices"][0]
        ranked = [sorted(top.values()) for top in answer["logprobs"]["top_logprobs"]]
        if all(top[-1] - top[-2] > MARGIN for top in ranked):
            load.right[prompt] = answer["text"]


def killed(load: Load, watch: Watch) -> Watch:
    """Kill the server with an ingestion under way, and start it again."""
    with load.writing:  # else it could wait behind many
        texts = [passage(uuid.uuid4().hex) for _ in range(20)]
        job = load.server.ask("PUT", "/documents/killed", json={"chunks": texts})
        load.jobs.append((job["id"], "killed", texts))
        load.versions["killed"].append(texts)
    while load.server.ask("GET", f"/ingestions/{job['id']}")["counts"]["remaining"] == len(texts):
        time.sleep(0.02)
    left = load.server.ask("GET", f"/ingestions/{job['id']}")["counts"]["remaining"]
    watch.stop()
    load.out.set()
    load.server.kill()
    started = time.monotonic()
    load.server.start()
    took = time.monotonic() - started
    print(f"killed with {left} of {len(texts)} chunks to go; up after {took:.0f} s", flush=True)
    load.out.clear()
    with load.writing:
        load.verify()
    assert load.server.process is not None
    return Watch(load.server.process.pid)


def run(load: Load, args: argparse.Namespace) -> list[Watch]:
    reference(load)
    load.server.ask("POST", "/ingestions", json={"chunks": load.kept, "wait": True}, timeout=300)
    assert load.server.process is not None
    watches = [Watch(load.server.process.pid)]
    works = {f"client {n}": load.ask for n in range(args.clients)} | {"writer": load.write}
    threads = [threading.Thread(target=load.again, args=pair) for pair in works.items()]
    for thread in threads:
        thread.start()
    try:
        load.over.wait(30 * args.minutes)
        watches.append(killed(load, watches[-1]))
        load.over.wait(30 * args.minutes)
    finally:
        load.over.set()
        for thread in threads:
            thread.join()
        watches[-1].stop()
    load.verify()
    return watches


def print_growth(load: Load, watches: Sequence[Watch], warm_up_s: float) -> None:
    print(f"{'process':34}{'what':>14}{'first':>10}{'last':>10}{'growth':>9}")
    for life, watch in enumerate(watches, 1):
        for found in watch.growth(warm_up_s):
            unit = 1024 if found.what == "kib" else 1
            what = "resident MiB" if found.what == "kib" else found.what
            numbers = f"{found.first / unit:10.0f}{found.last / unit:10.0f}{found.share:9.1%}"
            print(f"{life}: {found.process[:30]:31}{what:>14}{numbers}", flush=True)
            if found.share > MOST_GROWTH:
                load.fault(f"{found.process}: {what} grew by {found.share:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=16)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the server ends with this
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = [*OPTIONS, "--store", str(folder / "kv"), "--state", str(folder / "state")]
        server = LiveServer(Path(resolve_model(args.model)), folder, options)
        load = Load(server)
        try:
            server.start()
            state = server.ask("GET", "")
            print(
                f"cacheblend-rag {__version__}, vLLM {state['vllm_version']}, {args.clients} "
                f"clients, {args.minutes:g} minutes, {time.strftime('%Y-%m-%d')}",
                flush=True,
            )
            watches = run(load, args)
        finally:
            server.kill()
        for what, times in sorted(load.counts.items()):
            print(f"{times:7} {what}")
        print_growth(load, watches, 6.0 * args.minutes)  # a fifth of the time, two of each life
    print(f"{len(load.faults)} faults")
    sys.exit(bool(load.faults))


if __name__ == "__main__":
    main()
