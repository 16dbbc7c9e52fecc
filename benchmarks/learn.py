"""Learning from traffic: what it finds, and what prompts feel of it that gain nothing.

    python benchmarks/learn.py share [--prompts 600] [--share 0.2]
    python benchmarks/learn.py ttft [--cold 60]

``share`` needs no engine. Prompts are made of six texts each, drawn by Zipf's law (0.9) from the
READMEs of installed packages and our docs, in three templates. They go through the product's own
planner, finder and budget; in the place of the engine stands a clock that takes a time for each
token that it computes. ``idle``: the engine rests between prompts until all that was learnt is
computed. ``saturated``: the next prompt waits already, and learning gets its share of the time.

``ttft`` starts `cacheblend serve` twice, with the embedded model, and asks both the same prompts in
turns. Every second one is cold: its texts never come again. The others teach. Compared is the time
to the first token of the cold ones.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import random
import signal
import statistics
import sys
import tempfile
import time
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cacheblend_rag.front.learning import LearntIngestion
from cacheblend_rag.keys import KeySpace
from cacheblend_rag.known import News
from cacheblend_rag.learn import Learner, LearnOptions
from cacheblend_rag.models import embedded_model
from cacheblend_rag.pacing import Pace
from cacheblend_rag.planner import Learning, Limits, Planner, Space

ROOT = Path(__file__).parents[1]
KEYS = KeySpace("f", tuple(range(300)))
TEXTS, OF_PROMPT, ZIPF = 3000, 6, 0.9
TOKEN_S = 1e-3  # of the simulated engine
SYSTEM = "Answer from the context only. If it is not there, say so.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["share", "ttft"])
    parser.add_argument("--prompts", type=int, default=600, help="of each template")
    parser.add_argument("--share", type=float, default=LearnOptions().share)
    parser.add_argument("--cold", type=int, default=60, help="cold prompts for each server")
    args = parser.parse_args()
    if args.what == "share":
        shares(args.prompts, args.share)
    else:
        ttft(args.cold)


# ---- what is found -------------------------------------------------------------------------------


def texts() -> list[str]:
    """Paragraphs of about 1,000 characters."""
    found = [path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))]
    packages = importlib.metadata.distributions()
    found += [str(p.metadata.get_payload() or "") for p in packages]
    parts = list[str]()
    for whole in found:
        part = ""
        for paragraph in whole.split("\n\n"):
            if part and len(part) + len(paragraph) > 1000:
                parts.append(part.strip())
                part = ""
            part += paragraph[:3000] + "\n\n"
        parts.append(part.strip())
    parts = sorted({part for part in parts if len(part) > 300})
    random.Random(0).shuffle(parts)
    return parts[:TEXTS]


def llama_index(chunks: Sequence[str], question: str) -> str:
    return (
        "Context information is below.\n---------------------\n"
        + "\n\n".join(chunks)
        + "\n---------------------\nGiven the context information and not prior knowledge, answer "
        f"the query.\nQuery: {question}\nAnswer: "
    )


def numbered(chunks: Sequence[str], question: str) -> str:
    sources = (f"[{n}] Source: doc{len(c) % 97}\n{c}\n" for n, c in enumerate(chunks, 1))
    return "\n".join(sources) + f"\nQuestion: {question}"


def tagged(chunks: Sequence[str], question: str) -> str:
    sources = (f'<source id="{n}">{c}</source>' for n, c in enumerate(chunks, 1))
    return SYSTEM + "\n".join(sources) + f"\n\n{question}"


TEMPLATES = {"LlamaIndex": llama_index, "numbered": numbered, "tagged": tagged}


class Simulated:
    """In the place of an engine: it has the product's planner and finder, and a clock."""

    def __init__(self, share: float, idle: bool) -> None:
        self._idle = idle
        self.now, self.pace, self.steps, self.asked = 0.0, Pace(), 0, 0
        self.planner = Planner(block_size=16)
        options = LearnOptions(share=share)
        space = Space(name="s", keys=KEYS, default=True, options={"blend_if": "always"})
        for message in (space, Limits(), Learning(options, False)):
            self.planner.learn(0, message)
        self.learner, self.spans = Learner(options), list[Any]()
        self.find_s, self.ingested, self.chunks = list[float](), 0, 0
        self.learnt = LearntIngestion(
            self, options, 8192, 8192, lambda: None, clock=lambda: self.now
        )

    def ask(self, ids: Sequence[int]) -> int:
        """Tokens of a prompt that come from chunks."""
        planned = self.planner.plan(ids, {})
        found = sum(match.end - match.start for match in planned.matches or ())
        start = time.perf_counter()
        prompt = self.planner.prompt(ids, {}, None, planned.matches or ())
        self.spans += self.learner.observe(prompt, self.now)
        self.find_s.append(time.perf_counter() - start)
        self.steps, self.asked = self.steps + 1, self.asked + 1
        self.now += TOKEN_S * (len(ids) - 0.85 * found)
        return found

    def rpc(self, method: str, *args: Any) -> list[Any]:
        if method == "cacheblend_learnt":
            spans, self.spans = self.spans, []
            rows = [[s.key, s.token_ids, s.prefix_ids, s.to_store] for s in spans]
            return [{"spans": rows, "steps": self.steps, "step_s": 0.03}]
        keys, chunks = args[:2]
        tokens = sum(map(len, chunks))
        self.now += TOKEN_S * tokens
        if not self._idle:
            self.pace.busy_s += TOKEN_S * tokens
            self.steps += 1  # of who waits
        rows = [
            (key, array("i", ids).tobytes(), len(KEYS.prefix_ids))
            for key, ids in zip(keys, chunks, strict=True)
        ]
        self.planner.learn(0, News(rows))
        self.ingested, self.chunks = self.ingested + tokens, self.chunks + len(keys)
        return [None]

    @contextlib.contextmanager
    def slicing(self, idle_s: float) -> Iterator[None]:
        yield


