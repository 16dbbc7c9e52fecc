"""The index: what chunks there are, and which of them stand in a prompt."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from cacheblend_rag.errors import ConfigError
from cacheblend_rag.locate.arrays import Growing, Hashes, Ids, as_ids, exclusive_sum
from cacheblend_rag.locate.hashes import (
    ANCHOR_WIDTH,
    Entries,
    entries_of,
    hash_levels,
    window_hashes,
)
from cacheblend_rag.locate.parts import parts_of_chunks
from cacheblend_rag.locate.plain import plainly_there
from cacheblend_rag.locate.runs import Found, Run, Snapshot, find, live_entries, new_run
from cacheblend_rag.locate.spans import Match, best_of_each_stretch, joined, resolve_overlaps
from cacheblend_rag.locate.wholes import whole_chunks

_BATCH_TOKENS = 1 << 18  # work arrays of a batch stay within a few MB, near the CPU's cache
_RUN_RATIO = 8  # each run of anchors is at least this many times the next
_SMALL_RUN = 4096  # anchors of which the last run only may have fewer: each run is asked each time


class ChunkIndex:
    """Token ids of many chunks, searchable for all their occurrences in a prompt at once.

    What ``locate`` finds, with the default ``min_tokens`` of 32:
        * every whole chunk of at least ``min_tokens`` tokens, also when up to 8 tokens differ at
          each end as long as ``min_tokens`` tokens remain;
        * every head (the tail cut off) and every tail (the head cut off) of at least 32 tokens,
          also when up to 8 tokens differ at the chunk's own end;
        * every other stretch of a chunk that lies at or after its token 8 and has at least 79
          tokens; a shorter one of n >= 32 tokens in about (n - 15) / 64 of the cases, and always
          beside a longer one of the same chunk at the same shift.
    Spans below 32 tokens (a smaller ``min_tokens``, which may go down to 16): whole chunks from 16
    tokens on, heads and tails from 24 tokens on.

    Work is bounded by a multiple of the prompt's length. Where chunks or prompt repeat themselves
    so much that this is not enough, the parts (all but the first line) whose anchors are the most
    common are not found. Whole chunks always are: of such a chunk, fewer than 32 tokens at either
    end may be missing, or belong to a match with another chunk that stands there for longer.

    Overlaps: the longest span wins, then the leftmost, the smallest offset, the shortest chunk, the
    chunk added first. Of the spans that begin within the same ``min_tokens`` tokens of the prompt
    only the winner counts. Another loser is trimmed to what remains, if that is still
    ``min_tokens``.

    All methods may be called from several threads. Writers take a lock; ``locate`` takes none and
    answers for the state at its start, save that a chunk discarded meanwhile may be missing.
    """

    def __init__(self) -> None:
        """An empty index."""
        self._lock = threading.Lock()
        self._rows: dict[str, int] = {}  # key -> row, of live chunks
        self._keys: list[str] = []  # by row, dead ones included
        self._tokens = Growing(np.empty(0, np.int32))
        self._starts = Growing(np.empty(0, np.int64))  # by row: its first index in _tokens
        self._lengths = Growing(np.empty(0, np.int64))  # by row
        self._alive = Growing(np.empty(0, np.bool_))  # by row
        self._dead_tokens = 0
        self._longest = 0  # tokens of the longest chunk so far
        self._runs: list[Run] = []  # oldest and longest first
        self._publish()

    def __len__(self) -> int:
        """Number of chunks."""
        return len(self._rows)

    def __contains__(self, key: object) -> bool:
        """Whether a chunk is indexed under ``key``."""
        return key in self._rows

    def keys(self) -> set[str]:
        """The keys of all chunks."""
        with self._lock:
            return set(self._rows)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays in use: token ids, anchors and chunk table."""
        view = self._snapshot
        chunks = (view.tokens, view.starts, view.lengths, view.alive)
        return sum(
            part.nbytes for part in (*chunks, *(part for run in view.runs for part in run[:4]))
        )

    def add(self, key: str, token_ids: Sequence[int] | Ids) -> None:
        """Add a chunk. A known key is left as it is: a key stands for its token ids."""
        self.add_many([(key, token_ids)])

    def add_many(self, chunks: Iterable[tuple[str, Sequence[int] | Ids]]) -> None:
        """Add many chunks; several times faster than as many calls of ``add``."""
        for batch in self._batches(chunks):
            with self._lock:
                self._append(batch)

    def discard(self, key: str) -> None:
        """Remove a chunk, if it is there; its memory is given back after enough removals."""
        with self._lock:
            row = self._rows.pop(key, None)
            if row is None:
                return
            self._alive = self._alive.with_value(row, np.False_)
            self._dead_tokens += int(self._lengths.values[row])
            if self._is_sparse():
                self._compact()
            else:
                self._pass_over(row)
            self._publish()

    def locate(self, token_ids: Sequence[int] | Ids, *, min_tokens: int = 32) -> list[Match]:
        """All occurrences of indexed chunks in a prompt, as disjoint spans sorted by ``start``.

        Args:
            token_ids: the whole prompt.
            min_tokens: the shortest span to report, at least 16.

        Raises:
            ConfigError: ``min_tokens`` is below 16.
        """
        if min_tokens < ANCHOR_WIDTH:
            raise ConfigError(f"min_tokens is {min_tokens}; use at least {ANCHOR_WIDTH}")
        view = self._snapshot
        prompt = as_ids(token_ids)
        if len(prompt) < ANCHOR_WIDTH or not view.runs:
            return []
        windows = window_hashes(prompt)
        found = [find(run, windows) for run in view.runs]
        plain = plainly_there(view, prompt, found, min_tokens)
        if plain is not None:
            return plain
        return self._searched(view, prompt, windows, found, min_tokens)

    def _searched(
        self, view: Snapshot, prompt: Ids, windows: Hashes, found: list[Found], min_tokens: int
    ) -> list[Match]:
        """The same for any prompt.

        Args:
            windows: the prompt's; found: what each run has of them.
        """
        levels = hash_levels(windows, view.longest)
        parts = parts_of_chunks(view, prompt, found)
        wholes = whole_chunks(view, prompt, levels, found, min_tokens)
        spans = best_of_each_stretch(view, joined(parts, wholes), min_tokens)
        return resolve_overlaps(view, prompt, spans, min_tokens)

    def _publish(self) -> None:
        # What a snapshot covers never changes, but for Run.live_U: arrays and keys only grow
        # behind it.
        self._snapshot = Snapshot(
            self._tokens.values,
            self._starts.values,
            self._lengths.values,
            self._alive.values,
            self._keys,
            tuple(self._runs),
            self._longest,
        )

    def _batches(
        self, chunks: Iterable[tuple[str, Sequence[int] | Ids]]
    ) -> Iterator[dict[str, Ids]]:
        batch: dict[str, Ids] = {}
        num_tokens = 0
        for key, token_ids in chunks:
            if key in self._rows or key in batch:
                continue
            batch[key] = as_ids(token_ids)
            num_tokens += len(token_ids)
            if num_tokens >= _BATCH_TOKENS:
                yield batch
                batch, num_tokens = {}, 0
        yield batch

    def _append(self, batch: dict[str, Ids]) -> None:
        # Another thread may have added some of these since the batch was put together.
        fresh = {key: ids for key, ids in batch.items() if key not in self._rows}
        if not fresh:
            return
        tokens = np.concatenate(list(fresh.values()))
        lengths = np.fromiter(map(len, fresh.values()), np.int64, len(fresh))
        starts = exclusive_sum(lengths)
        first_row = len(self._keys)
        self._starts.extend(starts + len(self._tokens.values))
        self._tokens.extend(tokens)
        self._lengths.extend(lengths)
        self._alive.extend(np.ones(len(fresh), np.bool_))
        self._keys.extend(fresh)
        self._longest = max(self._longest, int(lengths.max()))
        self._add_entries(entries_of(tokens, starts, lengths, first_row))
        self._publish()
        self._rows.update(zip(fresh, range(first_row, len(self._keys)), strict=True))

    def _add_entries(self, entries: Entries) -> None:
        if not len(entries.hashes_A):
            return
        merged = [entries]
        num_entries = len(entries.hashes_A)
        while self._runs and len(self._runs[-1].rows_A) < max(_RUN_RATIO * num_entries, _SMALL_RUN):
            merged.insert(0, live_entries(self._runs.pop(), self._alive.values))
            num_entries += len(merged[0].hashes_A)
        joined = Entries(*map(np.concatenate, zip(*merged, strict=True)))
        self._runs.append(new_run(joined, self._lengths.values))

    def _pass_over(self, row: int) -> None:
        """Let no group of equal hashes begin with a dead row."""
        start, length = self._starts.values[row], self._lengths.values[row]
        tokens = self._tokens.values[start : start + length]
        hashes = np.unique(entries_of(tokens, np.zeros(1, np.int64), length[None], row).hashes_A)
        for run in self._runs:
            found = find(run, hashes)
            is_dead = ~self._alive.values[run.rows_A[found.firsts]]
            for slot, first, end in zip(*(c[is_dead].tolist() for c in found[1:]), strict=True):
                live = self._alive.values[run.rows_A[first:end]]
                run.table["first"][slot] = first + live.argmax() if live.any() else end

    def _is_sparse(self) -> bool:
        num_rows, num_tokens = len(self._keys), len(self._tokens.values)
        return 2 * len(self._rows) < num_rows or 2 * self._dead_tokens > num_tokens

    def _compact(self) -> None:
        alive, lengths = self._alive.values, self._lengths.values
        keys = [key for key, keep in zip(self._keys, alive, strict=True) if keep]
        self._keys, self._rows = keys, {key: row for row, key in enumerate(keys)}
        self._tokens = Growing(self._tokens.values[np.repeat(alive, lengths)])
        self._starts = Growing(exclusive_sum(lengths[alive]))
        self._lengths = Growing(lengths[alive])
        self._alive = Growing(np.ones(len(keys), np.bool_))
        self._dead_tokens = 0
        self._longest = int(self._lengths.values.max(initial=0))
        new_row = (np.cumsum(alive) - 1).astype(np.int32)
        kept = [live_entries(run, alive) for run in self._runs]
        self._runs = [
            new_run(entries._replace(rows_A=new_row[entries.rows_A]), self._lengths.values)
            for entries in kept
            if len(entries.rows_A)
        ]
