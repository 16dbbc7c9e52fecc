"""How long an event loop stands still while long prompts are asked from it.

    python benchmarks/event_loop.py [--prompts 16] [--tokens 27000] [--chunks 200] [--rounds 5]

The engine is a fake one that answers at once, so what is measured is ours: tokenising, locating,
planning and handing over. A ticker that wants a turn every millisecond notes its longest wait.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
from fake_engine import fake_blend

from cacheblend_rag import CacheBlend

WORDS = "the ship sailed from harbour {} on day {} with salt, timber and {} barrels of tar. "


def passage(number: int, tokens: int) -> str:
    """About so many tokens, unlike those of other numbers."""
    return "".join(WORDS.format(number, day, number * day) for day in range(tokens // 24))


async def longest_pause(blend: CacheBlend, prompts: list[str]) -> tuple[float, float]:
    """Seconds: the longest pause of this loop while ``prompts`` are answered, and all of it."""
    pause, last, done = 0.0, time.perf_counter(), False

    async def tick() -> None:
        nonlocal pause, last
        while not done:
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            pause, last = max(pause, now - last), now

    ticker = asyncio.create_task(tick())
    await asyncio.sleep(0.05)
    pause, start = 0.0, time.perf_counter()
    await asyncio.gather(
        asyncio.sleep(1.0), *(blend.agenerate(prompt, max_tokens=1) for prompt in prompts)
    )
    done, seconds = True, time.perf_counter() - start
    await ticker
    return pause, seconds


def main() -> None:
    """Ask, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=27_000)
    parser.add_argument("--chunks", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with pytest.MonkeyPatch.context() as patch:
        blend = fake_blend(patch, max_model_len=2 * args.tokens)
        chunks = [passage(number, 512) for number in range(args.chunks)]
        blend.ingest(chunks, progress=False)
        used = args.tokens // len(blend.tokenize(chunks[0]))
        prompts = [
            "\n\n".join(chunks[(i + k) % len(chunks)] for k in range(used)) + f"\n\nWhich day, {i}?"
            for i in range(args.prompts)
        ]
        sizes = [len(blend.tokenize(prompt)) for prompt in prompts]
        print(f"{len(prompts)} prompts of {min(sizes)} to {max(sizes)} tokens")
        print(f"longest pause {1e3 * asyncio.run(longest_pause(blend, []))[0]:.1f} ms, idle")
        gc.collect()
        gc.freeze()  # as a server does that has loaded everything
        for _ in range(args.rounds):
            pause, seconds = asyncio.run(longest_pause(blend, prompts))
            print(f"longest pause {1e3 * pause:.1f} ms, all asked in {seconds:.2f} s")


if __name__ == "__main__":
    main()
