"""A disk that is really full, where this machine lets us make one."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from chunks import chunk_of, key_of, same

from cacheblend_rag.errors import StoreError
from cacheblend_rag.store import DiskStore

SIZE = 12 << 20  # the index takes up to 4 MiB of it, however few chunks there are


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(tmp_path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk(small_disk: Path, request: pytest.FixtureRequest) -> None:
    """Refuses with the fix, loses nothing, and goes on once there is room."""
    store = DiskStore(small_disk / "kv", namespace="tiny-r0")
    chunks = {key_of(seed): chunk_of(seed, num_tokens=2000) for seed in range(100)}
    kept: list[str] = []
    refusals: list[str] = []
    for key, chunk in chunks.items():
        try:
            store.put(key, chunk)
            kept.append(key)
        except StoreError as error:
            refusals.append(str(error))
    assert refusals
    assert all("Free disk space" in refusal for refusal in refusals)
    assert len(kept) > 20
    assert all(same(store.get(key), chunks[key]) for key in kept)
    assert not list(small_disk.rglob("*.tmp"))
    store.close()

    with pytest.warns(RuntimeWarning, match="Free disk space"):
        again = DiskStore(small_disk / "kv", namespace="tiny-r0")
    with again:
        assert all(same(again.get(key), chunks[key]) for key in kept)
        for key in kept[:10]:
            (small_disk / "kv" / "v3" / "tiny-r0" / key[:2] / f"{key}.safetensors").unlink()
        again.put(key_of("new"), chunk_of(1))
        assert same(again.get(key_of("new")), chunk_of(1))
        assert again.stats().corrupt == 0
    request.node.user_properties += [("kept", len(kept)), ("refused", len(refusals))]


def test_eviction_works_on_a_full_disk(small_disk: Path) -> None:
    """A capacity near the disk's: room is made before it is written."""
    capacity = SIZE // 2
    with DiskStore(small_disk / "kv", namespace="tiny-r0", capacity_bytes=capacity) as store:
        for seed in range(100):
            store.put(key_of(seed), chunk_of(seed, num_tokens=2000))
            assert same(store.get(key_of(seed)), chunk_of(seed, num_tokens=2000))
        assert store.stats().nbytes <= capacity
