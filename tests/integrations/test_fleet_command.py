"""``cacheblend ingest --ray`` on a cluster of its own, by workers without engines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, sys
from fleet import Noting
from ray_cacheblend import ingestion
from ray_cacheblend.command import ingest_texts
from cacheblend_rag.errors import CacheBlendError

ingestion._step = lambda *given: (Noting, {})
if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    options = {"workers": 2, "model": "a/b", "engine_args": {}}
    options["config"] = {"store": "redis://host:1/0"}
    for texts, address in given:
        documents = [None] * len(texts)
        try:
            found = ingest_texts(texts, documents, address=address, **options)
            print("RESULT", json.dumps([found.computed, list(found.keys)]), flush=True)
        except CacheBlendError as error:
            print("RESULT", json.dumps([type(error).__name__, str(error)]), flush=True)
"""


def results(*given: tuple[list[str], str]) -> list[Any]:
    parts = ("", "kernels", "integrations", "tests/helpers")
    paths = os.pathsep.join(str(ROOT / part) for part in parts)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(given)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=380,
    )
    lines = [line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(lines) == len(given), done.stdout[-3000:] + done.stderr[-3000:]
    return [json.loads(line) for line in lines]


def test_keys_come_in_the_order_of_the_texts_and_errors_are_ours() -> None:
    texts = [f"text {number}" for number in range(40)] + ["text 7"]
    whole, failed = results((texts, "local"), ([*texts, "bad"], "local"))
    assert whole == [41, texts]
    assert failed == ["PromptError", "this is no text"]
