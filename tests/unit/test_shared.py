"""One engine for all that name a model."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from cacheblend_rag import BlendConfig, ClosedError, ConfigError
from cacheblend_rag.shared import SharedEngine


class Started:
    """In place of a CacheBlend: counts how many there are."""

    def __init__(self, count: list[int], **settings: Any) -> None:
        count.append(1)
        self.settings, self.closed = settings, False

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Any:
    started: list[int] = []
    monkeypatch.setattr(
        "cacheblend_rag.shared.CacheBlend", lambda model, **s: Started(started, model=model, **s)
    )
    yield started
    SharedEngine.close_all()


def test_one_model_has_one_engine_in_any_spelling(count: list[int], tmp_path: Path) -> None:
    spelled = [tmp_path, str(tmp_path), tmp_path / ".." / tmp_path.name]
    shared = [SharedEngine.for_model(model) for model in spelled]
    assert shared[0] is shared[1] is shared[2]
    assert SharedEngine.for_model("other/model") is not shared[0]
    assert count == []


def test_many_threads_start_it_once(count: list[int]) -> None:
    shared = SharedEngine.for_model("a/b", engine_args={"max_model_len": 7})
    barrier, seen = threading.Barrier(16), []

    def ask() -> None:
        barrier.wait()
        seen.append(shared.blend())

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(count) == 1
    assert len({id(blend) for blend in seen}) == 1
    assert seen[0].settings["max_model_len"] == 7  # type: ignore[attr-defined]


def test_other_settings_are_refused_unless_left_out(count: list[int]) -> None:
    shared = SharedEngine.for_model("a/b", BlendConfig(recompute_ratio=0.3), {"seed": 1})
    assert SharedEngine.for_model("a/b") is shared
    assert SharedEngine.for_model("a/b", BlendConfig(recompute_ratio=0.3), {"seed": 1}) is shared
    with pytest.raises(ConfigError, match="engine_args"):
        SharedEngine.for_model("a/b", engine_args={"seed": 2})
    with pytest.raises(ConfigError, match="recompute_ratio"):
        SharedEngine.for_model("a/b", BlendConfig())


def test_closing_is_for_all_and_for_good(count: list[int]) -> None:
    shared = SharedEngine.for_model("a/b")
    blend: Any = shared.blend()
    shared.close()
    shared.close()
    assert blend.closed
    with pytest.raises(ClosedError, match="make a new object"):
        shared.blend()
    assert SharedEngine.for_model("a/b") is not shared


def test_what_was_never_started_and_is_gone_stands_in_nobody_s_way(count: list[int]) -> None:
    SharedEngine.for_model("a/b", engine_args={"seed": 1})
    shared = SharedEngine.for_model("a/b", engine_args={"seed": 2})
    shared.blend()
    del shared
    with pytest.raises(ConfigError, match="engine_args"):  # while what runs stays
        SharedEngine.for_model("a/b", engine_args={"seed": 1})


def test_a_failed_start_can_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[int] = []

    def start(model: str, **_: Any) -> Any:
        tries.append(1)
        if len(tries) == 1:
            raise ConfigError("not today")
        return Started([])

    monkeypatch.setattr("cacheblend_rag.shared.CacheBlend", start)
    shared = SharedEngine.for_model("a/b")
    with pytest.raises(ConfigError, match="not today"):
        shared.blend()
    assert shared.blend()
    shared.close()


def test_copies_and_pickles_are_itself(count: list[int]) -> None:
    shared = SharedEngine.for_model("a/b", BlendConfig(selector_options={}))
    assert copy.copy(shared) is copy.deepcopy(shared) is shared
    assert pickle.loads(pickle.dumps(shared)) is shared


def test_a_pickle_in_another_process_is_an_engine_of_its_own(count: list[int]) -> None:
    shared = SharedEngine.for_model("a/b", BlendConfig(recompute_ratio=0.3), {"seed": 1})
    code = """
import pickle, sys
shared = pickle.load(sys.stdin.buffer)
print(shared.model, shared.config.recompute_ratio, shared.started)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(shared), capture_output=True, check=True
    )
    assert done.stdout.decode().split() == ["a/b", "0.3", "False"]


def _use(shared: SharedEngine) -> str:
    try:
        shared.blend()
    except ConfigError as error:
        return str(error)
    return "started"


def test_a_pickle_around_an_engine_of_another_process_says_so(count: list[int]) -> None:
    blend: Any = Started([])
    blend.info, blend.config = type("Info", (), {"model": "a/b"}), BlendConfig()
    shared = SharedEngine.from_running(blend)
    assert SharedEngine.from_running(blend) is shared
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert "from_engine()" in pool.apply(_use, (shared,))
