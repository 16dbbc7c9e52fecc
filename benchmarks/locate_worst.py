"""How long does finding chunks take at worst, in text that is made to be slow?

Builds an index for each of a number of crafted corpora (repeated tokens, periodic text, words with
many repeats, windows of one document, chunks with the same beginning, indexes that grew, ...) and
asks for crafted prompts. Prints the median and the longest time on the clock, and the CPU time,
which other work on the machine lengthens less.

    python benchmarks/locate_worst.py --chunks 100000 --prompt-tokens 32000
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cacheblend_rag.locate import ChunkIndex

Ids = NDArray[np.int32]

VOCABULARY = 128_000
MOST_TOKENS = 40_000_000  # of all chunks of a corpus: there are fewer of the longer ones


class Case(NamedTuple):
    name: str
    chunks: list[Ids]
    prompts: dict[str, Ids]
    grows: bool = (
        False  # chunks come a few at a time, so that the index has as many parts as it may
    )


def randoms(rng: np.random.Generator, num_tokens: int, vocabulary: int = VOCABULARY) -> Ids:
    return rng.integers(0, vocabulary, num_tokens, dtype=np.int32)


def repeated(ids: Ids, num_tokens: int) -> Ids:
    return np.resize(ids, num_tokens).astype(np.int32)


def fibonacci(num_tokens: int) -> Ids:
    before, word = np.zeros(1, np.int32), np.array([0, 1], np.int32)
    while len(word) < num_tokens:
        before, word = word, np.concatenate([word, before])
    return word[:num_tokens]


def thue_morse(num_tokens: int) -> Ids:
    places = np.arange(num_tokens)
    return np.array([int(n).bit_count() & 1 for n in places], np.int32)


def de_bruijn(num_tokens: int) -> Ids:
    """A binary word in which all windows of 16 differ, by a linear feedback shift register."""
    state, word = 1, []
    for _ in range(num_tokens):
        word.append(state & 1)
        bit = (state ^ state >> 2 ^ state >> 3 ^ state >> 5) & 1
        state = state >> 1 | bit << 15
    return np.array(word, np.int32)


def windows(
    text: Ids, num_chunks: int, rng: np.random.Generator, low: int, high: int, stride: int = 0
) -> list[Ids]:
    """Windows of ``low`` to ``high`` tokens; at random places, or one ``stride`` apart."""
    sizes = rng.integers(low, high + 1, num_chunks)
    num_chunks = min(num_chunks, int(np.searchsorted(np.cumsum(sizes), MOST_TOKENS)))
    starts = rng.integers(0, len(text) - high, num_chunks)
    if stride:
        starts = np.arange(num_chunks) * stride % (len(text) - high)
    return [text[a : a + n] for a, n in zip(starts.tolist(), sizes.tolist(), strict=False)]


def shuffled(rng: np.random.Generator, text: Ids, piece: int) -> Ids:
    pieces = [text[at : at + piece] for at in range(0, len(text), piece)]
    return np.concatenate([pieces[i] for i in rng.permutation(len(pieces))])


def prompts_of(rng: np.random.Generator, text: Ids, size: int) -> dict[str, Ids]:
    text = text[:size]
    return {"as it is": text} | {f"pieces of {n}": shuffled(rng, text, n) for n in (24, 100, 700)}


def repeats(rng: np.random.Generator, num_chunks: int, size: int) -> Iterator[Case]:
    for period in (1, 2, 3, 15, 16, 17, 64, 125, 400, 997):
        text = repeated(randoms(rng, period), size + 40_000)
        for low, high in ((33, 64), (100, 500), (1000, 2000), (20_000, 32_000)):
            chunks = windows(text, num_chunks, rng, low, high)
            yield Case(f"period {period}, {low} to {high}", chunks, prompts_of(rng, text, size))


def words(rng: np.random.Generator, num_chunks: int, size: int) -> Iterator[Case]:
    texts = {"Fibonacci": fibonacci, "Thue-Morse": thue_morse, "de Bruijn": de_bruijn}
    for name, make in texts.items():
        text = make(size + 40_000)
        for low, high in ((33, 64), (100, 500), (1000, 2000), (20_000, 32_000)):
            chunks = windows(text, num_chunks, rng, low, high)
            yield Case(f"{name}, {low} to {high}", chunks, prompts_of(rng, text, size))


def documents(rng: np.random.Generator, num_chunks: int, size: int) -> Iterator[Case]:
    for length in (32, 47, 256, 400, 512, 1024, 4096, 16_384):
        stride = 1
        text = randoms(rng, size + 40_000)
        chunks = windows(text, num_chunks, rng, length, length, stride)
        yield Case(f"windows of {length}, stride 1", chunks, prompts_of(rng, text, size))
    for vocabulary in (2, 3, 10):
        text = randoms(rng, size + 40_000, vocabulary)
        chunks = windows(text, num_chunks, rng, 32, 600)
        yield Case(f"{vocabulary} different tokens", chunks, prompts_of(rng, text, size))


def beginnings(rng: np.random.Generator, num_chunks: int, size: int) -> Iterator[Case]:
    for shared in (40, 300, 380):
        head = randoms(rng, shared)
        chunks = [np.concatenate([head, randoms(rng, 400 - shared)]) for _ in range(num_chunks)]
        chosen = rng.choice(num_chunks, size // 400, replace=False)
        wholes = np.concatenate([chunks[i] for i in chosen])
        prompts = {"wholes": wholes, "the shared head": repeated(head, size)}
        yield Case(f"{shared} of 400 tokens shared", chunks, prompts)


def ladders(rng: np.random.Generator, num_chunks: int, size: int) -> Iterator[Case]:
    """Windows of lengths that have all binary digits, so that each place has as many rungs."""
    for length in (511, 1023, 2047):
        text = randoms(rng, size + 40_000)
        chunks = windows(text, min(num_chunks, size), rng, length, length, 1)
        yield Case(f"all rungs of {length}", chunks, prompts_of(rng, text, size))


def anchors(rng: np.random.Generator, num_chunks: int, size: int) -> Iterator[Case]:
    """Chunks that have only their anchors in common with the prompt, one by one."""
    text = randoms(rng, size)
    for length, kept in ((96, 16), (400, 16), (400, 63), (4000, 16), (30_000, 16)):
        chunks = []
        for _ in range(min(num_chunks, MOST_TOKENS // length)):
            start = int(rng.integers(0, size - length))
            chunk = text[start : start + length].copy()
            places = np.arange(length)
            chunk[(places - 8) % 64 >= kept] = rng.integers(VOCABULARY)
            chunks.append(chunk)
        yield Case(f"{kept} of 64 tokens of {length} equal", chunks, {"the text": text})


def growing(rng: np.random.Generator, num_chunks: int, size: int) -> Iterator[Case]:
    """Indexes of many parts, in each of which long chunks have the longest rungs looked for."""
    text = randoms(rng, size + 40_000)
    for length in (47, 400, 1023, 2047):
        chunks = windows(text, num_chunks, rng, length, length, 1)
        prompts = prompts_of(rng, text, size)
        yield Case(f"grown, windows of {length}", chunks, prompts, grows=True)
    for period in (1, 2, 15, 64, 997):
        text = repeated(randoms(rng, period), size + 40_000)
        for low, high in ((33, 64), (100, 500), (1000, 2000)):
            chunks = windows(text, num_chunks, rng, low, high)
            prompts = prompts_of(rng, text, size)
            yield Case(f"grown, period {period}, {low} to {high}", chunks, prompts, grows=True)


def parts_of(rng: np.random.Generator, chunks: list[Ids]) -> Iterator[list[Ids]]:
    """Each a tenth of what came before, with one long chunk where that makes it little larger."""
    left = len(chunks)
    while left:
        part = chunks[len(chunks) - left :][: max(1, left - left // 10)]
        left -= len(part)
        room = sum(map(len, part)) // 20
        yield part + ([randoms(rng, min(room, 32_767))] if room > 400 else [])


def index_of(case: Case) -> ChunkIndex:
    index = ChunkIndex()
    parts = parts_of(np.random.default_rng(1), case.chunks) if case.grows else [case.chunks]
    for number, part in enumerate(parts):
        index.add_many((f"{number}-{i}", ids) for i, ids in enumerate(part))
    return index


def cases(num_chunks: int, size: int) -> Iterator[Case]:
    rng = np.random.default_rng(0)
    for make in (repeats, words, documents, beginnings, ladders, anchors, growing):
        yield from make(rng, num_chunks, size)


def timed(run: Callable[[], object], repeats: int) -> tuple[list[float], list[float]]:
    wall_ms, cpu_ms = [], []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.thread_time()
        run()
        wall_ms.append((time.perf_counter() - wall) * 1e3)
        cpu_ms.append((time.thread_time() - cpu) * 1e3)
    return wall_ms, cpu_ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, default=100_000)
    parser.add_argument("--prompt-tokens", type=int, default=32_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    args = parser.parse_args()
    worst: list[tuple[float, str]] = []
    print(f"{'chunks':32} {'prompt':16} {'median ms':>9} {'max':>6} {'CPU':>6} {'covered':>8}")
    for case in cases(args.chunks, args.prompt_tokens):
        if args.only not in case.name:
            continue
        index = index_of(case)
        for name, prompt in case.prompts.items():
            found = index.locate(prompt)
            covered = sum(m.end - m.start for m in found) / len(prompt)
            wall, cpu = timed(lambda index=index, prompt=prompt: index.locate(prompt), args.repeats)
            worst.append((median(wall), f"{case.name}; {name}"))
            print(
                f"{case.name:32} {name:16} {median(wall):9.1f} {max(wall):6.1f} "
                f"{median(cpu):6.1f} {covered:8.1%}",
                flush=True,
            )
    for median_ms, what in sorted(worst, reverse=True)[:5]:
        print(f"worst: {median_ms:.1f} ms, {what}")


if __name__ == "__main__":
    main()
