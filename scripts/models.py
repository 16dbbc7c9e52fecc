r"""Writes ``docs/models.md`` from what the tests ran, and counts vLLM's recipes by it.

pytest tests/engine/test_families.py tests/engine/test_image_models.py -m "not gpu" \
    -o junit_family=xunit1 --junitxml=ran.xml
python scripts/models.py ran.xml > docs/models.md
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from cacheblend_rag.reason import Reason

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests" / "helpers"))
from tiny import FAMILIES, MORE_FAMILIES  # noqa: E402

_CASE = re.compile(r"test_(family|more_families|text_blends)\[([^\]]+)\]")


class Recipe(NamedTuple):
    """A model of vLLM's recipes; ``reason`` says why it can't be blended, empty if nothing does."""

    name: str
    architecture: str
    reason: str


def ran(path: Path) -> Iterator[tuple[str, str, str]]:
    """Family, architecture and error at ratio 1 of each test that passed."""
    for case in ElementTree.parse(path).iter("testcase"):
        found = _CASE.fullmatch(case.get("name", ""))
        if found is None or case.find("failure") is not None or case.find("error") is not None:
            continue
        test, family = found.groups()
        if test == "text_blends":
            names = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
            kind = family
        else:
            names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
            kind = {**FAMILIES, **MORE_FAMILIES}[family][0]
        errors = [p.get("value", "") for p in case.iter("property") if p.get("name") == "ratio 1"]
        yield family, str(names[kind]), errors[0]


def recipes() -> list[Recipe]:
    """Those of ``recipes.tsv``."""
    lines = (HERE / "recipes.tsv").read_text().splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    return [Recipe(name, which, *(more or [""])) for name, which, *more in rows]


def page(path: Path) -> Iterator[str]:
    """The lines of the page."""
    tested = sorted(ran(path), key=lambda row: (row[1], row[0]))
    blended = {architecture for _, architecture, _ in tested}
    yield "# Models\n"
    yield "Made by `python scripts/models.py` from a run of the tests; do not edit.\n"
    yield "## Blended\n"
    yield "Tiny models with random weights, float32, on a CPU: how far log-probabilities of four"
    yield "tokens are off at ratio 1, at most. At other ratios they are those of an independent"
    yield "reference, within 2e-4.\n"
    yield "| architecture | tested as | ratio 1 |\n| --- | --- | --- |"
    for family, architecture, error in tested:
        yield f"| {architecture} | {family} | {error} |"
    yield "\n## vLLM's recipes\n"
    yield "Models of vLLM's recipes whose architectures are known (`scripts/recipes.tsv`).\n"
    yield "| | recipes | architectures |\n| --- | --- | --- |"
    found, names = Counter[str](), dict[str, set[str]]()
    for recipe in recipes():
        is_blended = recipe.architecture in blended and not recipe.reason
        verdict = "blended" if is_blended else recipe.reason or "not tested"
        found[verdict] += 1
        names.setdefault(verdict, set()).add(recipe.architecture)
    order = sorted(found, key=lambda verdict: (verdict != "blended", -found[verdict]))
    for verdict in order:
        says = verdict if verdict in ("blended", "not tested") else f"refused: `{Reason(verdict)}`"
        yield f"| {says} | {found[verdict]} | {', '.join(sorted(names[verdict]))} |"
    yield f"| together | {sum(found.values())} | |"


if __name__ == "__main__":
    print("\n".join(page(Path(sys.argv[1]))))
