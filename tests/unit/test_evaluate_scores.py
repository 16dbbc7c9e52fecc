"""Scores by hand, results on disk, and tables of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cacheblend_rag.config import BlendConfig
from cacheblend_rag.errors import ConfigError, DataError
from cacheblend_rag.evaluate.base import Question
from cacheblend_rag.evaluate.coloured import page
from cacheblend_rag.evaluate.results import Answer, ResultFile, read_results
from cacheblend_rag.evaluate.rows import make_rows, parse_row, parse_selector, with_prefix
from cacheblend_rag.evaluate.score import (
    best,
    detectable,
    exact,
    f1,
    normalised,
    paired_interval,
    rouge_l,
)
from cacheblend_rag.evaluate.summary import summarise, to_dict, to_markdown, what_it_tells

SETTINGS = {"model": "m", "dtype": "float32"}


def test_f1_and_exact_match_are_squads() -> None:
    assert normalised("The  Cat, an owl!") == "cat owl"
    assert f1("the Eiffel Tower", "Eiffel tower") == 1.0
    assert f1("in Paris, France", "Paris") == pytest.approx(0.5)
    assert f1("Paris Paris", "Paris") == pytest.approx(2 / 3)
    assert f1("", "Paris") == 0.0
    assert f1("the", "a") == 1.0
    assert exact("An apple.", "apple") == 1.0
    assert best(f1, "Rome", ("Paris", "rome")) == 1.0
    assert best(f1, "Rome", ()) is None


def test_rouge_l() -> None:
    pytest.importorskip("rouge_score")
    assert rouge_l("the cat sat", "the cat sat down") == pytest.approx(6 / 7)


def test_intervals_hold_the_mean_and_shrink() -> None:
    draw = np.random.default_rng(1)
    few, many = (paired_interval(draw.normal(0.1, 1, n).tolist()) for n in (30, 3000))
    assert few.low < few.mean < few.high
    assert many.high - many.low < (few.high - few.low) / 5
    assert many.high - many.mean == pytest.approx(1.96 / math.sqrt(3000), rel=0.1)
    assert paired_interval([0.5, 0.5]) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="no difference"):
        paired_interval([])


def test_a_detectable_difference_is_found_four_times_in_five() -> None:
    draw = np.random.default_rng(5)
    scatter = draw.normal(0, 0.3, 400)
    least = detectable(scatter.tolist())
    assert least == pytest.approx(2.802 * scatter.std(ddof=1) / 20, rel=1e-3)
    found = 0
    for _ in range(1000):
        sample = draw.normal(least, 0.3, 400)
        found += abs(sample.mean()) > 1.96 * sample.std(ddof=1) / 20
    assert 0.76 < found / 1000 < 0.84
    assert detectable([0.1]) is None and detectable([0.2, 0.2, 0.2]) is None


def test_rows() -> None:
    rows = make_rows(
        ["query", "hkvd"], [0.1, 0.15], ["auto", "none"], ["query:window=33@0.15/prompt_prefix"]
    )
    assert [r.name for r in rows] == [
        "full", "prefix_caching", "ratio_1", "reuse", "reuse/none", "query@0.1", "query@0.15",
        "hkvd@0.1", "hkvd@0.15", "query@0.1~64", "query@0.15~64",
        "query:window=33@0.15/prompt_prefix",
    ]  # fmt: skip
    assert [r.prefix for r in rows[-2:]] == ["auto", "prompt_prefix"]
    assert rows[-1].options["selector_options"] == {"window": 33}
    assert rows[4].prefix == "none" and rows[4].options["mode"] == "reuse"
    assert all(r.options["blend_if"] == "always" for r in rows)
    assert [r.blends for r in rows[:4]] == [False, False, True, True]
    assert parse_selector("query:layers=[0.5,0.75]")[1] == {"layers": [0.5, 0.75]}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("qery@0.15", "selector"),
        ("query", "unknown"),
        ("query@much", "no ratio"),
        ("query:windw=3@0.1", "windw"),
        ("query:window@0.1", "name=value"),
        ("reuse/nothing", "ingest prefix"),
        ("reuse/neutral:x", "ingest prefix"),
    ],
)
def test_rows_that_do_not_exist(row: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_row(row)


class Letters:
    """A tokenizer of letters."""

    bos_token_id = None

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [ord(letter) for letter in text]


def test_prefixes_of_a_size() -> None:
    config = BlendConfig()
    got = with_prefix(config, "other_passages:7", Letters(), None, ["abc", "de", "f"])
    assert "".join(map(chr, got.ingest_prefix)) == "abc\n\nde"
    assert len(with_prefix(config, "neutral:3000", Letters(), None, ()).ingest_prefix) == 3000
    assert with_prefix(config, "bos", Letters(), None, ()).ingest_prefix == "bos"
    with pytest.raises(DataError, match="5 tokens together, fewer than 9"):
        with_prefix(config, "other_passages:9", Letters(), None, ["abc"])


def question(number: int, **changes: Any) -> Question:
    values = {"answers": ("Rome",), "set": "s", "question": "Q?", "passages": ("p",), **changes}
    return Question(id=str(number), **values)


def answer(number: int, row: str, text: str = "Rome", **changes: Any) -> Answer:
    values = {"set": "s", "tokens": 2, "tokens_total": 100, **changes}
    return Answer(id=str(number), row=row, text=text, **values)


def test_passages_are_cut_into_pieces_of_a_document() -> None:
    whole = question(1, passages=("T\na b c  d e\nf g", "h i j k", "l"))
    cut = whole.cut(4)
    assert cut.passages == ("T\na b c", "d e\nf g", "h i j k", "l")
    assert cut.left_context == (None, "T\na b c  ", None, None)
    assert (cut.id, cut.half) == (whole.id, whole.half)
    assert whole.cut(3).passages[:3] == ("T\na b", "c  d e", "f g")
    assert whole.cut(7).passages == whole.passages, "one word is less than half a piece"
    assert whole.cut(1).passages == tuple("Tabcdefghijkl")


def test_pieces_are_scattered_with_what_precedes_them() -> None:
    whole = question(1, passages=("a b c d e f g h", "i j"))
    cut = whole.cut(1, scatter=True)
    assert cut == whole.cut(1, scatter=True), "the same at every run"
    assert len(cut.passages) == 5 and list(cut.passages) != sorted(cut.passages)
    for piece, before in zip(cut.passages, cut.left_context, strict=True):
        known = "" if before is None else before
        assert any(passage.startswith(known + piece) for passage in whole.passages)


def write(path: Path, numbers: range, settings: dict[str, Any] = SETTINGS) -> Path:
    """Half of the answers of `query` are wrong, all of `hkvd`; the latter have twice the KL."""
    with ResultFile(path, settings) as file:
        for n in numbers:
            file.add_question(question(n))
            file.add([answer(n, "full", ttft_s=0.2)])
            wrong = "Paris" if n % 2 else "Rome"
            blended = {"tokens_reused": 90, "tokens_recomputed": 10, "chunks": [[60, 7], [40, 3]]}
            file.add([answer(n, "query@0.1", wrong, kl=[0.1, 0.3], same=1, ttft_s=0.1, **blended)])
            file.add([answer(n, "hkvd@0.1", "Oslo", kl=[0.4, 0.4], same=0, ttft_s=0.4, **blended)])
    return path


def test_a_summary(tmp_path: Path) -> None:
    results = read_results([write(tmp_path / "a.jsonl", range(10))])
    [summary] = summarise(results)
    full, query, hkvd = summary.rows
    assert (full.quality, query.quality, hkvd.quality) == (1.0, 0.5, 0.0)
    assert (query.agree, query.changed, query.top1) == (0.5, 0.5, 0.5)
    assert query.kl == pytest.approx(0.2) and hkvd.kl == pytest.approx(0.4)
    assert query.ratio == pytest.approx(0.1) and query.recomputed == 10
    assert query.speedup == pytest.approx(2.0)
    assert query.to_full["quality"].mean == -0.5
    assert query.to_hkvd["quality"].low > 0 > query.to_hkvd["kl"].high
    assert not hkvd.to_hkvd and not full.to_full
    text = to_markdown(results, [summary])
    assert "| query@0.1 | 0.500 |" in text and "(10.0%)" in text
    json.dumps(to_dict(results, [summary]))


def test_shards_are_joined_and_sets_pooled(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{i}.jsonl", range(i, 10, 2)) for i in (0, 1)]
    with ResultFile(paths[0], SETTINGS) as file:
        for n in (20, 21):
            file.add_question(question(n, set="t"))
        file.add([answer(20, row, set="t") for row in ("full", "query@0.1", "hkvd@0.1")])
        file.add([answer(21, "full", set="t")])
        file.add_skipped(question(22, set="t"), "too long")
        file.add_question(question(30, set="u"))
    s, t, u, both = summarise(read_results(paths))
    assert (u.set, u.questions, u.left_out, u.rows) == ("u", 0, 1, [])
    assert "### u (0 questions, 1 unfinished left out)" in to_markdown(read_results(paths), [u])
    assert (s.set, s.questions) == ("s", 10)
    assert (t.set, t.questions, t.left_out, t.skipped) == ("t", 1, 1, 1)
    assert (both.set, both.questions, both.rows[1].quality) == ("all", 11, 6 / 11)
    halves = [summarise(read_results(paths[:1]), split=h) for h in ("tune", "report")]
    assert sum(max(x.questions for x in half) for half in halves) == 6


def test_pools_and_what_their_questions_tell(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", range(8))
    with ResultFile(path, SETTINGS) as file:
        for name, right in (("t", "Rome"), ("u", "Oslo")):
            for n in range(4):
                file.add_question(question(n, set=name))
                file.add(
                    answer(n, row, right, set=name) for row in ("full", "query@0.1", "hkvd@0.1")
                )
    results = read_results([path])
    [*_, pool, whole] = summarise(results, pools={"two": ["s", "t"]})
    assert (pool.set, pool.questions, whole.set, whole.questions) == ("two", 12, "all", 16)
    rows = {row.row: row for row in pool.rows}
    assert rows["full"].detectable is None
    assert rows["query@0.1"].to_full["quality"].mean == pytest.approx(-4 / 12)
    differences = [-1.0] * 4 + [0.0] * 8
    assert rows["query@0.1"].detectable == detectable(differences)
    told = what_it_tells(pool)
    assert "12 questions" in told and f"{detectable(differences):.3f} (query@0.1)" in told
    assert told in to_markdown(results, [pool])
    [u] = [s for s in summarise(results) if s.set == "u"]
    assert "not known" in what_it_tells(u), "no answer differs: their scatter is not known"
    for pools, says in (
        ({"two": ["s", "v"]}, "has v; the sets of questions are s, t, u"),
        ({"s": ["t"]}, "the name of a set"),
    ):
        with pytest.raises(DataError, match=says):
            summarise(results, pools=pools)


def test_summaries_need_no_gold_answer(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with ResultFile(path, SETTINGS) as file:
        file.add_question(question(1, answers=()))
        file.add([answer(1, "full"), answer(1, "reuse", "Rome, Italy", kl=[0.5])])
    [summary] = summarise(read_results([path]))
    assert summary.rows[1].quality is None and summary.rows[1].agree == pytest.approx(2 / 3)


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", range(3))
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])  # the last answer was cut short
    with ResultFile(path, SETTINGS) as file:
        assert file.results.has(question(2), "query@0.1")
        assert not file.results.has(question(2), "hkvd@0.1")
        file.add_question(question(2))
        file.add([answer(0, "full", "another")])  # is there already: stays what it was
        file.add([answer(2, "hkvd@0.1", "Oslo")])
    assert summarise(read_results([path]))[0].questions == 3
    assert len(path.read_bytes().splitlines()) == len(whole.splitlines())
    path.write_bytes(b'{"type": "sett')
    with ResultFile(path, SETTINGS) as file:
        assert not file.results.asked
    assert read_results([path]).settings["model"] == "m"


def test_other_settings_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", range(3))
    with pytest.raises(DataError, match="dtype is 'bfloat16', was 'float32'"):
        ResultFile(path, {**SETTINGS, "dtype": "bfloat16"})
    other = write(tmp_path / "b.jsonl", range(3), {**SETTINGS, "model": "n"})
    with pytest.raises(DataError, match="other settings"):
        read_results([path, other])


@pytest.mark.parametrize(
    "content", ["hello\n", '{"type": "answer"}\n', '{"type": "poem"}\n', "[]\n"]
)
def test_what_is_no_result_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(DataError):
        read_results([path])
    with pytest.raises(DataError, match="cannot be read"):
        read_results([tmp_path / "absent.jsonl"])


def test_nothing_finished(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with ResultFile(path, SETTINGS) as file:
        file.add_question(question(1))
        file.add([answer(1, "full")])
        file.add_question(question(2))
        file.add([answer(2, "reuse")])
    with pytest.raises(DataError, match="no question is finished"):
        summarise(read_results([path]))


def test_the_page_marks_recomputed_tokens(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with ResultFile(path, SETTINGS) as file:
        file.add_question(question(1))
        file.add_tokens(question(1), ["a", " b", " <c>", " d"])
        file.add([answer(1, "full"), answer(1, "query@0.1", selected=[1, 2])])
    html = page(read_results([path]))
    assert "a<mark> b &lt;c&gt;</mark> d" in html and "Right: Rome" in html


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from cacheblend_rag.evaluate.plots import plot

    [summary] = summarise(read_results([write(tmp_path / "a.jsonl", range(4))]))
    files = plot(summary, tmp_path)
    assert [f.name for f in files] == ["s-ratio.png", "s-ttft.png"]
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in files)
