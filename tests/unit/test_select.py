"""Selectors on a few tokens by hand."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cacheblend_rag import BlendConfig
from cacheblend_rag.errors import ConfigError
from cacheblend_rag.select import (
    GROUP,
    SELECTORS,
    Evidence,
    KVDeviation,
    QuestionAttention,
    create_selector,
    selectors,
)


def evidence(**known: Any) -> Evidence:
    """Two chunks of four tokens, a fresh token between them."""
    candidate = torch.tensor([1, 1, 1, 1, 0, 1, 1, 1, 1], dtype=torch.bool)
    offset = torch.tensor([0, 1, 2, 3, 0, 0, 1, 2, 3])
    return Evidence(candidate, offset, torch.arange(9), **known)


def chosen(name: str, count: int, found: Evidence, **options: object) -> set[int]:
    selector = create_selector(name, options)
    found = replace(found, budget=found.budget or count)
    return set(selector.choose(found, selector.score(found)).tolist())


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("query", {"window": 9.0}, "whole number"),
        ("query", {"window": True}, "must be a number"),
        ("query", {"window": "9"}, "must be a number"),
        ("query", {"window": math.inf}, "whole number"),
        ("query", {"window": 2**61 + 1}, "below"),
        ("query", {"first_share": True}, "must be a number"),
        ("query", {"coverage": math.nan}, "share"),
        ("query", {"coverage": None}, "must be a number"),
        ("query", {"layers": "ab"}, "layers|not supported"),
        ("query", {"layers": [0.5]}, "unpack"),
        ("random", {"seed": 2**64}, "below"),
        ("random", {"seed": "x"}, "must be a number"),
        ("hkvd", {"check_layer": 1.5}, "whole number"),
    ],
)
def test_options_that_a_worker_could_not_use(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        create_selector(name, options)


def test_query_takes_neighbours_and_ignores_fresh_tokens() -> None:
    attention = torch.tensor([0.0, 0, 0, 0, 9, 0, 0, 1, 0])
    assert chosen("query", 3, evidence(question_N=attention), window=3, first_share=0.0) == {
        6,
        7,
        8,
    }
    assert 7 in chosen("query", 1, evidence(question_N=attention), window=1, first_share=0.0)


def test_first_tokens_come_before_every_other_however_low_all_scores_are() -> None:
    attention = torch.tensor([0.0, 0.1, 0.3, 0, 0, 0, 0, 0.2, 0])
    found = replace(evidence(question_N=attention), budget=4)
    score = create_selector("query", {"window": 1, "first_share": 0.5}).score(found)
    assert min(score[0], score[5]) > score[2]


def test_query_gives_a_share_to_first_tokens() -> None:
    attention = torch.tensor([0.0, 0, 9, 8, 0, 0, 0, 0, 7])
    found = evidence(question_N=attention, budget=5)
    assert chosen("query", 5, found, window=1, first_share=0.4) == {0, 5, 2, 3, 8}
    assert chosen("query", 5, found, window=1, first_share=0.6) == {0, 5, 1, 2, 3}
    assert chosen("query", 5, found, window=1, first_share=1.0) == {0, 5, 1, 6, 2}


def test_query_is_content_with_what_covers_its_attention() -> None:
    attention = torch.tensor([0.0, 0, 5, 0, 9, 3, 1.5, 0.5, 0])  # 9 is fresh: no candidate
    found = evidence(question_N=attention, budget=4)
    for coverage, count in ((0.5, 1), (0.51, 2), (0.8, 2), (0.9, 3), (1.0, 4)):
        options = {"window": 1, "coverage": coverage, "first_share": 0.0}
        selector = create_selector("query", options)
        picked = selector.choose(found, selector.score(found))
        assert picked.tolist() == [2, 5, 6, 7][:count], coverage
    tight = evidence(question_N=attention, budget=1)
    selector = create_selector("query", {"window": 1, "coverage": 0.9, "first_share": 0.0})
    assert selector.choose(tight, selector.score(tight)).tolist() == [2]


def test_query_layers() -> None:
    wanted = create_selector("query").evidence
    assert isinstance(wanted, QuestionAttention)
    assert list(wanted.range(32)) == list(range(16, 24))
    assert list(wanted.range(1)) == [0]


@pytest.mark.parametrize(
    ("pattern", "asked"),
    [
        ("GGGGGGGG", (4, 5)),
        ("LGLGLGLG", (5,)),
        ("LLLLGLLL", (4,)),
        ("LLLGLLLL", (3,)),
        ("LLGLLLLG", (7,)),  # as far as layer 2, and later
        ("LGLLLLLL", (1,)),
        ("LLLLLLLL", (4, 5)),
        ("G", (0,)),
        ("GLLL", (0,)),
    ],
)
def test_the_question_is_asked_where_all_is_seen(pattern: str, asked: tuple[int, ...]) -> None:
    wanted = QuestionAttention((1 / 2, 3 / 4))
    assert wanted.among([kind == "G" for kind in pattern]) == (asked, 0)


def test_the_question_sees_the_context_at_the_latest_where_it_is_summed() -> None:
    everywhere = [True] * 32
    for sees_from, first in ((0.0, 0), (0.25, 8), (0.5, 16), (1.0, 16)):
        asked = QuestionAttention((1 / 2, 3 / 4), sees_from).among(everywhere)
        assert asked == (tuple(range(16, 24)), first)
        assert asked.reading == range(first, 24)
    few = QuestionAttention((1 / 2, 3 / 4), 1.0).among([i == 2 for i in range(8)])
    assert few == ((2,), 2), "the nearest layer that sees all stands lower"


def test_hkvd_asks_for_what_its_options_say() -> None:
    assert create_selector("hkvd").evidence == KVDeviation(1, values=False)
    options = {"check_layer": 3, "deviation": "kv"}
    assert create_selector("hkvd", options).evidence == KVDeviation(3, values=True)


def test_hkvd_takes_the_largest_deviation() -> None:
    deviation = torch.tensor([0.0, 5, 0, 0, 99, 0, 0, 4, 0])
    assert chosen("hkvd", 2, evidence(deviation_N=deviation)) == {1, 7}


def test_first_k_shares_the_budget_over_chunks() -> None:
    assert chosen("first_k", 4, evidence()) == {0, 1, 5, 6}


def test_random_is_repeatable_and_seeded() -> None:
    a, b = (chosen("random", 4, evidence(), seed=1) for _ in range(2))
    assert a == b
    assert any(chosen("random", 4, evidence(), seed=s) != a for s in range(2, 6))


def test_budgets() -> None:
    query = create_selector("query")
    assert query.budget(0.0, 100) == 0
    assert query.budget(0.15, 100) == 15
    assert query.budget(0.15, 101) == 16
    assert query.budget(1.0, 100) == 100
    assert create_selector("none").budget(1.0, 100) == 0
    assert create_selector("all").budget(0.0, 100) >= 100


@pytest.mark.parametrize("name", SELECTORS)
def test_unknown_options_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="has no option nonsense"):
        create_selector(name, {"nonsense": 1})


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("query", {"window": 0}, "window must be odd and positive, got 0"),
        ("query", {"window": 4}, "window must be odd and positive, got 4"),
        ("query", {"layers": (0.5, 0.5)}, "layers must be two shares"),
        ("query", {"layers": (0.5, 1.5)}, "layers must be two shares"),
        ("query", {"layers": 3}, "selector 'query'"),
        ("query", {"first_share": 1.5}, "first_share must be a share, 0 to 1, got 1.5"),
        ("query", {"coverage": 0}, "coverage must be a share above 0, up to 1, got 0"),
        ("query", {"coverage": 1.5}, "coverage must be a share above 0, up to 1, got 1.5"),
        ("hkvd", {"deviation": "v"}, "deviation must be 'k' or 'kv', got 'v'"),
        ("hkvd", {"check_layer": 0}, "check_layer must be at least 1: layer 0 has no deviation"),
        ("query", {"spread": 1}, "spread"),
        ("nobody", {}, "nobody"),
    ],
)
def test_values_that_make_no_sense_are_refused(
    name: str, options: dict[str, object], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        create_selector(name, options)


def test_the_ends_of_ranges_are_values_that_make_sense() -> None:
    ends = {"layers": (0, 1), "first_share": 1, "coverage": 1, "window": 1}
    assert create_selector("query", ends) == create_selector("query", dict(ends))


def test_lists_such_as_json_has_are_taken_for_tuples() -> None:
    made = create_selector("query", {"layers": [0.25, 0.5]})
    assert made == create_selector("query", {"layers": (0.25, 0.5)})
    assert hash(made) == hash(create_selector("query", {"layers": (0.25, 0.5)}))


def test_an_unknown_option_is_named_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="coverage, first_share, layers, sees_from, window"):
        create_selector("query", {"no": 1})
    with pytest.raises(ConfigError, match="it has none"):
        create_selector("all", {"no": 1})


# ---- of other packages ---------------------------------------------------------------------------

THEIRS = """
from dataclasses import dataclass
from typing import ClassVar
from cacheblend_rag.select import Selector

