r"""Writes ``docs/models.md`` from what the tests ran, and counts vLLM's recipes by it.

pytest tests/engine/test_families.py tests/engine/test_image_models.py -m "not gpu" \
    -o junit_family=xunit1 --junitxml=ran.xml
python scripts/models.py ran.xml > docs/models.md

Several files, of parts of the tests, count as one.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
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
from renamed import RENAMED  # noqa: E402
from tiny import FAMILIES, MORE_FAMILIES, SEEING, TEXT_OF  # noqa: E402

# names of one class of vLLM's
_SAME = {"InternS1ForConditionalGeneration": "InternVLForConditionalGeneration"}
_ON_CPU = {"gemma3n", "gemma4", "gemma4-moe"}  # blended by the CPU engine only
_CASE = re.compile(r"test_(family|more_families|renamed_families|text_blends)\[([^\]]+)\]")


class Recipe(NamedTuple):
    """A model of vLLM's recipes.

    Attributes:
        reason: why it can't be blended; empty if nothing says so.
        family: the one that stands for it, where those of an architecture differ.
    """

    name: str
    architecture: str
    reason: str = ""
    family: str = ""


class Tested(NamedTuple):
    """A family that passed, and its error at ratio 1."""

    architecture: str
    family: str
    error: str


def architecture_of(family: str, *, takes_images: bool) -> str:
    """What the configuration of a tiny model names. A family may have a model that takes images and
    one that does not.
    """
    if family in RENAMED:
        return RENAMED[family].architecture
    if takes_images:
        return str(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[family])
    kind = {**FAMILIES, **MORE_FAMILIES}[family][0]
    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])


def families() -> list[tuple[str, str]]:
    """Architecture and family of all models that the tests blend."""
    of_text, of_images = [*FAMILIES, *MORE_FAMILIES, *RENAMED], [*SEEING, *TEXT_OF]
    return sorted(
        (architecture_of(family, takes_images=sees), family)
        for sees, names in ((False, of_text), (True, of_images))
        for family in names
    )


def ran(path: Path) -> Iterator[Tested]:
    """Those of a report of pytest."""
    for case in ElementTree.parse(path).iter("testcase"):
        found = _CASE.fullmatch(case.get("name", ""))
        if found is None or case.find("failure") is not None or case.find("error") is not None:
            continue
        family, takes_images = found[2], found[1] == "text_blends"
        errors = [p.get("value", "") for p in case.iter("property") if p.get("name") == "ratio 1"]
        architecture = architecture_of(family, takes_images=takes_images)
        yield Tested(architecture, family, errors[0])


def recipes() -> list[Recipe]:
    """Those of ``recipes.tsv``."""
    lines = (HERE / "recipes.tsv").read_text().splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    return [Recipe(*row) for row in rows]


def verdict(recipe: Recipe, tested: Sequence[Tested]) -> str:
    """What becomes of a recipe."""
    if recipe.reason:
        return f"refused: `{Reason(recipe.reason)}`"
    served_by = _SAME.get(recipe.architecture, recipe.architecture)
    families = {one.family for one in tested if one.architecture == served_by}
    if recipe.family:
        families &= {recipe.family}
    if not families:
        return "not tested"
    of_images = {architecture_of(f, takes_images=True) for f in (*SEEING, *TEXT_OF)}
    of_images |= {model.architecture for model in RENAMED.values() if model.sees}
    if families <= _ON_CPU:
        return "blended on a CPU only"
    # Not all of these were run on a GPU.
    return "blended; on a GPU if its check passes" if served_by in of_images else "blended"


def page(tested: Sequence[Tested]) -> Iterator[str]:
    """The lines of the page."""
    yield "# Models\n"
    yield "Made by `python scripts/models.py` from a run of the tests; do not edit.\n"
    yield "## Blended\n"
    yield "Tiny models with random weights, float32, on a CPU: how far log-probabilities of four"
    yield "tokens are off at ratio 1, at most. At other ratios they are those of an independent"
    yield "reference, within 2e-4. Models that take images were given text; phi4mm was started with"
    yield "`language_model_only`. vLLM 0.32's CPU engine can't call the rotation of ernie4_5_vl_moe"
    yield "itself; the test mends that.\n"
    yield "Any other model is judged by its own check at the start: `cacheblend check MODEL`. It"
    yield "blends if moved keys, our attention and ratio 1 are right on this machine. Gemma 3n and"
    yield "Gemma 4 are blended by the CPU engine; a GPU refuses them. On an H200 with vLLM 0.26,"
    yield "latent attention (MLA), Llama 4 without experts, and as text Qwen2.5-VL, Qwen3-VL,"
    yield "Gemma 3 and InternVL were at ratio 1 as a full prefill. GLM-4V failed its check there,"
    yield "and is prefilled.\n"
    yield "Speculative decoding: [what is blended beside it](serving.md#speculative-decoding).\n"
    yield "| architecture | tested as | ratio 1 |\n| --- | --- | --- |"
    for one in sorted(set(tested)):
        yield f"| {one.architecture} | {one.family} | {one.error} |"
    yield "\n## vLLM's recipes\n"
    yield "The text models of vLLM's recipes by architecture (`scripts/recipes.tsv`).\n"
    yield "| | recipes | architectures |\n| --- | --- | --- |"
    found, names = Counter[str](), dict[str, set[str]]()
    for recipe in recipes():
        says = verdict(recipe, tested)
        found[says] += 1
        names.setdefault(says, set()).add(recipe.architecture)
    for says in sorted(found, key=lambda says: (not says.startswith("blended"), -found[says])):
        yield f"| {says} | {found[says]} | {', '.join(sorted(names[says]))} |"
    yield f"| together | {sum(found.values())} | |"


if __name__ == "__main__":
    print("\n".join(page([one for name in sys.argv[1:] for one in ran(Path(name))])))
