"""The scheduler's side of the shadow: which rows of a step are answers that were drawn, and what is
to be computed again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from cacheblend_rag.engine.blends import Scheduled
from cacheblend_rag.engine.link import Link
from cacheblend_rag.shadow import Drawn, ShadowJob

_MOST = 8  # requests that are watched at a time: the workers keep something of each token of theirs


class Watch(NamedTuple):
    """Of a step, for the workers.

    Attributes:
        rows: how many each of its requests has.
        tokens: of watched ones that sample in this step, the number of the answer's token.
    """

    rows: dict[str, int]
    tokens: dict[str, int]


class _Watched(NamedTuple):
    request: Any  # vLLM's own
    name: str
    ratio: float
    drawn: Drawn


class Watching:
    """The requests that are watched, from the moment that their blend begins to their end."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._watched: dict[str, _Watched] = {}

    def begin(self, request: Any, name: str, ratio: float, drawn: Drawn) -> bool:
        """A blend that was drawn begins, or begins again. Returns whether there is room for it."""
        key = request.request_id
        if key not in self._watched and len(self._watched) >= _MOST:
            return False
        self._watched[key] = _Watched(request, name, ratio, drawn)
        return True

    def has_any(self, names: Iterable[str]) -> bool:
        """Whether any of these requests is watched."""
        return bool(self._watched) and any(name in self._watched for name in names)

    def step(self, batch: Mapping[str, Scheduled]) -> Watch | None:
        """What the workers keep of a step of these requests; None: nothing."""
        tokens = {}
        for name, scheduled in batch.items():
            watched = self._watched.get(name)
            if watched is None:
                continue
            # The last row predicts the token behind it. A step that ends within the prompt samples
            # nothing.
            number = scheduled.computed + scheduled.known - watched.request.num_prompt_tokens
            if 0 <= number < watched.drawn.most_tokens:
                tokens[name] = number
        rows = {name: scheduled.rows for name, scheduled in batch.items()}
        return Watch(rows, tokens) if tokens else None

    def ended(self, request: Any, *, blended: bool) -> None:
        """A request ended: what it was answered is computed again, if it was watched."""
        watched = self._watched.pop(request.request_id, None)
        if watched is None or not blended:
            return
        answer = tuple(request.output_token_ids[: watched.drawn.most_tokens])
        if answer:
            prompt = tuple(request.prompt_token_ids)
            self._link.add_shadow(
                ShadowJob(
                    request_id=request.request_id,
                    name=watched.name,
                    token_ids=prompt + answer,
                    prompt_tokens=len(prompt),
                    ratio=watched.ratio,
                    drawn=watched.drawn,
                )
            )

    def take(self) -> list[ShadowJob]:
        """What is to be told with a step."""
        return [] if self._link.has_worker else self._link.take_shadows()
