"""From an engine that prefills to one that decodes: what of a prompt's KV is blended.

Another connector carries the KV, and vLLM's proxies and routers hand the prefill's
``kv_transfer_params`` on to the engine that decodes. Ours say there from which token on KV is
approximate, and under which tag. The decoding engine hides the blocks behind it in its own prefix
cache, as the prefilling one did. So requests that want exact KV never find them, and the same
prompt, blended once, does. Who says nothing of KV that arrives is not trusted: all of it is hidden.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cacheblend_rag.engine.hashes import first_hidden, hide
from cacheblend_rag.plan import PARAMS_KEY

KEY = "handed_over"  # in our part of kv_transfer_params
_SENDS = "do_remote_decode"  # of vLLM's connectors: this engine prefills for another one
_ARRIVES = ("do_remote_prefill", "remote_block_ids")  # the KV of another engine


class HandOver(NamedTuple):
    """What is said of a prompt's KV.

    Attributes:
        start: the first token of a block that is not exact; None: all are.
        tag: what these blocks' hashes are changed by; the same for the same KV.
    """

    start: int | None
    tag: str = ""

    @property
    def detail(self) -> str:
        """As a sentence."""
        blended = "exact" if self.start is None else f"blended from token {self.start} on"
        return f"its KV came from another engine: {blended}"


def sent(request: Any, exact: Sequence[bytes], per_hash: int, approximate: int | None) -> Any:
    """What a request that ended tells the engine that goes on with it, as plain data; None where
    no engine does.

    Args:
        request: vLLM's own.
        exact: the hashes of its prompt's blocks before they were changed.
        per_hash: tokens a hash stands for.
        approximate: where its blend's first token is that is not exact; None: nowhere.
    """
    params = request.kv_transfer_params
    if not isinstance(params, Mapping) or not params.get(_SENDS):
        return None
    hidden = first_hidden(request, exact)
    if hidden is None and not exact and approximate is not None:
        hidden = approximate // per_hash  # this engine keeps no prefixes, the other may
    if hidden is None:
        return HandOver(None)._asdict()
    full = min(len(request.prompt_token_ids) // per_hash, len(request.block_hashes))
    # That of the last full block stands for all of the prompt before it, and for how it was
    # blended. Whoever found these blocks in this engine finds them in the other one too.
    tag = request.block_hashes[full - 1].hex() if hidden < full else uuid.uuid4().hex
    return HandOver(hidden * per_hash, tag)._asdict()


def arriving(params: Any) -> HandOver | None:
    """What is said of the KV that a request brings along; None where it brings none."""
    if not isinstance(params, Mapping):
        return None
    ours = params.get(PARAMS_KEY)
    info = ours.get(KEY) if isinstance(ours, Mapping) else None
    if info is None and not any(params.get(name) for name in _ARRIVES):
        return None
    return _read(info) or HandOver(0, uuid.uuid4().hex)


def _read(info: Any) -> HandOver | None:
    if not isinstance(info, Mapping) or info.keys() != {"start", "tag"}:
        return None
    start, tag = info["start"], info["tag"]
    if start is None:
        return HandOver(None)
    is_place = isinstance(start, int) and not isinstance(start, bool) and start >= 0
    return HandOver(start, tag) if is_place and isinstance(tag, str) and tag else None


def take(request: Any, given: HandOver, per_hash: int) -> None:
    """Hide the blocks of an arriving request that are not exact, before any is looked up."""
    if given.start is not None:
        hide(request, given.start // per_hash, given.tag)
