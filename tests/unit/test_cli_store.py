"""The commands that look after a store folder, run on real folders."""

from __future__ import annotations

import io
import json
import os
import resource
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chunks import chunk_of, key_of, same
from fake_retriever import FakeRetriever

from cacheblend_rag import cli
from cacheblend_rag.cli.store import register
from cacheblend_rag.errors import UnavailableError
from cacheblend_rag.retrieval import Passage
from cacheblend_rag.store import DiskStore, Encoding
from cacheblend_rag.store.folder import namespaces
from cacheblend_rag.store.marker import VERSION
from cacheblend_rag.store.seal import Cipher

KEY = "A" * 43 + "="  # 32 bytes in base64


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two namespaces of four chunks."""
    for namespace in ("one", "two"):
        with DiskStore(tmp_path / "kv", namespace=namespace) as store:
            for seed in range(4):
                store.put(key_of(seed), chunk_of(seed))
    return tmp_path / "kv"


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CACHEBLEND_STORE_KEY", raising=False)


def run(capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main([*map(str, arguments), "--json"]) == code
    data: dict[str, Any] = json.loads(capsys.readouterr().out)
    return data


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def test_verify(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = run(capsys, 0, "verify", "--store", folder)
    assert (data["intact"], data["damaged"]) == (8, 0)
    victim = files(folder)[2]
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    data = run(capsys, 3, "verify", "--store", folder)
    assert (data["intact"], data["damaged"]) == (7, 1)
    damaged = [key for row in data["namespaces"] for key in row["damaged"]]
    assert damaged == [victim.stem]
    assert not victim.exists()
    data = run(capsys, 0, "verify", "--store", folder)
    assert (data["intact"], data["damaged"]) == (7, 0)
    assert cli.main(["verify", "--store", str(folder)]) == 0
    assert "7 chunks intact" in capsys.readouterr().out


def test_verify_goes_on_behind_a_namespace_that_cannot_be_read(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    verify = DiskStore.verify

    def fails(store: DiskStore) -> Iterator[tuple[str, bool]]:
        yield from verify(store)
        if store.namespace == "one":
            raise UnavailableError("2 files: permission denied")

    monkeypatch.setattr(DiskStore, "verify", fails)
    data = run(capsys, 3, "verify", "--store", folder)
    assert data["intact"] == 8
    assert {row["namespace"]: row["unread"] for row in data["namespaces"]} == {
        "one": "2 files: permission denied",
        "two": "",
    }


def test_verify_says_what_a_crash_left(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in folder.glob("index.sqlite*"):
        path.unlink()
    rows = run(capsys, 0, "verify", "--store", folder)["namespaces"]
    assert [row["adopted"] for row in rows] == [8, 0]  # the first opening sees to all


def test_prune(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = files(folder)[0].stat().st_size
    files(folder)[0].write_bytes(b"x")
    run(capsys, 3, "verify", "--store", folder)
    data = run(capsys, 0, "prune", "--store", folder, "--to", 3 * size)
    assert (data["corrupt"], data["evicted"]) == (1, 4)
    assert len(files(folder)) == 3
    assert not list(folder.rglob("*.corrupt-*"))
    assert run(capsys, 0, "prune", "--store", folder)["evicted"] == 0
    with pytest.raises(SystemExit, match="2"):
        cli.main(["prune", "--to", "much"])
    assert "is not a size" in capsys.readouterr().err


def test_export_and_import(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = tmp_path / "kv.tar"
    data = run(capsys, 0, "export", archive, "--store", folder)
    assert data["chunks"] == 8
    other = tmp_path / "other"
    data = run(capsys, 0, "import", archive, "--store", other)
    assert (data["added"], data["present"], data["refused"]) == (8, 0, 0)
    assert namespaces(other) == ["one", "two"]
    with DiskStore(other, namespace="two") as store:
        assert all(same(store.get(key_of(seed)), chunk_of(seed)) for seed in range(4))
        assert len(list(store.scan())) == 4
    assert run(capsys, 0, "import", archive, "--store", other)["present"] == 8
    assert cli.main(["export", str(archive), "--store", str(folder)]) == 1
    assert "File exists" in capsys.readouterr().err


def test_export_leaves_damage_behind(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files(folder)[0].write_bytes(b"x")
    assert run(capsys, 0, "export", tmp_path / "kv.tar", "--store", folder)["chunks"] == 7


def archive_of(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for info, content in members:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_a_malicious_archive(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    intact = files(folder)[0]
    namespace = intact.relative_to(folder / "v3").parts[0]
    link = tarfile.TarInfo(f"v3/{namespace}/{intact.name}")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    other = key_of("other")
    members = [
        (tarfile.TarInfo("../../evil"), b"x"),
        (tarfile.TarInfo("/etc/evil"), b"x"),
        (tarfile.TarInfo(f"v3/../v3/{intact.name}"), intact.read_bytes()),
        (tarfile.TarInfo(f"v3/{namespace}/{other}.safetensors"), intact.read_bytes()),
        (tarfile.TarInfo(f"v3/{namespace}/{other}.safetensors"), b"\xff" * 100),
        (tarfile.TarInfo("v3/x-sealed-00000000/" + intact.name), intact.read_bytes()),
        (link, b""),
        (tarfile.TarInfo(f"v3/{namespace}/{intact.name}"), intact.read_bytes()),
    ]
    target = tmp_path / "deep" / "target"
    data = run(capsys, 3, "import", archive_of(tmp_path / "evil.tar", *members), "--store", target)
    assert (data["added"], data["refused"]) == (1, 7)
    assert [path.name for path in files(target)] == [intact.name]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "evil.tar", "kv"]


def test_an_archive_of_another_format_is_refused_with_the_reason(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    intact = files(folder)[0]
    old = (tarfile.TarInfo(f"v1/0123-0of1/{intact.name}"), intact.read_bytes())
    archive = archive_of(tmp_path / "old.tar", old)
    assert cli.main(["import", str(archive), "--store", str(tmp_path / "new")]) == 1
    assert "chunks of format 1" in capsys.readouterr().err
    assert files(tmp_path / "new") == []


def test_an_archive_with_holes_and_odd_namespaces(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    intact = files(folder)[0]
    sparse = tarfile.TarInfo(f"{VERSION}/one-0of1/{key_of('other')}.safetensors")
    sparse.pax_headers = {"GNU.sparse.size": str(4 << 30), "GNU.sparse.map": f"{4 << 30},0"}
    names = ["-fp8", "x" * 101, "x" * 130, *(f"n{number}" for number in range(40))]
    members = [
        (sparse, b""),
        *(
            (tarfile.TarInfo(f"{VERSION}/{name}/{intact.name}"), intact.read_bytes())
            for name in names
        ),
    ]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        archive = archive_of(tmp_path / "odd.tar", *members)
        data = run(capsys, 3, "import", archive, "--store", tmp_path / "to")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (data["added"], data["refused"]) == (40, 4)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


def test_import_says_what_no_check_can_show(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, 0, "export", tmp_path / "kv.tar", "--store", folder)
    assert (tmp_path / "kv.tar").stat().st_mode & 0o077 == 0
    command = ["import", str(tmp_path / "kv.tar"), "--store", str(tmp_path / "other")]
    assert cli.main(command) == 0
    assert "no check can show" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("content", [b"", b"not a tar" * 1000])
def test_a_file_that_is_no_archive(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    assert cli.main(["import", str(tmp_path / "x.tar"), "--store", str(tmp_path / "kv")]) == 1
    assert "no archive of a store" in capsys.readouterr().err
    assert cli.main(["import", str(tmp_path / "none.tar"), "--store", str(tmp_path / "kv")]) == 1
    assert "No such file" in capsys.readouterr().err


def test_encrypted_namespaces_need_their_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cryptography")
    encoding = Encoding(fp8=True, cipher=Cipher(bytes(32)))
    with DiskStore(tmp_path / "kv", namespace="one", encoding=encoding) as store:
        store.put(key_of(1), chunk_of(1))
    assert cli.main(["stats", "--store", str(tmp_path / "kv")]) == 1
    assert "CACHEBLEND_STORE_KEY is not set" in capsys.readouterr().err
    monkeypatch.setenv("CACHEBLEND_STORE_KEY", "B" + KEY[1:])
    assert cli.main(["stats", "--store", str(tmp_path / "kv")]) == 1
    assert "another key" in capsys.readouterr().err
    monkeypatch.setenv("CACHEBLEND_STORE_KEY", KEY)
    assert run(capsys, 0, "stats", "--store", tmp_path / "kv")["total"]["chunks"] == 1
    assert run(capsys, 0, "verify", "--store", tmp_path / "kv")["intact"] == 1
    archive = tmp_path / "kv.tar"
    assert run(capsys, 0, "export", archive, "--store", tmp_path / "kv")["chunks"] == 1
    assert run(capsys, 0, "import", archive, "--store", tmp_path / "copy")["added"] == 1
    monkeypatch.delenv("CACHEBLEND_STORE_KEY")
    assert run(capsys, 3, "import", archive, "--store", tmp_path / "third")["refused"] == 1


@pytest.mark.parametrize("name", ["verify", "prune", "gc", "stats"])
def test_a_folder_without_a_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert cli.main([name, "--store", str(tmp_path)]) == 1
    assert "no chunk store" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# --- documents ------------------------------------------------------------------------------------


@pytest.fixture
def documents(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """a.txt is of chunks 0 and 1, b.txt of 1 and 2."""
    monkeypatch.setattr(cli.store, "Retriever", FakeRetriever)
    names = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    rows = [(names[0], 0), (names[0], 1), (names[1], 1), (names[1], 2)]
    FakeRetriever(
        [Passage(name, number, "text") for name, number in rows], folder.with_name("kv-index")
    )
    register(folder, [name for name, _ in rows], [key_of(number) for _, number in rows])
    return names


def held(folder: Path, namespace: str = "one") -> list[int]:
    with DiskStore(folder, namespace=namespace) as store:
        return [seed for seed in range(4) if store.contains(key_of(seed))]


def test_forget(folder: Path, documents: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    data = run(capsys, 0, "forget", documents[0], "--store", folder)
    assert (data["chunks"], data["passages"]) == (2, 2)  # in both namespaces
    assert held(folder) == held(folder, "two") == [1, 2, 3]
    data = run(capsys, 0, "forget", Path(documents[1]).parent, "--store", folder)
    assert (data["chunks"], data["passages"]) == (4, 0)
    assert held(folder) == [3]
    assert run(capsys, 0, "stats", "--store", folder)["passages"] == 0


def test_gc(folder: Path, documents: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, 0, "gc", "--store", folder)["chunks"] == 0
    FakeRetriever([Passage(documents[1], 1, "text")], folder.with_name("kv-index"))
    assert run(capsys, 0, "gc", "--store", folder)["chunks"] == 2
    assert held(folder) == [1, 2, 3]


def test_a_document_that_changed_leaves_nothing_behind(folder: Path, documents: list[str]) -> None:
    register(folder, [documents[0], documents[0]], [key_of(1), ""])  # its first passage is gone
    assert held(folder) == [1, 2, 3]


def test_labels_where_there_is_no_store(tmp_path: Path) -> None:
    register(tmp_path, ["a"], [key_of(1)])
    assert list(tmp_path.iterdir()) == []
