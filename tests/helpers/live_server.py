"""A real ``cacheblend serve`` in a process of its own, for as long as a test needs it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from servers import free_port

ROOT = Path(__file__).parents[2]
GROUPS = ("vllm.general_plugins", "vllm.endpoint_plugins")


def entry_points(folder: Path) -> Path:
    """A folder for ``PYTHONPATH`` by which this checkout's plugins are found, installed or not."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = folder / "cacheblend_rag_checkout-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: cacheblend-rag-checkout\nVersion: 0\n"
    )
    lines: list[str] = []
    for group in GROUPS:
        lines.append(f"[{group}]")
        lines += [f"{name} = {value}" for name, value in project["entry-points"][group].items()]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


# vLLM's own command, which its CPU build does not start by its name
PLAIN = "import sys; from cacheblend_rag.engine.launch import serve; serve(sys.argv[1:])"


class LiveServer:
    """Started with ``start``; ``client`` speaks to it.

    Args:
        model, options: of the command.
        folder: for its log, and whatever a test keeps there.
        environment: more variables of it.
        plain: vLLM alone, with nothing of ours in it.
    """

    def __init__(
        self,
        model: Path,
        folder: Path,
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        *,
        plain: bool = False,
    ) -> None:
        self.folder, self.port, self._log = folder, free_port(), folder / "server.log"
        program = ["-c", PLAIN] if plain else ["-m", "cacheblend_rag", "serve"]
        command = [sys.executable, *program, str(model)]
        self._command = [*command, "--port", str(self.port), *options]
        paths = [entry_points(folder / "plugins"), ROOT, ROOT / "kernels", ROOT / "tests/helpers"]
        self._environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "VLLM_LOGGING_LEVEL": "INFO",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            **(environment or {}),
        }
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        self.client = httpx.Client(base_url=self.url, timeout=60)

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def start(self, within_s: float = 200) -> None:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,
            )
        until = time.monotonic() + within_s
        while time.monotonic() < until:
            assert self.process.poll() is None, self.log[-5000:]
            with contextlib.suppress(httpx.HTTPError):
                if self.client.get("/health", timeout=5).status_code == 200:
                    return
            time.sleep(0.2)
        raise TimeoutError(self.log[-5000:])

    def kill(self) -> None:
        """As the kernel does when memory runs out: all of it at once."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)

    def stop(self, within_s: float = 30) -> int:
        """As an orchestrator does; the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(within_s)
        finally:
            self.kill()

    def ask(self, method: str, path: str, **options: Any) -> Any:
        """A request to our endpoints, whose answer has to be right."""
        answer = self.client.request(method, f"/v1/cacheblend{path}", **options)
        assert answer.status_code < 300, (answer.status_code, answer.text)
        return answer.json()

    def ended(self, name: str, within_s: float = 60) -> Any:
        """An ingestion that has ended."""
        until = time.monotonic() + within_s
        while time.monotonic() < until:
            job = self.ask("GET", f"/ingestions/{name}")
            if job["status"] not in ("queued", "in_progress"):
                return job
            time.sleep(0.05)
        raise TimeoutError(json.dumps(job))


@contextlib.contextmanager
def live_server(
    *args: Any, kind: type[LiveServer] = LiveServer, **options: Any
) -> Iterator[LiveServer]:
    server = kind(*args, **options)
    try:
        server.start()
        yield server
    finally:
        server.client.close()
        if server.process is not None:
            server.kill()
