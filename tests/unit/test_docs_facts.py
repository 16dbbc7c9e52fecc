"""What README and docs say of options, endpoints, limits and figures is what the code has, and
pages do not contradict one another.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from cacheblend_rag import BlendConfig, keys
from cacheblend_rag.engine import compat
from cacheblend_rag.evaluate import calibrate
from cacheblend_rag.learn.options import LearnOptions
from cacheblend_rag.options import PER_CALL
from cacheblend_rag.server import routes
from cacheblend_rag.store.url import _OPTIONS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def rows(text: str, header: str) -> list[list[str]]:
    """Cells of the table that has this header."""
    lines = text[text.index(header) :].splitlines()[2:]
    table = lines[: next((i for i, line in enumerate(lines) if not line.startswith("|")), None)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_the_readme_has_the_options_defaults() -> None:
    table = rows(README, "| option | what it does | default |")
    found = {name.strip("`"): default.strip("`") for name, _, default in table}
    defaults = {f.name: f.default for f in fields(BlendConfig)}
    assert found == {name: str(defaults[name]) for name in found}
    *per_call, last = found
    assert set(per_call) <= set(PER_CALL) and last not in PER_CALL
    assert f"All options here but `{last}` can also be set for one call" in " ".join(README.split())


def test_the_table_of_endpoints_is_whole() -> None:
    table = " ".join(row[0] for row in rows(page("serving.md"), "| endpoint | does |"))
    shown = set[tuple[str, str]]()
    for group in re.findall(
        r"`((?:GET|POST|PUT|DELETE)(?:`, `\w+)*) ([^`]+)`((?:, `[^`]+`)*)", table
    ):
        methods, path, others = group
        paths = [path.partition("?")[0], *re.findall(r"`\.\.\.([^`]+)`", others)]
        paths[1:] = [paths[0] + more for more in paths[1:]]
        shown |= {(m.strip("`, "), p) for m in methods.split("`, `") for p in paths}
    served = {
        (method, re.sub(r":path|key(?=})", lambda m: "" if m[0] == ":path" else "id", route.path))
        for route in routes.router.routes
        for method in getattr(route, "methods", ())
        if not route.path.endswith("{rest:path}")
    }
    assert {(m, p.replace("{key}", "{id}")) for m, p in shown} == {
        (m, p) for m, p in served if m in ("GET", "POST", "PUT", "DELETE")
    }


def test_contributors_are_told_of_every_verb() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):(?!=)", makefile, re.MULTILINE))
    named = set(re.findall(r"`make ([a-z-]+)", (ROOT / "CONTRIBUTING.md").read_text()))
    assert len(targets) > 10
    assert targets - named == {"help"}


def test_the_table_of_learning_has_its_defaults() -> None:
    table = rows(page("serving.md"), "| option | meaning | default |")
    found = {name.strip("`"): value.replace(",", "") for name, _, value in table}
    defaults = {f.name: f.default for f in fields(LearnOptions)}
    assert {n: float(v) if n != "capacity" else v for n, v in found.items()} == defaults


def test_the_pages_of_the_store_name_format_and_options() -> None:
    design = page("store_design.md")
    assert f"The format of stored chunks is number {keys.FORMAT}." in design
    assert (
        f"<folder>/v{keys.FORMAT}/" in design and f"`cacheblend/v{keys.FORMAT - 1}/...`" in design
    )
    named = set(re.findall(r"`(\w+)(?:=[^`]*)?`", page("store.md")))
    assert set().union(*_OPTIONS.values()) <= named
    table = [row[0] for row in rows(page("store.md"), "| URL | where | options of its own |")]
    schemes = set(re.findall(r"`(\w+)://", " ".join(table)))
    assert schemes == _OPTIONS.keys()


def test_versions_are_those_that_are_accepted() -> None:
    oldest, newest = (".".join(map(str, v)) for v in (compat.OLDEST, compat.NEWEST))
    assert f"vLLM {oldest} to {newest}]" in README
    assert f"{oldest} to {newest}, and what differs" in page("architecture.md")


def test_calibration_asks_in_as_many_ways() -> None:
    text, ways = page("evaluation.md"), 2 * (len(calibrate._RATIOS) + len(calibrate._COVERAGES))
    assert ways == 20 and "in twenty ways: `query` at six ratios and four coverages" in text
    assert (len(calibrate._RATIOS), len(calibrate._COVERAGES)) == (6, 4)


def test_extras_that_pages_install_are_there() -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = README + "".join(p.read_text() for p in (ROOT / "docs").glob("*.md"))
    groups = re.findall(r"(?:cacheblend-rag|'\.|`)\[([a-z0-9,-]+)\](?=['`])", text)
    named = {extra for group in groups for extra in group.split(",")}
    assert {"cuda", "cpu", "cli", "redis"} <= named <= known.keys()


# --- figures --------------------------------------------------------------------------------------


def test_speed_is_the_same_on_all_pages() -> None:
    results = rows(page("results.md"), "| chunks x tokens | full prefill | naive reuse |")
    measured = dict[str, tuple[str, str, str]]()
    for size, full, *_, blended in results:
        found = re.fullmatch(r"([\d,]+) ms \(([\d.]+)x\)", blended)
        assert found
        ms, times = found.groups()
        of_full, of_blend = float(full.removesuffix(" ms").replace(",", "")), float(ms)
        most, least = (of_full + 0.5) / (of_blend - 0.5), (of_full - 0.5) / (of_blend + 0.5)
        assert least - 0.05 <= float(times) <= most + 0.05
        measured[size] = (full, f"{ms} ms", f"{times}x")
    table = rows(README, "| machine, model shape | chunks x tokens |")
    assert {size: tuple(rest) for _, size, *rest in table} == measured
    gain = re.search(
        r"of 512 tokens gains ([\d.]+x), of 1,024 tokens ([\d.]+x)", page("serving.md")
    )
    assert gain and gain.groups() == (measured["6 x 512"][2], measured["6 x 1,024"][2])


def test_quality_is_the_same_on_both_pages() -> None:
    quality = page("quality.md")
    large = {r[0]: r[1:] for r in rows(quality, "| | F1 | difference to the full prefill |")}
    small = {r[0].strip("*"): r[1] for r in rows(quality, "| | SmolLM2 135M | Gemma 3 270M |")}
    named = {
        "**the default** (`query`, propagation length 64)": (
            "**`query` 0.15, propagation length 64: the default**",
            "the default",
        ),
        "CacheBlend's selection (`hkvd`)": ("`hkvd` 0.15 (CacheBlend)", "`hkvd` (CacheBlend)"),
        'naive reuse (`mode="reuse"`)': ("naive reuse", "naive reuse"),
    }
    kinds = rows(quality, "| | questions | full prefill | default, 0.15 |")
    several = {r[0]: r[1:] for r in kinds}["several passages"]
    of_several = dict(zip(named, (several[2], several[4], several[5]), strict=True))
    assert f"over several passages ({several[1]})" in README
    assert f"{several[0]} over several passages" in README
    table: dict[str, Any] = {r[0]: r[1:] for r in rows(README, "| | recomputed | F1, 1.5B model")}
    assert table.keys() == named.keys()
    for name, (of_large, of_small) in named.items():
        f1, difference, _, changed, kl = large[of_large]
        assert table[name][1:4] == [f"{f1} ({difference})", changed, kl]
        assert table[name][5] == of_several[name]
        assert float(table[name][4]) == pytest.approx(
            float(small[of_small]), abs=0.00051
        )  # rounded
    assert f"(full prefill {large['full prefill'][0]})" in README
