"""What README and docs say of commands, files and figures is so; how they run is tested in
tests/integrations/test_documented_code.py.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from benchmark import script
from tiny import FAMILIES

from cacheblend_rag.cli.main import _parser

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
_PROGRAM = r"(?:PYTHONPATH=\S+ )?(?:cacheblend|make|python) "
SHARED = ("shapes.py", "plots.py", "serving.py")  # whose options other benchmarks take
LINE = re.compile(rf"^(?:    )?({_PROGRAM}[^#\n]*)", re.MULTILINE)  # of a block, up to a comment
INLINE = re.compile(rf"`({_PROGRAM}[^`]*)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def ids(page: Path) -> str:
    return page.name


def commands(program: str, *patterns: re.Pattern[str]) -> list[str]:
    """Every command of this program that a page shows, on one line."""
    pages = [re.sub(r"\\\n\s*", " ", page.read_text()) for page in PAGES]
    found = (c for text in pages for pattern in patterns for c in pattern.findall(text))
    lines = {re.sub(r"^PYTHONPATH=\S+ ", "", " ".join(command.split())) for command in found}
    return sorted(line for line in lines if line.startswith(f"{program} "))


# --- what is written from the code ----------------------------------------------------------------


def test_the_reference_is_that_of_the_code() -> None:
    reference = script("reference")
    assert reference.FILE.read_text() == reference.page(), "run: python scripts/reference.py"


def test_the_picture_is_that_of_its_script() -> None:
    picture = script("picture")
    assert picture.FILE.read_text() == picture.picture(), "run: python scripts/picture.py"
    drawn = ElementTree.fromstring(picture.picture())
    colours = [cell.get("fill") for cell in drawn.iter("{http://www.w3.org/2000/svg}rect")]
    assert 0.1 < colours.count(picture.COLOURS["recomputed"]) / (7 + 3 * 16) < 0.2


def test_the_table_of_storage_is_that_of_its_script() -> None:
    sizes = script("kv_sizes")
    shown = {name: sizes.MODELS[name] for name in sizes.IN_README}
    assert sizes.table(shown) in (ROOT / "README.md").read_text()
    assert sizes.serving_table(sizes.MODELS) in (ROOT / "docs" / "serving.md").read_text()
    llama = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    shape = sizes.from_config({**llama, "hidden_size": 4096})
    assert shape == sizes.MODELS["Llama-3.1-8B, Mistral-7B"]
    assert shape.token_bytes == 128 * 1024


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_pages_tell_what_is_true_today(page: Path) -> None:
    """Results of other versions, and commits, are in benchmarks/results/."""
    past = r"\b(by now|since then|used to|formerly|(?=[a-f]*\d)[0-9a-f]{7})\b"
    assert re.findall(past, page.read_text().replace("is used to", ""), re.IGNORECASE) == []


def test_lengths_of_sentences() -> None:
    count = script("sentences")
    text = (
        "# Title\n\nOne two `three four`. Five, e.g. Six!\n\n- An item\n  goes on.\n\n| a | b |\n"
    )
    assert count.sentences(text) == ["One two `code`.", "Five, e.g. Six!", "An item goes on."]
    assert [count.words(s) for s in count.sentences(text)] == [3, 3, 4]
    assert count.figures([1, 2, 3, 40])[1:] == (2.5, 40, 40, 0.25)


FAMILY_WORDS = {
    "cohere": "Cohere 1", "cohere2": "Cohere 1 and 2", "exaone4": "EXAONE 4", "gemma2": "Gemma 2",
    "gemma3": "Gemma 2 and 3", "glm4": "GLM-4", "gpt_neox": "GPT-NeoX", "gpt_oss": "gpt-oss",
    "granite": "Granite", "llama": "Llama", "minicpm3": "MiniCPM3", "ministral3": "Ministral 3",
    "mistral": "Mistral", "mixtral": "Mixtral", "olmo2": "OLMo 2", "olmo3": "OLMo 2 and 3",
    "phi3": "Phi-3", "qwen2": "Qwen2", "qwen3": "Qwen3", "smollm3": "SmolLM3",
    "stablelm": "StableLM", "starcoder2": "StarCoder2",
}  # fmt: skip


def test_tests_blend_the_families_that_the_readme_names() -> None:
    assert FAMILY_WORDS.keys() <= FAMILIES.keys()
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert [word for word in FAMILY_WORDS.values() if word not in readme] == []


# --- links and the site ---------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    words = (re.sub(r"[^\w\s-]", "", title.lower()) for title in titles)
    return {re.sub(r"[\s-]+", "-", text.strip()) for text in words}


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page: Path) -> None:
    broken = list[str]()
    for link in LINK.findall(page.read_text()):
        target, _, anchor = link.partition("#")
        if target.startswith("https:"):
            continue
        file = page.parent / target if target else page
        if not file.is_file() or (anchor and anchor not in anchors(file)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    """By the end of their path, as in `engine/rows.py`."""
    named = set(re.findall(r"`([a-z_/]+\.py)`", page.read_text()))
    folders = ("benchmarks", "cacheblend_rag", "integrations", "kernels", "scripts", "tests")
    files = [f"/{p.relative_to(ROOT)}" for name in folders for p in (ROOT / name).rglob("*.py")]
    assert {name for name in named if not any(f.endswith(f"/{name}") for f in files)} == set()


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "benchmarks/results/store_hits.png").is_file()
    assert 'src="prompt.svg"' in (tmp_path / "index.html").read_text()


# --- code and commands ----------------------------------------------------------------------------


def test_pages_show_commands_of_each_program() -> None:
    shown = [commands(name, LINE, INLINE) for name in ("cacheblend", "make", "python")]
    assert min(map(len, shown)) >= 5


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_python_blocks_are_python(page: Path) -> None:
    for code in BLOCK.findall(page.read_text()):
        ast.parse(code)


@pytest.mark.parametrize("line", commands("cacheblend", LINE))
def test_the_command_takes_these_arguments(line: str) -> None:
    arguments = [a for a in shlex.split(line)[1:] if a != "..."]
    if arguments[0] == "serve":  # hands on what it does not know to vLLM
        _parser().parse_known_args(arguments)
    else:
        _parser().parse_args(arguments)


@pytest.mark.parametrize("line", commands("cacheblend", INLINE))
def test_the_command_has_these_options(line: str) -> None:
    name, *arguments = line.split()[1:]
    [choices] = [a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction)]
    known = choices.choices[name]._option_string_actions
    assert {a for a in arguments if a.startswith("--")} <= known.keys()


def targets() -> Iterator[str]:
    for line in (ROOT / "Makefile").read_text().splitlines():
        if match := re.match(r"([a-z][a-z -]*):(?!=)", line):
            yield from match[1].split()


@pytest.mark.parametrize("line", commands("make", LINE, INLINE))
def test_make_has_this_target(line: str) -> None:
    assert line.split()[1] in set(targets())


def test_make_help_names_every_target() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    named = set(re.findall(r"^make ([a-z-]+)", shown.stdout, re.MULTILINE))
    assert named == set(targets()) - {"help"}


@pytest.mark.parametrize("line", commands("python", LINE, INLINE))
def test_the_script_is_there_and_has_these_options(line: str) -> None:
    file, *arguments = line.split()[1:]
    if file == "-m":
        assert importlib.util.find_spec(arguments[0]) is not None
        return
    sources = [(ROOT / file).read_text()]
    sources += [(ROOT / "benchmarks" / name).read_text() for name in SHARED]
    options = [a for a in arguments if a.startswith("--")]
    assert [o for o in options if not any(f'"{o}"' in source for source in sources)] == []


# which test runs the blocks of which page
RUN = {
    "CONTRIBUTING.md": "unit/test_recipes.py",
    "README.md": "integrations/test_documented_code.py",
    "clients.md": "client/test_live.py",
    "debug.md": "integrations/test_documented_code.py",
    "python.md": "integrations/test_documented_code.py",
    "fleet.md": "engine/test_disaggregated.py",
    "ray.md": "integrations/test_fleet_routing.py",
    "serving.md": "client/test_live.py",
    "tutorial.md": "integrations/test_documented_code.py",
}
FENCE = re.compile(r"^```(\w+)$", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_a_test_runs_the_blocks(page: Path) -> None:
    kinds = set(FENCE.findall(page.read_text())) - {"text"}
    if kinds:
        assert f'"{page.name}"' in (ROOT / "tests" / RUN[page.name]).read_text()
    else:
        assert page.name not in RUN


# --- for contributors -----------------------------------------------------------------------------


def test_the_hooks_of_pre_commit_are_valid() -> None:
    from pre_commit.clientlib import load_config

    hooks = [
        hook
        for repo in load_config(ROOT / ".pre-commit-config.yaml")["repos"]
        for hook in repo["hooks"]
    ]
    assert {"ruff-check", "ruff-format", "reference"} <= {hook["id"] for hook in hooks}
    entries = [hook["entry"].split() for hook in hooks if hook.get("language") == "system"]
    assert all((ROOT / e[1]).is_file() for e in entries if e[0].endswith("python"))


def test_the_workflow_runs_what_continuous_integration_runs() -> None:
    import yaml

    flow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    steps = [step for job in flow["jobs"].values() for step in job["steps"]]
    assert ".ci/run" in [step.get("run") for step in steps]
    for template in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.md"):
        _, front, body = template.read_text().split("---\n", 2)
        assert {"name", "about"} <= yaml.safe_load(front).keys() and body.strip()