@dataclass(frozen=True, kw_only=True)
class Last(Selector):
    name: ClassVar[str] = "last"
    skip: int = 0

    def score(self, evidence):
        return evidence.offset_N.float()

@dataclass(frozen=True, kw_only=True)
class Query(Last):
    name: ClassVar[str] = "query"

class Other: ...
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Puts a package of somebody else's onto the path, with these entry points."""

    def add(points: str) -> None:
        (tmp_path / "theirs.py").write_text(THEIRS)
        folder = tmp_path / "theirs-1.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Name: theirs\nVersion: 1\n")
        (folder / "entry_points.txt").write_text(f"[{GROUP}]\n{points}\n")
        monkeypatch.syspath_prepend(tmp_path)
        selectors.cache_clear()

    yield add
    sys.modules.pop("theirs", None)
    selectors.cache_clear()


def test_an_installed_package_brings_a_selector(install: Callable[[str], None]) -> None:
    install("last = theirs:Last\nquery = theirs:Query")
    assert create_selector("last", {"skip": 2}).name == "last"
    assert BlendConfig(selector="last").selector == "last"
    assert type(create_selector("query")) is SELECTORS["query"], "ours stays"
    with pytest.raises(ConfigError, match="one of"):
        create_selector("best")


@pytest.mark.parametrize(
    ("points", "says"),
    [
        ("last = theirs:Missing", "can't be imported"),
        ("last = nowhere:Last", "can't be imported"),
        ("other = theirs:Other", "must be a Selector"),
        ("first = theirs:Last", "with that name"),
    ],
)
def test_what_is_no_selector_is_told(
    install: Callable[[str], None], points: str, says: str
) -> None:
    install(points)
    with pytest.raises(ConfigError, match=says):
        create_selector("last")
    assert create_selector("query").name == "query"
