"""Eight bits and encryption: what changes on disk, what may not change for who reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from chunks import chunk_of, key_of, latent_chunk_of, normal_chunk_of, same, spoiled
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from cacheblend_rag.store import ChunkKV, DiskStore, Encoding
from cacheblend_rag.store import seal as seal_module
from cacheblend_rag.store.base import NOT_FINITE
from cacheblend_rag.store.chunk_file import decode, decode_info, encode, possible_sizes
from cacheblend_rag.store.seal import Cipher
from cacheblend_rag.store.source import BytesSource, DamagedFileError

pytest.importorskip("cryptography")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CIPHER = Cipher(bytes(range(32)))
ENCODINGS = [Encoding(), Encoding(fp8=True), Encoding(cipher=CIPHER), Encoding(True, CIPHER)]


def file_of(key: str, chunk: ChunkKV, encoding: Encoding) -> bytes:
    return b"".join(encode(key, chunk, encoding))


@pytest.mark.parametrize("encoding", ENCODINGS, ids=["plain", "fp8", "sealed", "both"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_flipped_byte_and_every_cut_is_found(encoding: Encoding, dtype: torch.dtype) -> None:
    key, chunk = key_of(1), normal_chunk_of(1, dtype, num_tokens=2)
    content = file_of(key, chunk, encoding)
    assert len(content) in possible_sizes(key, chunk, encoding)
    read = decode(BytesSource(content), key, encoding.cipher)
    assert (read.token_ids, read.base) == (chunk.token_ids, chunk.base)
    assert same(read, chunk) is not encoding.fp8
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        with pytest.raises(DamagedFileError):
            decode(BytesSource(bytes(changed)), key, encoding.cipher)
    for length in range(len(content)):
        with pytest.raises(DamagedFileError):
            decode(BytesSource(content[:length]), key, encoding.cipher)
    for other in (content + b"x", file_of(key_of(2), chunk, encoding)):
        with pytest.raises(DamagedFileError):
            decode(BytesSource(other), key, encoding.cipher)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=["plain", "fp8", "sealed", "both"])
@given(data=st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_a_chunk_or_damage(encoding: Encoding, data: bytes) -> None:
    for read in (decode, decode_info):
        with pytest.raises(DamagedFileError):
            read(BytesSource(data), key_of(1), encoding.cipher)  # type: ignore[operator]


# --- eight bits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eight_bits_halve_the_bytes_and_round(tmp_path: Path, dtype: torch.dtype) -> None:
    chunk = normal_chunk_of(1, dtype, num_tokens=300)
    with DiskStore(tmp_path, namespace="tiny-r0", encoding=Encoding(fp8=True)) as store:
        store.put(key_of(1), chunk)
        read = store.get(key_of(1))
        (info,) = store.scan()
    assert read is not None
    assert read.kv_L2NHD.dtype == dtype
    (path,) = tmp_path.rglob("*.safetensors")
    assert path.stat().st_size < chunk.nbytes / dtype.itemsize + 2000
    assert info.token_ids == chunk.token_ids
    # E4M3 keeps four significant bits: half a step is 1/16 of a number, less for subnormal ones
    got, want = read.kv_L2NHD.float(), chunk.kv_L2NHD.float()
    largest_L2H = want.abs().amax(dim=(2, 4))
    allowed = (want.abs() / 16).maximum(largest_L2H[:, :, None, :, None] / 448 / 1024) * 1.02
    assert bool(((got - want).abs() <= allowed).all())
    relative = (got - want).norm() / want.norm()
    assert 0.005 < float(relative) < 0.04


def test_latents_are_stored_in_eight_bits_too() -> None:
    chunk = latent_chunk_of(1)
    read = decode(BytesSource(file_of(key_of(1), chunk, Encoding(fp8=True))), key_of(1))
    assert read.kv_L2NHD.shape == (2, 1, 7, 1, 16)
    assert torch.allclose(read.kv_L2NHD.float(), chunk.kv_L2NHD.float(), rtol=0.08, atol=0.02)


def test_each_heads_keys_and_values_have_their_own_scale() -> None:
    kv_L2NHD = torch.ones(2, 2, 4, 2, 8)
    for layer in range(2):
        for which in range(2):
            for head in range(2):
                kv_L2NHD[layer, which, :, head] *= 10.0 ** (4 * layer + 2 * which + head - 3)
    chunk = ChunkKV((1, 2, 3, 4), 0, kv_L2NHD)
    content = file_of(key_of(1), chunk, Encoding(fp8=True))
    read = decode(BytesSource(content), key_of(1))
    assert torch.allclose(read.kv_L2NHD, kv_L2NHD, rtol=1e-6)


def test_eight_bit_files_are_ordinary_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "chunk.safetensors"
    path.write_bytes(file_of(key_of(1), normal_chunk_of(1), Encoding(fp8=True)))
    with safe_open(path, framework="pt") as file:
        kv, scales = file.get_tensor("kv"), file.get_tensor("scales")
        assert kv.dtype == torch.float8_e4m3fn
        assert file.metadata()["dtype"] == "BF16"
    wide = kv.float() * scales[:, :, None, :, None]
    assert torch.allclose(wide, normal_chunk_of(1).kv_L2NHD.float(), rtol=0.08, atol=0.02)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -float("inf")])
def test_what_eight_bits_cannot_hold_is_not_kept(tmp_path: Path, value: float) -> None:
    with DiskStore(tmp_path, namespace="tiny-r0", encoding=Encoding(fp8=True)) as store:
        assert store.put(key_of(1), spoiled(normal_chunk_of(1), value)) == NOT_FINITE
        assert store.get(key_of(1)) is None and store.stats().corrupt == 1


def test_zeros_stay_zeros() -> None:
    chunk = ChunkKV((1, 2), 0, torch.zeros(1, 2, 2, 1, 4, dtype=torch.bfloat16))
    content = file_of(key_of(1), chunk, Encoding(fp8=True))
    assert same(decode(BytesSource(content), key_of(1)), chunk)


# --- encryption -----------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ENCODINGS, ids=["plain", "fp8", "sealed", "both"])
def test_a_store_serves_after_reopening(tmp_path: Path, encoding: Encoding) -> None:
    with DiskStore(tmp_path, namespace="tiny-r0", encoding=encoding) as store:
        store.put(key_of(1), chunk_of(1))
    for path in tmp_path.glob("index*"):
        path.unlink()
    with DiskStore(tmp_path, namespace="tiny-r0", encoding=encoding) as store:
        assert store.recovery.adopted == 1
        assert [info.token_ids for info in store.scan()] == [chunk_of(1).token_ids]
        assert store.contains(key_of(1))
        found = store.get(key_of(1))
        assert found is not None
        assert found.token_ids == chunk_of(1).token_ids


def test_neither_tokens_nor_kv_are_readable_on_disk(tmp_path: Path) -> None:
    chunk = ChunkKV((777777,) * 500, 0, torch.full((1, 2, 500, 1, 8), 1.5, dtype=torch.bfloat16))
    tokens, kv = (777777).to_bytes(4, "little") * 2, b"\xc0\x3f" * 4
    for encoding, readable in ((Encoding(), True), (Encoding(cipher=CIPHER), False)):
        folder = tmp_path / str(readable)
        with DiskStore(folder, namespace="tiny-r0", encoding=encoding) as store:
            store.put(key_of(1), chunk)
        contents = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
        assert (tokens in contents) is readable
        assert (kv in contents) is readable


def test_another_key_finds_an_empty_store_and_breaks_nothing(tmp_path: Path) -> None:
    def open_with(cipher: Cipher | None) -> DiskStore:
        return DiskStore(tmp_path, namespace="tiny-r0", encoding=Encoding(cipher=cipher))

    open_with(CIPHER).put(key_of(1), chunk_of(1))
    for cipher in (Cipher(bytes(32)), None):
        with open_with(cipher) as store:
            assert store.get(key_of(1)) is None
            assert list(store.scan()) == []
            assert store.stats().corrupt == 0
    assert same(open_with(CIPHER).get(key_of(1)), chunk_of(1))


def test_kv_is_sealed_in_pieces_that_cannot_be_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seal_module, "PIECE", 100)
    encoding = Encoding(cipher=CIPHER)
    chunk = chunk_of(1)
    content = file_of(key_of(1), chunk, encoding)
    assert {len(content)} == possible_sizes(key_of(1), chunk, encoding)
    assert same(decode(BytesSource(content), key_of(1), CIPHER), chunk)
    pieces, piece = -(-chunk.nbytes // 100), 128
    assert pieces > 3
    start = len(content) - chunk.nbytes - 28 * pieces
    one, two = (content[start + n * piece : start + (n + 1) * piece] for n in (0, 1))
    swapped = content[:start] + two + one + content[start + 2 * piece :]
    assert len(swapped) == len(content)
    with pytest.raises(DamagedFileError):
        decode(BytesSource(swapped), key_of(1), CIPHER)


def test_sealing_twice_gives_other_bytes() -> None:
    assert CIPHER.seal(b"x", "here") != CIPHER.seal(b"x", "here")
    with pytest.raises(DamagedFileError):
        CIPHER.open(CIPHER.seal(b"x", "here"), "there")
