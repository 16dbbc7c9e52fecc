"""What is shipped and what may import what: mistakes here break users, not tests of behaviour."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import cacheblend_rag

ROOT = Path(__file__).parents[2]
PROJECT_FOLDERS = ("kernels", "integrations")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# import name -> the one folder that may import it
BOUNDARIES = {
    "vllm": "cacheblend_rag/engine",
    "triton": "kernels",
    "fastapi": "cacheblend_rag/server",
    "starlette": "cacheblend_rag/server",
    "langchain": "integrations",
    "langchain_classic": "integrations",
    "langchain_core": "integrations",
    "llama_index": "integrations",
    "ray": "integrations",
}


def run(*command: str | Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], input=stdin, cwd=ROOT, capture_output=True, text=True
    )


def ruff(code: str, filename: str, *options: str) -> str:
    """What ruff says about ``code`` if it stood in ``filename``."""
    args = ("check", "--output-format=concise", "--no-cache", "--stdin-filename", filename)
    return run(sys.executable, "-m", "ruff", *args, *options, "-", stdin=code).stdout


def packages() -> set[Path]:
    """Every import package in the tree."""
    folders = [ROOT, *(ROOT / name for name in PROJECT_FOLDERS)]
    return {init.parent for folder in folders for init in folder.glob("*/__init__.py")}


def imports(tree: ast.AST) -> Iterator[str]:
    """The top-level name of every absolute import, at whatever depth it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


# --- public names ------------------------------------------------------------------------------


def test_every_name_in_all_exists_once() -> None:
    assert len(set(cacheblend_rag.__all__)) == len(cacheblend_rag.__all__)
    for name in cacheblend_rag.__all__:
        assert getattr(cacheblend_rag, name) is not None


def test_every_public_name_is_in_all() -> None:
    public = {
        name
        for name, value in vars(cacheblend_rag).items()
        if not name.startswith("_")
        and getattr(value, "__module__", "").startswith("cacheblend_rag")
    }
    assert public <= set(cacheblend_rag.__all__)


def test_all_is_sorted() -> None:
    source = (ROOT / "cacheblend_rag/__init__.py").read_text()
    assert "RUF022" not in ruff(source, "cacheblend_rag/__init__.py", "--select=RUF022")


def test_import_needs_no_optional_package() -> None:
    blocked = ("vllm", "torch", "transformers", "faiss", "triton", "gguf", "pypdf", *BOUNDARIES)
    code = f"""
import sys
sys.modules.update(dict.fromkeys({blocked!r}))  # None: importing it raises ImportError
import cacheblend_rag
"""
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr


# --- boundaries --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "folder"), BOUNDARIES.items())
@pytest.mark.parametrize("statement", ["import {0}", "from {0}.part import x", "import {0}.part"])
def test_lint_flags_an_import_across_a_boundary(name: str, folder: str, statement: str) -> None:
    code = f"def late() -> None:\n    {statement.format(name)}  # noqa: F401\n"
    assert "TID251" in ruff(code, "cacheblend_rag/x.py")
    assert "TID251" not in ruff(code, f"{folder}/x.py")


@pytest.mark.parametrize("name", ["langchain_text_splitters", "vllm_x", "tritonclient", "torch"])
def test_lint_does_not_flag_a_namesake(name: str) -> None:
    assert "TID251" not in ruff(f"import {name}\n", "cacheblend_rag/x.py")


def test_no_import_crosses_a_boundary() -> None:
    """Stricter than ruff, which lifts all bans at once in a folder where it lifts one."""
    crossings = [
        f"{file.relative_to(ROOT)} imports {name}"
        for package in packages()
        for file in package.rglob("*.py")
        for name in imports(ast.parse(file.read_text()))
        if name in BOUNDARIES and not file.is_relative_to(ROOT / BOUNDARIES[name])
    ]
    assert crossings == []


# --- distribution ------------------------------------------------------------------------------


def our_modules() -> dict[str, Path]:
    """Every module by its import name."""
    found = dict[str, Path]()
    for package in packages():
        for file in package.rglob("*.py"):
            parts = file.relative_to(package.parent).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = file
    return found


def imported_at_the_top(file: Path) -> Iterator[str]:
    """What a module imports for good, for its types alone too; not what a function imports."""
    waiting: list[ast.AST] = [ast.parse(file.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += ast.iter_child_nodes(node)


def test_no_modules_import_one_another() -> None:
    """Through others or directly: what depends on what is then a matter of reading once."""
    modules, graph = our_modules(), dict[str, set[str]]()
    for name, file in modules.items():
        wanted = {w if w in modules else w.rpartition(".")[0] for w in imported_at_the_top(file)}
        graph[name] = wanted & modules.keys() - {name}
    assert len(graph) > 200
    TopologicalSorter(graph).prepare()  # raises CycleError, with the circle


@pytest.mark.parametrize("folder", PROJECT_FOLDERS)
def test_a_project_folder_is_not_a_package(folder: str) -> None:
    """As a package, ``kernels`` would hide the one of that name that transformers imports."""
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()


def test_version_is_the_newest_in_the_changelog() -> None:
    lines = (ROOT / "CHANGELOG.md").read_text().splitlines()
    newest = next(line for line in lines if line.startswith("## "))
    assert newest.split()[1] == cacheblend_rag.__version__


def test_wheel_holds_every_package_and_nothing_else(tmp_path: Path) -> None:
    built = run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()

    expected = {package.name for package in packages()}
    assert {"cacheblend_rag", "cacheblend_kernels"} <= expected
    top_level = {name.partition("/")[0] for name in names}
    assert {name for name in top_level if not name.endswith(".dist-info")} == expected
    assert {f"{name}/py.typed" for name in expected} <= set(names)
    page = {f"cacheblend_rag/server/page/page.{kind}" for kind in ("css", "js")}
    assert page | {"cacheblend_rag/server/page/index.html"} <= set(names)


def test_typing_sees_every_package() -> None:
    checked = {ROOT / folder for folder in PYPROJECT["tool"]["mypy"]["files"]}
    assert all(package in checked or package.parent in checked for package in packages())


def test_no_file_names_a_host_or_a_path_of_the_machine_it_was_written_on() -> None:
    listing = run("git", "ls-files", "-z")
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    slash, dot = "/", "."
    forbidden = [
        *(dot.join(host) for host in [("pypi", "org"), ("pythonhosted", "org"), ("npmjs", "org")]),
        *(dot.join(host) for host in [("deb", "debian", "org"), ("npmjs", "com")]),
        *(slash + slash.join(path) for path in [("work", ""), ("opt", "wheels"), ("tmp", "w", "")]),
    ]
    found = [
        f"{name}: {word}"
        for name in filter(None, listing.stdout.split("\0"))
        if (ROOT / name).is_file()
        for word in forbidden
        if word.encode() in (ROOT / name).read_bytes()
    ]
    assert found == []