def shares(count: int, share: float) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(embedded_model()))
    pool = texts()
    weights = 1 / np.arange(1, len(pool) + 1) ** ZIPF
    weights /= weights.sum()
    print(f"{len(pool)} texts, {OF_PROMPT} a prompt, Zipf {ZIPF}, {count} prompts a row")
    print(
        f"{'template':12}{'engine':12}{'tokens':>8}{'last third':>12}{'ahead':>8}{'learnt':>8}"
        f"{'tokens':>8}{'of prompts':>12}{'finder ms':>11}"
    )
    for kind in (*TEMPLATES, "all three"):
        for idle in (True, False):
            draw = np.random.default_rng(0)
            made = list[list[int]]()
            for n in range(count):
                chosen = draw.choice(len(pool), OF_PROMPT, replace=False, p=weights)
                name = kind if kind in TEMPLATES else list(TEMPLATES)[draw.integers(3)]
                text = TEMPLATES[name]([pool[i] for i in chosen], f"What of {n}, {draw.random()}?")
                turn = [{"role": "user", "content": text}]
                made.append(
                    list(
                        tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
                    )
                )
            row(kind, made, simulate(made, share, idle), ahead(made, pool, tokenizer), idle)


def simulate(
    prompts: Sequence[Sequence[int]], share: float, idle: bool
) -> tuple[Simulated, list[int]]:
    engine, found = Simulated(share, idle), []
    for ids in prompts:
        found.append(engine.ask(ids))
        engine.learnt.once()  # sees the prompt's step
        engine.now += 1.0 * idle
        while engine.learnt.once():
            pass
    return engine, found


