"""Store URLs open what they say, and say what is wrong with them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheblend_rag.errors import StoreError
from cacheblend_rag.store import DiskStore, MemoryStore, NullStore, TieredStore, open_store
from cacheblend_rag.store.remote import RemoteStore
from cacheblend_rag.store.url import StoreURL, parse_seconds, parse_size, parse_url, redacted


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("memory://", StoreURL("memory", "", {})),
        ("memory:", StoreURL("memory", "", {})),
        ("MEMORY://?capacity=4GiB", StoreURL("memory", "", {"capacity": 4 * 2**30})),
        ("null://", StoreURL("null", "", {})),
        ("file:///data/kv", StoreURL("file", "/data/kv", {})),
        ("file:/data/kv", StoreURL("file", "/data/kv", {})),
        ("file:///data/my%20kv%3F", StoreURL("file", "/data/my kv?", {})),
        (
            "file:///kv?capacity=100GiB&memory=2GB",
            StoreURL("file", "/kv", {"capacity": 100 * 2**30, "memory": 2 * 10**9}),
        ),
        ("/data/kv", StoreURL("file", "/data/kv", {})),
        ("/data/100%25", StoreURL("file", "/data/100%25", {})),
        ("/data/kv?capacity=5", StoreURL("file", "/data/kv", {"capacity": 5})),
        ("./a:b", StoreURL("file", str(Path.cwd() / "a:b"), {})),
        ("~/kv", StoreURL("file", str(Path.home() / "kv"), {})),
        (
            "file:///kv?quota=1GB&dtype=fp8&encrypt=yes&evict=lru",
            StoreURL(
                "file", "/kv", {"quota": 10**9}, {"dtype": "fp8", "encrypt": "yes", "evict": "lru"}
            ),
        ),
        (
            "redis://u:p%40@host:6380/2?timeout=300ms&memory=1GB",
            StoreURL(
                "redis", "redis://u:p%40@host:6380/2", {"memory": 10**9}, {"timeout": "300ms"}
            ),
        ),
        (
            "s3://bucket/a/b?region=eu-1&disk=/kv&capacity=1TB",
            StoreURL(
                "s3", "s3://bucket/a/b", {"capacity": 10**12}, {"region": "eu-1", "disk": "/kv"}
            ),
        ),
    ],
)
def test_urls(url: str, expected: StoreURL) -> None:
    assert parse_url(url) == expected


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("ftp://user:secret@host/0", r"opened by ftp://\. Use memory://, file:///abs"),
        (
            "redis://user:secret@host/0?size=1",
            "redis:// has no option size. It has: cap",
        ),
        (
            "redis://user:secret@host/0?capacity=1GiB",
            "capacity and quota are of the disk tier: give redis:// also disk=",
        ),
        ("gs://bucket?quota=1GiB", "capacity and quota are of the disk tier"),
        ("redis://", "needs a server or a bucket"),
        ("s3://", "needs a server or a bucket"),
        ("gs://bucket?endpoint=x", "no option endpoint"),
        ("redis://host?timeout=0", "'0' is not a time. Write for example 2s"),
        ("redis://host?timeout=2m", "'2m' is not a time"),
        ("file:///kv?dtype=int4", "dtype is auto or fp8, not 'int4'"),
        ("file:///kv?encrypt=1", "encrypt is no or yes, not '1'"),
        ("redis://host?write=never", "write is through or back, not 'never'"),
        ("memory://?evict=fifo", "evict is gdsf or gdsf-strict or lru, not 'fifo'"),
        ("file://kv", "absolute path"),
        ("file://~/kv", "plain path may be relative or start with ~"),
        ("file://", "absolute path"),
        ("", "no usable path"),
        ("?capacity=1GiB", "no usable path"),
        ("a\0b", "no usable path"),
        ("~no-such-user-here/kv", "home folder"),
        ("memory:///kv", "takes no path"),
        ("memory://?memory=1GiB", "memory:// has no option memory. It has: capacity, evict"),
        ("file:///kv?size=1GiB&colour=red", "no option colour, size. It has: capacity, dtype"),
        ("null://?capacity=1", "no option capacity. It has: none"),
        ("file:///kv?capacity=1&capacity=2", "twice: capacity. Give it once"),
        ("file:///kv?quota=1&memory=2&quota=3&memory=2&evict=lru", "twice: memory, quota. Give"),
        ("file:///kv?capacity", "not of the form"),
        ("file:///kv?capacity=", "has no value: capacity. Give one, or leave it out"),
        ("s3://b?disk=&capacity=1TiB", "has no value: disk"),
        ("s3://b?endpoint=&region=", "has no value: endpoint, region"),
        ("file:///kv?capacity=lots", "'lots' is not a size. Write for example 512MiB"),
    ],
)
def test_wrong_urls(url: str, problem: str) -> None:
    with pytest.raises(StoreError, match=problem) as caught:
        parse_url(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("4096B", 4096),
        ("512MiB", 512 * 2**20),
        ("2GB", 2 * 10**9),
        ("1.5kib", 1536),
        ("3 TiB", 3 * 2**40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["0", "0.5", "-1", "1G", "1 Gb s", "GiB", "1e9", "0x10", "٣GB", ""]
)
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(StoreError, match="is not a size"):
        parse_size(text)


@settings(deadline=None)
@given(st.integers(1, 10**15), st.sampled_from(["", "B", "KB", "MB", "GB", "KiB", "MiB", "GiB"]))
def test_sizes_scale(number: int, unit: str) -> None:
    factor = (1024 if "i" in unit else 1000) ** ["", "K", "M", "G"].index(unit.rstrip("iB"))
    assert parse_size(f"{number}{unit}") == number * factor


@settings(deadline=None)
@given(st.text(max_size=30))
def test_any_text_is_a_url_or_a_store_error(url: str) -> None:
    try:
        parsed = parse_url(url)
    except StoreError:
        return
    assert parsed.scheme in {"file", "memory", "null", "redis", "rediss", "s3", "gs", "az"}


def test_open_store(tmp_path: Path) -> None:
    kinds = {
        "null://": NullStore,
        "memory://": MemoryStore,
        f"{tmp_path}/plain": DiskStore,
        f"file://{tmp_path}/url?capacity=1GiB": DiskStore,
        f"file://{tmp_path}/tiers?memory=1MiB": TieredStore,
    }
    for url, kind in kinds.items():
        with open_store(url, namespace="tiny-r0") as store:
            assert type(store) is kind
    assert (tmp_path / "url" / "v3" / "tiny-r0").is_dir()


def test_open_remote_stores_connects_to_nothing(tmp_path: Path) -> None:
    for extra, url in (("redis", "redis://127.0.0.1:1/0"), ("obstore", "s3://bucket?region=x")):
        pytest.importorskip(extra)
        sign = "&" if "?" in url else "?"
        with open_store(url, namespace="tiny-r0") as store:
            assert type(store) is RemoteStore
        tiers = f"{url}{sign}disk={tmp_path}/{extra}&capacity=1GiB&memory=1MiB"
        with open_store(tiers, namespace="tiny-r0") as store:
            assert type(store) is TieredStore
            assert type(store.slow) is TieredStore
            assert type(store.slow.fast) is DiskStore


def test_tenants_are_apart(tmp_path: Path) -> None:
    stores = [
        open_store(str(tmp_path), namespace="m-0of1", tenant=t) for t in ("", "a", "b", "Ä/..")
    ]
    names = {store.namespace for store in stores if isinstance(store, DiskStore)}
    assert len(names) == 4
    assert all(name.startswith("m-0of1") for name in names)


def test_encryption_needs_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CACHEBLEND_STORE_KEY", raising=False)
    with pytest.raises(StoreError, match="CACHEBLEND_STORE_KEY is not set"):
        open_store(f"{tmp_path}?encrypt=yes", namespace="tiny-r0")
    monkeypatch.setenv("CACHEBLEND_STORE_KEY", "c2VjcmV0")
    with pytest.raises(StoreError, match="not 32 bytes in base64") as caught:
        open_store(f"{tmp_path}?encrypt=yes", namespace="tiny-r0")
    assert "c2VjcmV0" not in str(caught.value)


def test_import_needs_no_torch() -> None:
    check = "import sys, cacheblend_rag.store; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2", 2), ("0.5s", 0.5), ("2 S", 2), ("300ms", 0.3), ("300 MS", 0.3), ("3599.5", 3599.5)],
)
def test_times(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0ms", "-1", "2m", "ms", "3600", "1e3"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(StoreError, match="is not a time"):
        parse_seconds(text)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:p@ss@host:6380/2", "redis://***@host:6380/2"),
        ("REDISS://:secret@host", "REDISS://***@host"),
        ("s3://key:secret\n@bucket/a", "s3://***@bucket/a"),
        ("rediss:user:secret@host:6379", "rediss:***@host:6379"),
        ("redis:/user:secret@host", "redis:/***@host"),
        (" redis://user:secret@host", " redis://***@host"),
        ("redis+sentinel://user:secret@host/0", "redis+sentinel://***@host/0"),
        ("valkey://user:secret@host", "valkey://***@host"),
        ("redis://host/0?password=secret&timeout=2s", "redis://host/0?password=***&timeout=2s"),
        ("redis://host/0", "redis://host/0"),
        ("s3://a/b?region=us&endpoint=http://h:9000", "s3://a/b?region=us&endpoint=http://h:9000"),
        ("file:///a?capacity=1GiB", "file:///a?capacity=1GiB"),
        ("file:///a@b", "file:///a@b"),
        ("a@b", "a@b"),
    ],
)
def test_no_secret_is_shown(url: str, shown: str) -> None:
    assert redacted(url) == shown
