"""What a request brings has to fit through the pipe to the workers, by which its step goes."""

from __future__ import annotations

import json
import pickle
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from cacheblend_rag.engine.params import check_params, drop_unwritable
from cacheblend_rag.reason import Reason

pytestmark = pytest.mark.vllm


def nested(levels: int) -> Any:
    return json.loads("[" * levels + "]" * levels)


def test_what_ends_vllms_engine_does_not_get_there() -> None:
    from vllm import SamplingParams

    given = {"cacheblend": {"mode": nested(900)}}
    sampling = SamplingParams(extra_args={"kv_transfer_params": given, "other": 1})
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)  # Python's own; torch raises it where it compiles
    try:
        with pytest.raises(RecursionError):
            pickle.dumps(sampling)  # as vLLM hands a new request to its workers
    finally:
        sys.setrecursionlimit(limit)
    request = SimpleNamespace(kv_transfer_params=given, sampling_params=sampling)
    why = drop_unwritable(request)
    assert why is not None and why.reason is Reason.MALFORMED_OPTIONS and "levels" in why.detail
    assert pickle.loads(pickle.dumps(sampling)).extra_args == {"other": 1}


@pytest.mark.parametrize(
    "given", [None, {}, {"a": [[1] * 9, {"b": "c"}]}, {"a": nested(15)}, {"do_remote": True}]
)
def test_what_can_be_sent_stays(given: Any) -> None:
    sampling = SimpleNamespace(extra_args={"kv_transfer_params": given})
    request = SimpleNamespace(kv_transfer_params=given, sampling_params=sampling)
    assert drop_unwritable(request) is None and request.kv_transfer_params is given
    assert sampling.extra_args == {"kv_transfer_params": given}


@pytest.mark.parametrize(
    "given", [5, [], {"a": nested(16)}, {"\udfff": 1}, {"a": [{"b": "\ud800"}]}]
)
def test_what_can_not_is_told(given: Any) -> None:
    with pytest.raises(ValueError, match="kv_transfer_params"):
        check_params(given)