def ahead(prompts: Sequence[Sequence[int]], pool: Sequence[str], tokenizer: Any) -> float:
    """The share of the last third that chunks serve where all texts were ingested."""
    planner = Planner(block_size=16)
    planner.learn(0, Space(name="s", keys=KEYS, default=True))
    planner.learn(0, Limits())
    rows = []
    for text in pool:
        ids = tokenizer.encode(text, add_special_tokens=False)
        rows.append((KEYS.key(ids), array("i", ids).tobytes(), len(KEYS.prefix_ids)))
    planner.learn(0, News(rows))
    last = prompts[-(len(prompts) // 3) :]
    found = sum(m.end - m.start for ids in last for m in planner.plan(ids, {}).matches or ())
    return found / sum(map(len, last))


def row(
    kind: str,
    prompts: Sequence[Sequence[int]],
    done: tuple[Simulated, Sequence[int]],
    best: float,
    idle: bool,
) -> None:
    engine, found = done
    third, sizes = len(prompts) // 3, [len(ids) for ids in prompts]
    share = sum(found[-third:]) / sum(sizes[-third:])
    print(
        f"{kind:12}{'idle' if idle else 'saturated':12}{statistics.mean(sizes):8.0f}{share:12.3f}"
        f"{best:8.3f}{engine.chunks:8}{engine.ingested / max(1, engine.chunks):8.0f}"
        f"{engine.ingested / sum(sizes):12.3f}{1e3 * statistics.mean(engine.find_s):11.2f}",
        flush=True,
    )


# ---- what others feel of it ----------------------------------------------------------------------


def ttft(cold: int) -> None:
    """Blocks of prompts to either server in turns, so that both see the same machine."""
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    from live_server import live_server

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the servers end with this
    pool, draw = texts(), random.Random(1)
    fresh, known = iter(pool[12:]), pool[:12]
    prompts = list[tuple[bool, str]]()
    for n in range(cold):
        for is_cold, text in ((True, next(fresh)), (False, draw.choice(known))):
            question = f"Question {n} of {draw.random()}: what does it say?"
            prompts.append((is_cold, f"{question}\n\n{text[:700]}\n\nAnswer:"))
    times: dict[str, list[float]] = {"off": [], "memory": []}
    with contextlib.ExitStack() as stack:
        servers = {}
        for learn in times:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            words = ["--learn", learn, "--max-model-len", "4096", "--dtype", "float32"]
            words += ["--block-size", "32", "--blend-if", "always"]
            server = live_server(embedded_model(), folder, [*words, "--served-model-name", "m"])
            servers[learn] = stack.enter_context(server)
            for question in ("Who?", "What?", "Where?"):  # warm up
                first_token_s(servers[learn], llama_index(pool[-3:], question))
        for start in range(0, len(prompts), 10):
            for learn, server in servers.items():
                for is_cold, prompt in prompts[start : start + 10]:
                    took = first_token_s(server, prompt)
                    if is_cold:
                        times[learn].append(took)
                settle(server)
            compare(times, settle(server))


def first_token_s(server: Any, prompt: str) -> float:
    body = {"model": "m", "prompt": prompt, "max_tokens": 2, "stream": True, "ignore_eos": True}
    start = time.perf_counter()
    with server.client.stream("POST", "/v1/completions", json=body) as answer:
        lines = (line for line in answer.iter_lines() if line.startswith("data: {"))
        next(lines)
        took = time.perf_counter() - start
        for _ in lines:
            pass
    return took


def compare(times: dict[str, list[float]], chunks: int) -> None:
    """What was measured so far."""
    for learn, took in times.items():
        p95 = statistics.quantiles(took, n=20, method="inclusive")[-1]
        middle = statistics.median(took)
        print(f"--learn {learn:7} TTFT median {1e3 * middle:.0f} ms, p95 {1e3 * p95:.0f} ms")
    pairs = [b / a for a, b in zip(times["off"], times["memory"], strict=True)]
    print(
        f"{len(pairs)} cold prompts, the same in both: memory / off median "
        f"{statistics.median(pairs):.3f}; {chunks} chunks learnt",
        flush=True,
    )


def settle(server: Any) -> int:
    """Wait until nothing more is learnt; the chunks that were."""
    before, chunks = -1, 0
    while chunks != before:
        before = chunks
        time.sleep(1.0)
        chunks = int(server.ask("GET", "")["store"].get("learnt_chunks", 0))
    return chunks


if __name__ == "__main__":
    main()
