"""Small pieces: functions of 50 lines, classes below 300, and few places that catch everything."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOST = ("cacheblend_rag", "integrations", "benchmarks", "scripts", "examples", "tests")
LIBRARY = ("cacheblend_rag", "integrations", "kernels")
# Where anything may be raised, by code that is not ours or for whatever reason, and what is done:
# it is raised elsewhere, it is the answer to one request, or it is logged and others go on.
CATCH_ALL = {
    "cacheblend_rag/daemons.py": 1,  # raised where the result is asked for
    "cacheblend_rag/undo.py": 2,  # raised on; logged
    "cacheblend_rag/engine/worker.py": 1,  # raised by the caller
    "cacheblend_rag/engine/serving.py": 1,  # raised where the stream is read
    "cacheblend_rag/engine/forward.py": 1,  # raised behind the pass
    "cacheblend_rag/engine/ranks.py": 1,  # raised on, once the other ranks know
    "cacheblend_rag/engine/chat.py": 1,  # templates: raised as ours
    "cacheblend_rag/select/__init__.py": 1,  # another package's import: raised as ours
    "cacheblend_rag/engine/rows.py": 3,  # computed exactly, or lost with a cause; begun again
    "cacheblend_rag/engine/groups.py": 2,  # computed exactly, or ended with a cause
    "cacheblend_rag/engine/refiner.py": 1,  # the answer goes on, and the report says why
    "cacheblend_rag/engine/planning.py": 1,  # computed exactly, and the report says why
    "cacheblend_rag/engine/kernel_executor.py": 1,  # served without kernels, which says why
    "cacheblend_rag/engine/graphs.py": 3,  # served without CUDA graphs, logged; raised behind all
    "cacheblend_rag/server/errors.py": 1,  # answered, and logged
    "cacheblend_rag/server/runner.py": 1,  # the job fails with it
    "cacheblend_rag/server/proxy/health.py": 1,  # why the replica is left out
    "cacheblend_rag/store/database.py": 2,  # the next best database, warned of
    "cacheblend_rag/store/follow.py": 1,  # warned of, asked again
    "integrations/llama_index_cacheblend/ingestion.py": 1,  # any vector store's: raised as ours
}


def trees(folders: tuple[str, ...]) -> list[tuple[str, ast.Module]]:
    paths = [path for name in folders for path in sorted((ROOT / name).rglob("*.py"))]
    return [(str(path.relative_to(ROOT)), ast.parse(path.read_text())) for path in paths]


def length(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> int:
    """Lines of a class, or of a function without its docstring."""
    first, end = node.body[0], node.end_lineno or 0
    lines = end - node.lineno + 1
    if isinstance(node, ast.ClassDef) or ast.get_docstring(node) is None:
        return lines
    return lines - ((first.end_lineno or 0) - first.lineno + 1)


def too_long(tree: ast.AST) -> list[str]:
    functions = ast.FunctionDef | ast.AsyncFunctionDef
    nodes = [n for n in ast.walk(tree) if isinstance(n, functions | ast.ClassDef)]
    most = {n: 50 if isinstance(n, functions) else 299 for n in nodes}
    return [f"{n.name}: {length(n)}" for n in nodes if length(n) > most[n]]


def catches_all(tree: ast.AST) -> int:
    """Handlers of every error, however they are written."""
    count = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            names = {n.id for n in ast.walk(node.type or node) if isinstance(n, ast.Name)}
            count += node.type is None or bool(names & {"Exception", "BaseException"})
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
            count += any(ast.unparse(a) in ("Exception", "BaseException") for a in node.args)
    return count


def test_functions_and_classes_are_short() -> None:
    found = {path: long for path, tree in trees(HOST) if (long := too_long(tree))}
    assert found == {}


def test_everything_is_caught_in_few_places() -> None:
    found = {path: count for path, tree in trees(LIBRARY) if (count := catches_all(tree))}
    assert found == CATCH_ALL


def test_nothing_that_is_caught_is_dropped() -> None:
    """A handler that only passes says why, on its line or above it."""
    silent = Counter[str]()
    for path, tree in trees(LIBRARY):
        lines = (ROOT / path).read_text().splitlines()
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler) and isinstance(node.body[0], ast.Pass):
                about = lines[node.lineno - 2 : node.end_lineno]
                silent[path] += not any("#" in line for line in about)
    assert +silent == Counter()


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("try: f()\nexcept Exception: g()", 1),
        ("try: f()\nexcept: g()", 1),
        ("try: f()\nexcept (OSError, BaseException) as e: g()", 1),
        ("with contextlib.suppress(Exception): f()", 1),
        ("try: f()\nexcept OSError: g()", 0),
    ],
)
def test_what_catches_all_would_be_found(code: str, count: int) -> None:
    assert catches_all(ast.parse(code)) == count


def test_what_is_too_long_would_be_found() -> None:
    body = "\n".join("    x = 1" for _ in range(50))
    assert too_long(ast.parse(f"def f():\n{body}")) == ["f: 51"]
    assert too_long(ast.parse(f'def f():\n    """Doc."""\n{body[: -len("    x = 1")]}')) == []
    methods = "\n".join(f"    def f{i}(self): ..." for i in range(299))
    assert too_long(ast.parse(f"class C:\n{methods}")) == ["C: 300"]
