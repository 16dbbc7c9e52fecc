"""Store URLs such as ``file:///data/kv?capacity=100GiB&memory=2GiB``."""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote

from cacheblend_rag.errors import StoreError

SUPPORTED = (
    "memory://, file:///absolute/path, redis://host:6379/0, s3://bucket/path, null:// or the plain "
    "path of a folder"
)

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):(?P<slashes>//)?(?P<rest>.*)", re.DOTALL)
_SHOWN = re.compile(  # of whatever somebody takes for one
    r"(?P<scheme_and_slashes>\s*(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/*)(?P<rest>.*)", re.DOTALL
)
_VALUE = re.compile(r"(?<=[?&])(?P<name>[^=&]*)=[^&]*")
_SIZE = re.compile(r"(?P<number>[0-9]+(\.[0-9]+)?)\s*(?P<unit>[KMGT]?B|[KMGT]iB)?", re.IGNORECASE)
_SECONDS = re.compile(r"(?P<number>[0-9]+(\.[0-9]+)?)\s*(?P<unit>ms|s)?", re.IGNORECASE)

_SIZES = {"capacity", "memory", "quota"}
_FILES = {"dtype", "encrypt", "evict"}
_DISK = {*_SIZES, *_FILES}
_REMOTE = {*_DISK, "disk", "timeout", "write"}
_BUCKET = {*_REMOTE, "endpoint", "region"}
_OPTIONS: dict[str, set[str]] = {
    "memory": {"capacity", "evict"},
    "file": _DISK,
    "null": set(),
    "redis": _REMOTE,
    "rediss": _REMOTE,
    "s3": _BUCKET,
    "gs": _REMOTE,
    "az": _REMOTE,
}
_REMOTES = _OPTIONS.keys() - {"memory", "file", "null"}
_CHOICES = {
    "dtype": ("auto", "fp8"),
    "encrypt": ("no", "yes"),
    "evict": ("gdsf", "gdsf-strict", "lru"),
    "write": ("through", "back"),
}


class StoreURL(NamedTuple):
    """A checked URL: the scheme is supported and so is every option."""

    scheme: str
    path: str  # of a file URL; of a remote one all that comes before the options, secrets included
    sizes: dict[str, int]  # option -> bytes
    options: dict[str, str] = {}  # noqa: RUF012 - the others, as they are

    @property
    def is_remote(self) -> bool:
        """Whether it names a server, and no folder or memory of this machine."""
        return self.scheme in _REMOTES


def parse_url(url: str) -> StoreURL:
    """Take ``url`` apart; a plain path is a file URL.

    Raises:
        StoreError: the scheme, the path, an option or its value is not supported.
    """
    match = _URL.fullmatch(url)
    scheme = match["scheme"].lower() if match else "file"
    if scheme not in _OPTIONS:
        raise StoreError(f"A store cannot be opened by {scheme}://. Use {SUPPORTED}.")
    location, _, query = (match["rest"] if match else url).partition("?")
    path = unquote(location) if match else location
    options = _options(scheme, query)
    sizes = {name: parse_size(options.pop(name)) for name in sorted(_SIZES & options.keys())}
    for name, known in _CHOICES.items():
        if options.get(name, known[0]) not in known:
            raise StoreError(f"{name} is {' or '.join(known)}, not {options[name]!r}.")
    if "timeout" in options:
        parse_seconds(options["timeout"])
    # What a remote holds is not ours to limit, and an option without effect is a mistake of the
    # user's.
    if {"capacity", "quota"} & sizes.keys() and scheme in _REMOTES and "disk" not in options:
        raise StoreError(f"capacity and quota are of the disk tier: give {scheme}:// also disk=...")
    if scheme in _REMOTES:
        return StoreURL(scheme, _check_remote(scheme, location), sizes, options)
    return StoreURL(scheme, _check_path(scheme, path, is_url=match is not None), sizes, options)


def redacted(url: str) -> str:
    """``url`` for messages, logs and names: without user and password."""
    match = _SHOWN.fullmatch(url)
    if match is None or match["scheme"].lower() in _OPTIONS.keys() - _REMOTES:
        return url
    # Of what is no option of a store, a value may be a secret as well: Redis clients know some.
    rest = _VALUE.sub(
        lambda m: m[0] if m["name"] in _BUCKET else f"{m['name']}=***",
        re.sub(r".*@", "***@", match["rest"], flags=re.DOTALL),
    )
    return f"{match['scheme_and_slashes']}{rest}"


def parse_seconds(text: str) -> float:
    """Seconds in a time such as ``2``, ``0.5s`` or ``300ms``.

    Raises:
        StoreError: it is not a time, or is zero.
    """
    match = _SECONDS.fullmatch(text)
    factor = Decimal("0.001") if match and (match["unit"] or "").lower() == "ms" else Decimal(1)
    seconds = float(Decimal(match["number"]) * factor) if match else 0.0
    if not 0 < seconds < 3600:
        raise StoreError(f"{text!r} is not a time. Write for example 2s or 300ms.")
    return seconds


def parse_size(text: str) -> int:
    """Bytes in a size such as ``512MiB``, ``2GB`` or ``4096``.

    Raises:
        StoreError: it is not a size, or is less than one byte.
    """
    match = _SIZE.fullmatch(text)
    size = int(Decimal(match["number"]) * _factor(match["unit"] or "B")) if match else 0
    if size < 1:
        raise StoreError(f"{text!r} is not a size. Write for example 512MiB, 2GB or 1000000.")
    return size


def _factor(unit: str) -> int:
    power = "BKMGT".index(unit[0].upper())
    return int((1024 if "i" in unit.lower() else 1000) ** power)


def _options(scheme: str, query: str) -> dict[str, str]:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        # no value is quoted: it may be a secret, or the rest of a password with a ? in it
        raise StoreError("The options are not of the form ?option=value&option=value.") from error
    options = dict(pairs)
    if len(options) < len(pairs):
        twice = sorted({name for name, _ in pairs if [n for n, _ in pairs].count(name) > 1})
        raise StoreError(f"An option is given twice: {', '.join(twice)}. Give it once.")
    unknown = sorted(options.keys() - _OPTIONS[scheme])
    if unknown:
        known = ", ".join(sorted(_OPTIONS[scheme])) or "none"
        raise StoreError(f"{scheme}:// has no option {', '.join(unknown)}. It has: {known}.")
    # an empty variable, which would leave out a tier or a limit without a word
    if empty := sorted(name for name, value in options.items() if not value):
        raise StoreError(f"An option has no value: {', '.join(empty)}. Give one, or leave it out.")
    return options


def _check_remote(scheme: str, location: str) -> str:
    if not location.strip("/"):
        raise StoreError(f"{scheme}:// needs a server or a bucket. Use {SUPPORTED}.")
    return f"{scheme}://{location}"


def _check_path(scheme: str, path: str, *, is_url: bool) -> str:
    if scheme != "file":
        if path:
            raise StoreError(f"{scheme}:// takes no path, but was given {path!r}. Leave it out.")
        return ""
    if is_url and not path.startswith("/"):
        raise StoreError(
            f"file:// needs an absolute path, as in file:///data/kv, not {path!r}. "
            "A plain path may be relative or start with ~."
        )
    if not path or "\0" in path:
        raise StoreError(f"The store has no usable path: {path!r}. Use {SUPPORTED}.")
    return path if is_url else _expand(path)


def _expand(path: str) -> str:
    try:
        return str(Path(path).expanduser().absolute())
    except RuntimeError as error:
        raise StoreError(f"{path} names a home folder that does not exist.") from error
