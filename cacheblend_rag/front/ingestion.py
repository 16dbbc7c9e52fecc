"""From texts to stored KV."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from tqdm import tqdm

from cacheblend_rag import ingest
from cacheblend_rag.errors import (
    CacheBlendError,
)
from cacheblend_rag.front.documents import Documents
from cacheblend_rag.ingest import Chunk, IngestReport, LeftContext, Owners
from cacheblend_rag.prefix import document_context
from cacheblend_rag.undo import on_failure


class Ingestion(Documents):
    """Computes and stores the KV of chunks."""

    def ingest(
        self,
        texts: str | Sequence[str | Sequence[int]],
        *,
        left_context: str | Sequence[LeftContext] | None = None,
        documents: str | Sequence[str | None] | None = None,
        progress: bool = True,
    ) -> IngestReport:
        """Compute and store the KV of chunks. What is stored already is skipped, so an interrupted
        or repeated ingestion costs only look-ups. Texts that are too short or too long for their KV
        to be used are passed over, and counted.

        Args:
            texts: the chunks, or their token ids.
            left_context: of each, what stands before it in its own document (text or token ids, the
                last of which are taken), or None; for ``ingest_prefix="document"``. It is no part
                of a chunk's key: of equal chunks, the KV of the first that was stored stays.
            documents: of each, the document (any text) that it belongs to, or None; noted as
                ``register_documents`` does, as soon as it is stored.
            progress: a bar while KV is computed.

        Raises:
            ConfigError: ``left_context`` with another ingest prefix.
            PromptError: something that is no text, named by its number; ``left_context`` or
                ``documents`` not one for each text. Nothing was computed then.
            EmptyTextError: a text of white space only; as above.
            StoreError: the store can't be written; what was stored so far stays, and is used.
        """
        self._check_open()
        start = time.perf_counter()
        given = ingest.as_list(texts)
        contexts = ingest.for_each(given, left_context, self.config.ingest_prefix)
        names = ingest.document_for_each(given, documents)
        if not self.model_check.passed:
            return IngestReport(
                chunks=len(given), reason=self.model_check.reason, detail=self.model_check.detail
            )
        chunks = self._numbered(given)
        placed = contexts if left_context is not None else None
        return self._ingest_chunks(chunks, placed, names, progress=progress, start=start)

    def _ingest_chunks(
        self,
        chunks: Sequence[Chunk],
        contexts: Sequence[LeftContext] | None,
        documents: Sequence[str | None],
        *,
        progress: bool,
        start: float,
    ) -> IngestReport:
        most = min(self.info.max_model_len, self._positions - len(self._space.prefix_ids))
        sorted_out = ingest.by_length(chunks, self.config.min_chunk_tokens, most)
        new = ingest.distinct(sorted_out.useful)
        todo = self._missing(new)
        if contexts is not None:
            todo = self._in_context(todo, chunks, contexts)
        owners = ingest.owners(chunks, documents)
        absent = {c.key for c in todo}
        self._note([c for c in new if c.key not in absent], owners)
        stored, not_stored = self._compute(todo, owners, progress)
        useful = {c.key for c in new}
        return IngestReport(
            chunks=len(chunks),
            computed=len(todo),
            present=len(new) - len(todo),
            repeated=len(sorted_out.useful) - len(new),
            too_short=sorted_out.too_short,
            too_long=sorted_out.too_long,
            not_stored=not_stored,
            tokens=sum(len(c.token_ids) for c in todo),
            bytes=stored,
            seconds=time.perf_counter() - start,
            keys=[c.key if c.key in useful else "" for c in chunks],
        )

    def _missing(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """Chunks that are not stored: of ranks with memory of their own, in that of any."""
        absent, present = set[str](), set[str]()
        keys = [c.key for c in chunks]
        for i in range(0, len(keys), 1000):
            for of_rank in self._ask_stores("cacheblend_missing", keys[i : i + 1000]):
                absent.update(of_rank)
                present.update(set(keys[i : i + 1000]).difference(of_rank))
        if self._space.by_document and (parts := absent & present):
            # what is left of them may have been computed behind another document
            self._engine.rpc("cacheblend_forget", list(parts))
        return [c for c in chunks if c.key in absent]

    def _in_context(
        self, todo: Sequence[Chunk], chunks: Sequence[Chunk], left_context: Sequence[LeftContext]
    ) -> list[Chunk]:
        """Those to do among ``chunks``, each with what stands before it in its document."""
        prompt_prefix = self._prompt_prefix_ids(timeless=True)
        neutral = self._space.prefix_ids[len(prompt_prefix) :]
        first = {chunk.key: i for i, chunk in reversed(list(enumerate(chunks)))}
        placed = []
        for chunk in todo:
            number = first[chunk.key]
            with ingest.naming(f"left_context, text {number + 1} of {len(left_context)}"):
                context = document_context(left_context[number], neutral, self._tokenizer)
                if context:
                    self._check_vocabulary(context)
            placed.append(chunk._replace(context=context))
        return placed

    def _compute(
        self, chunks: Sequence[Chunk], owners: Owners, progress: bool
    ) -> tuple[int, dict[str, str]]:
        """Prefill and store; the bytes stored, and why what key was not stored."""
        prefix, stored, not_stored = self._space.prefix_ids, 0, dict[str, str]()
        with tqdm(
            total=len(chunks), desc="ingest", unit="chunk", disable=not (progress and chunks)
        ) as bar:
            for batch in ingest.batches(chunks, self.info.max_num_batched_tokens):
                with on_failure(partial(self._note_stored, batch, owners)):
                    ranks = self._ingest(batch, prefix)
                self._note(batch, owners)
                for nbytes, refused in ranks:
                    stored += nbytes
                    not_stored |= refused
                bar.update(len(batch))
        return stored, not_stored

    def _note(self, chunks: Sequence[Chunk], owners: Owners) -> None:
        """From here on these chunks are found in prompts, and forgotten with their documents."""
        self._sync()
        self.register_documents(ingest.by_document(chunks, owners))

    def _note_stored(self, batch: Sequence[Chunk], owners: Owners) -> None:
        """``_note`` those of a batch that were stored before it failed."""
        with suppress(CacheBlendError):  # what failed may fail here too, and is raised in any case
            ranks = self._ask_stores("cacheblend_missing", [c.key for c in batch])
            absent = set(itertools.chain.from_iterable(ranks))
            self._note([c for c in batch if c.key not in absent], owners)
