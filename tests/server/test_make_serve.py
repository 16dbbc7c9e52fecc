"""``make serve`` as a clone has it, and the lines of README and docs/serving.md against it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import LiveServer, live_server

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs" / "serving.md").read_text(), re.S | re.M)


class MadeServer(LiveServer):
    """What the tests run in takes the place of the environment that make would install."""

    def __init__(self, model: Path, folder: Path) -> None:
        super().__init__(model, folder)
        make = ["make", "--directory", str(ROOT), "serve", f"bin={BIN}", "installed="]
        self._command = [*make, f"ARGS=--port {self.port}"]


@pytest.fixture(scope="module")
def server(embedded: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    if shutil.which("curl") is None:
        pytest.skip("no curl")
    assert (BIN / "cacheblend").exists(), "the command is installed where the tests run"
    folder = tmp_path_factory.mktemp("server")
    with live_server(embedded, folder, kind=MadeServer) as found:
        yield found


def ran(server: LiveServer, lines: str) -> str:
    """What they print, from a clone's folder."""
    assert lines.count("curl localhost:8000/") == 3
    here = lines.replace("localhost:8000", server.url.removeprefix("http://"))
    return subprocess.run(
        ["bash", "-ec", here], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout


def test_the_lines_of_the_readme(server: LiveServer) -> None:
    [section] = re.findall(r"^## Server\n(.*?)^## ", README, re.S | re.M)
    lines = "".join(re.findall(r"^    (.*\n)", section, re.M))
    ingested, answer, report = told(ran(server, lines))
    assert ingested["status"] == "completed" and ingested["counts"]["computed"] == 1
    assert answer["id"] == "cmpl-1" and answer["choices"][0]["text"]
    assert report["blended"] and report["tokens_reused"] > 100
    assert report["tokens_total"] == answer["usage"]["prompt_tokens"]


def told(printed: str) -> list[Any]:
    """JSON objects, one behind the other as curl prints them."""
    found, decoder = list[Any](), json.JSONDecoder()
    while printed := printed.strip():
        value, end = decoder.raw_decode(printed)
        found.append(value)
        printed = printed[end:]
    return found


def test_the_lines_of_the_page(server: LiveServer) -> None:
    [lines] = [block for block in BLOCKS if block.startswith("curl")]
    ingested, answer, state = told(ran(server, lines))
    assert ingested["status"] == "completed" and ingested["counts"]["computed"] == 1
    assert answer["choices"] and state["blending"]["on"]
    assert "smollm2-135m-instruct" in server.client.get("/v1/models").text
