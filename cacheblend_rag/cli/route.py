"""``route``: one address for several servers; requests go where their text is warm."""

from __future__ import annotations

import argparse
import contextlib
import os
from typing import Any

from cacheblend_rag.cli.base import OK, Done, Screen, command, positive, size
from cacheblend_rag.errors import ConfigError, MissingExtraError
from cacheblend_rag.router import WarmRouter

ADMIN_KEY, API_KEY = "CACHEBLEND_ROUTE_KEY", "CACHEBLEND_API_KEY"
_TEXT = "send requests to the server that was sent most of their text before"


def add(commands: Any) -> None:
    """Add the command of this file."""
    parser = command(commands, "route", _route, _TEXT)
    parser.epilog = (
        f"{API_KEY} is sent with checks of replicas; clients' own keys are passed on. "
        f"{ADMIN_KEY} opens the endpoint /route to who has this key."
    )
    text = "address of a server; repeat it for each"
    parser.add_argument("--replica", action="append", default=[], metavar="URL", help=text)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1)")
    parser.add_argument(
        "--port", type=port, default=8000, metavar="N", help="port to listen at (8000)"
    )
    text = "bytes of text remembered of each replica: about what its memory holds the KV of (4MiB)"
    parser.add_argument("--remember", type=size, default="4MiB", metavar="SIZE", help=text)
    text = "a replica gets at most this many times the mean of requests (1.25)"
    parser.add_argument("--slack", type=float, default=1.25, metavar="X", help=text)
    text = "it has at most this many times the mean of requests in flight (1.5)"
    parser.add_argument("--in-flight-slack", type=float, default=1.5, metavar="X", help=text)
    text = "seconds between two checks of a replica (2)"
    parser.add_argument("--check-every", type=seconds, default=2.0, metavar="S", help=text)
    text = "seconds without a byte until a replica's answer is given up (never)"
    parser.add_argument("--timeout", type=seconds, metavar="S", help=text)
    text = "seconds that requests in flight have left when the proxy is to end (60)"
    parser.add_argument("--shutdown-timeout", type=positive, default=60, metavar="S", help=text)
    text = "most bytes of a request (256MiB)"
    parser.add_argument("--max-body", type=size, default="256MiB", metavar="SIZE", help=text)


def _route(args: argparse.Namespace, screen: Screen) -> Done:
    try:
        import uvicorn

        from cacheblend_rag.server.proxy.app import proxy_app
        from cacheblend_rag.server.proxy.options import ProxyOptions
    except ImportError as error:
        raise MissingExtraError(error.name or "uvicorn", "route") from error
    options = ProxyOptions(
        check_s=args.check_every,
        timeout_s=args.timeout,
        max_body=args.max_body,
        api_key=os.environ.get(API_KEY) or None,
        admin_key=os.environ.get(ADMIN_KEY) or None,
    )
    router = WarmRouter(
        remember_bytes=args.remember, slack=args.slack, in_flight_slack=args.in_flight_slack
    )
    app = proxy_app(args.replica, router, options)
    config = uvicorn.Config(
        app,
        host=args.host,
        port=args.port,
        log_level="info",
        access_log=False,
        server_header=False,  # replicas say these themselves
        date_header=False,
        proxy_headers=False,  # who is in front of us is told to replicas, and is not us
        lifespan="on",
        timeout_graceful_shutdown=args.shutdown_timeout,  # a replica that hangs would hold it
    )
    server = uvicorn.Server(config)
    # After a good end uvicorn raises what interrupted it; it exits where it could not start.
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        server.run()
    if not server.started:
        raise ConfigError(
            f"the proxy did not start on {args.host}:{args.port}: the lines above have the cause. "
            "Another --port may be free"
        )
    return Done(OK, {"replicas": args.replica})


def port(text: str) -> int:
    """A number of a TCP port."""
    number = positive(text)
    if number > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port, 1 to 65535")
    return number


def seconds(text: str) -> float:
    """More than no seconds."""
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < float("inf"):
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
