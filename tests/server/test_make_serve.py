"""``make serve`` as a clone has it, and the lines of docs/serving.md against it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from live_server import LiveServer, live_server

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
BLOCKS = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs" / "serving.md").read_text(), re.S | re.M)


class MadeServer(LiveServer):
    """What the tests run in takes the place of the environment that make would install."""

    def __init__(self, model: Path, folder: Path) -> None:
        super().__init__(model, folder)
        make = ["make", "--directory", str(ROOT), "serve", f"bin={BIN}", "installed="]
        self._command = [*make, f"ARGS=--port {self.port}"]


def test_the_lines_of_the_page(tmp_path: Path, embedded: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl")
    assert (BIN / "cacheblend").exists(), "the command is installed where the tests run"
    [lines] = [block for block in BLOCKS if block.startswith("curl")]
    assert lines.count("curl ") == 3
    with live_server(embedded, tmp_path, kind=MadeServer) as server:
        here = lines.replace("localhost:8000", server.url.removeprefix("http://"))
        done = subprocess.run(["bash", "-ec", here], capture_output=True, text=True, check=True)
        for part in ('"status":"completed"', '"computed":1', '"choices"', '"on":true'):
            assert part in done.stdout
        assert "smollm2-135m-instruct" in server.client.get("/v1/models").text
