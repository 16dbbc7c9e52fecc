"""A replica without an engine, whose endpoints say what they were asked. Needs Ray."""

from __future__ import annotations

import os
from typing import Any

from cacheblend_rag.server.relay import Answered, Asked
from ray_cacheblend.replica import CacheBlendServer


class EchoServer(CacheBlendServer):
    """Knows of requests that are named after its process."""

    async def start(self) -> None:
        pass

    async def relay(self, asked: tuple[Any, ...]) -> Answered:
        whole = Asked(*asked)
        known = not whole.is_of_one or whole.target.endswith(f"/{os.getpid()}")
        headers = [("content-type", "text/plain"), ("x-process", str(os.getpid()))]
        said = f"{whole.method} {whole.target} {whole.body.decode()}"
        return Answered(200 if known else 404, headers, said.encode())
