"""What refinement costs: the first token of an answer that is refined, the steps of other streams,
and the first token of who asks meanwhile.

    python benchmarks/refine_load.py FILE.jsonl[.xz] [--model M] [--limit 24] [--tokens 200]

FILE is as for refine.py. The serving engine answers. Each question is asked without refinement and
with it, taking turns in going first. Every prompt begins with a number of its own, so none finds
blocks of another. Three cases:

- alone: seconds to the first token, and of the answer;
- with streams: as many as --streams decode all the time; seconds between their tokens meanwhile;
- newcomer: while a lone answer is under way, another request comes, after 2 to 40 of its tokens;
  seconds to the newcomer's first token.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from refine import GREEDY, parser
from shapes import versions

Rows = dict[str, list[float]]  # by wish


def main() -> None:
    args = arguments()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from answer_kl import SYSTEM, chunk_texts, read

    from cacheblend_rag import BlendConfig, CacheBlend
    from cacheblend_rag.models import resolve_model

    config = BlendConfig(recompute_ratio=args.ratio, system_prompt=SYSTEM, blend_if="always")
    with CacheBlend(
        resolve_model(args.model),
        config=config,
        engine="serving",
        dtype=args.dtype,
        max_model_len=4096,
        enforce_eager=args.eager,
    ) as blend:
        items = read(args.file, args.limit, args.seed)
        for item in items:
            item["texts"] = chunk_texts(item)[: args.passages]
            blend.ingest(item["texts"], progress=False)
        found = asyncio.run(Load(blend, items, args).run())
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


def arguments() -> argparse.Namespace:
    options = parser(__doc__, limit=24, dtype="auto")
    options.add_argument("--streams", type=int, default=2)
    options.add_argument("--refine", nargs=2, default=["off", "idle"], help="off, idle or a number")
    return options.parse_args()


class Load:
    """Questions to one engine, in turns with each wish."""

    def __init__(self, blend: Any, items: Sequence[dict[str, Any]], args: Any) -> None:
        self._blend, self._items, self._args = blend, items, args
        self._draw = random.Random(args.seed)
        self._refined: dict[str, list[bool]] = {wish: [] for wish in args.refine}

    async def run(self) -> dict[str, Rows]:
        args = self._args
        print(f"{versions(self._blend)}, {args.dtype}, {time.strftime('%Y-%m-%d')}")
        print(
            f"{Path(self._blend.info.model).name}: {len(self._items)} questions of "
            f"{args.file.name}, ratio {args.ratio}, {args.tokens} tokens of an answer"
        )
        for wish in (*args.refine, *args.refine):  # warm up
            await self._answer(self._items[0], wish)
        self._refined = {wish: [] for wish in args.refine}
        found = await self._alone()
        for wish, refined in self._refined.items():
            print(f"{wish}: {sum(refined)} of {len(refined)} answers were refined to the end")
        found |= {"with_streams": await self._with_streams(), "newcomer": await self._newcomer()}
        report("a step of another stream", found["with_streams"])
        report("first token of a newcomer", found["newcomer"])
        return found

    async def _alone(self) -> dict[str, Rows]:
        first: Rows = {wish: [] for wish in self._args.refine}
        whole: Rows = {wish: [] for wish in self._args.refine}
        for item, wish in self._alternating():
            at = await self._answer(item, wish)
            first[wish].append(at[0])
            whole[wish].append(at[-1])
        report("first token, alone", first)
        report("the whole answer, alone", whole)
        return {"first": first, "whole": whole}

    async def _with_streams(self) -> Rows:
        gaps: Rows = {wish: [] for wish in self._args.refine}
        for item, wish in self._alternating():
            ended = asyncio.Event()
            streams = [asyncio.create_task(self._stream(ended)) for _ in range(self._args.streams)]
            await asyncio.sleep(0.1)  # they decode
            await self._answer(item, wish)
            ended.set()
            for at in await asyncio.gather(*streams):
                gaps[wish] += [b - a for a, b in itertools.pairwise(at)]
        return gaps

    async def _newcomer(self) -> Rows:
        first: Rows = {wish: [] for wish in self._args.refine}
        for number, (item, wish) in enumerate(self._alternating()):
            tokens, coming = 2 + 38 * (number // 2) // max(1, len(self._items) - 1), asyncio.Event()
            answer = asyncio.create_task(
                self._answer(item, wish, lambda n, t=tokens, c=coming: c.set() if n == t else None)
            )
            await coming.wait()
            other = self._items[(number // 2 + 1) % len(self._items)]
            at = await self._answer(other, "off", tokens=2)
            first[wish].append(at[0])
            await answer
        return first

    def _alternating(self) -> list[tuple[dict[str, Any], str]]:
        """Each question with each wish, and which comes first by turns."""
        one, two = self._args.refine
        orders = itertools.cycle([(one, two), (two, one)])
        return [(i, wish) for i, order in zip(self._items, orders, strict=False) for wish in order]

    async def _answer(
        self,
        item: dict[str, Any],
        wish: str,
        seen: Callable[[int], None] = lambda number: None,
        tokens: int | None = None,
    ) -> list[float]:
        """Seconds from the call to each token. ``seen`` is called with their number."""
        from answer_kl import SYSTEM

        passages = "\n\n".join(item["texts"])
        asked = f"Passages:\n\n{passages}\n\nQuestion: {item['question']}\nExplain in detail."
        user = f"Request {self._draw.random()}. {asked}"
        chat = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]
        refine = int(wish) if wish.isdigit() else wish
        most = tokens or self._args.tokens
        start, at = time.perf_counter(), []
        stream = self._blend.astream(chat, max_tokens=most, refine=refine, **GREEDY)
        async for _ in stream:
            at.append(time.perf_counter() - start)
            seen(len(at))
        report = stream.result.report
        assert report.blended, report
        if wish in self._refined and tokens is None:
            self._refined[wish].append(report.refined)
        return at

    async def _stream(self, ended: asyncio.Event) -> list[float]:
        """When each token of a stream of plain vLLM came."""
        at: list[float] = []
        ask = f"Write a long story. It begins with the number {self._draw.random()}."
        async for _ in self._blend.astream(ask, mode="off", max_tokens=3000, **GREEDY):
            at.append(time.perf_counter())
            if ended.is_set():
                break
        return at


def report(what: str, rows: Rows) -> None:
    """Medians, means and 95th percentiles in ms, and by how much the second wish's are more."""
    print(f"{what}: {len(next(iter(rows.values())))} times each")
    named = {
        "median": statistics.median,
        "mean": statistics.mean,
        "95 %": lambda values: statistics.quantiles(values, n=20)[-1],
    }
    for name, of in named.items():
        one, two = (1e3 * of(values) for values in rows.values())
        shown = ", ".join(f"{wish} {ms:.2f} ms" for wish, ms in zip(rows, (one, two), strict=True))
        print(f"  {name:7} {shown} ({two / one - 1:+.1%})", flush=True)


if __name__ == "__main__":
    main()
