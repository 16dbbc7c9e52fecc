"""Tenants on one disk store: through the front door and on the command line, nothing crosses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chunks import chunk_of, key_of

from cacheblend_rag import BlendConfig, CacheBlend, cli
from cacheblend_rag.cli.base import index_of
from cacheblend_rag.cli.store import register
from cacheblend_rag.retrieval import MANIFEST, Passage
from cacheblend_rag.store import DiskStore, open_store
from cacheblend_rag.store.folder import export, import_, namespaces
from cacheblend_rag.store.tenants import belongs, of_tenant

MODEL = "1f" * 16 + "-0of1"


def test_a_namespace_says_whose_it_is() -> None:
    mine, other = of_tenant(MODEL, "a"), of_tenant(MODEL, "b")
    assert of_tenant(MODEL, "") == MODEL
    assert len({mine, other, MODEL}) == 3
    for suffix in ("", "-fp8", "-sealed-0123abcd", "-fp8-sealed-0123abcd"):
        assert belongs(mine + suffix, "a") and belongs(MODEL + suffix, "")
        assert not belongs(mine + suffix, "") and not belongs(mine + suffix, "b")
        assert not belongs(MODEL + suffix, "a")


# --- the front door -------------------------------------------------------------------------------

pytest.importorskip("vllm")
import storing_engine  # noqa: E402 - it needs vLLM's parameters
from fake_engine import MODEL as TOKENIZER  # noqa: E402


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    storing_engine.install(monkeypatch)

    def make(namespace: str, options: str = "") -> CacheBlend:
        url = f"{(tmp_path / 'kv').as_uri()}{options}"
        return CacheBlend(TOKENIZER, config=BlendConfig(store=url, namespace=namespace))

    return make


DOCUMENT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 8


def counts(blend: CacheBlend) -> dict[str, int]:
    return blend.stats()[0]


def test_fronts_of_one_engine_have_documents_of_their_own(opened: Any) -> None:
    one = opened("one")
    other = one.with_config(BlendConfig(store=one.config.store, namespace="two"))
    for front in (one, other):
        assert front.ingest([DOCUMENT], documents=["readme"], progress=False).computed == 1
    assert one.registered_documents("readme") == other.registered_documents("readme") == {"readme"}
    assert one.forget_documents("readme") == 1
    assert not one.registered_documents("readme") and not one.stored()
    assert other.registered_documents("readme") == {"readme"} and len(other.stored()) == 1
    again = one.with_config(one.config)
    again.ingest([DOCUMENT], documents=["readme"], progress=False)
    assert one.registered_documents("readme") == {"readme"}, "the same namespace"
    assert other.forget_documents("readme") == 1 and len(one.stored()) == 1


def test_tenants_of_the_front_door_see_nothing_of_each_other(opened: Any) -> None:
    bare, one, two = opened(""), opened("one"), opened("two")
    before = {id(blend): counts(blend) for blend in (bare, two)}
    assert one.ingest(DOCUMENT, progress=False).computed == 1
    held = counts(one)["chunks"]
    for blend in (bare, two):  # lookups, counts, bytes
        assert counts(blend) == before[id(blend)]
        assert not blend.generate(DOCUMENT + "Who sleeps?").report.blended
    assert one.generate(DOCUMENT + "Who sleeps?").report.blended
    report = two.ingest(DOCUMENT, progress=False)
    assert (report.computed, report.present) == (1, 0)  # what another has computed tells nothing
    assert counts(one)["chunks"] == held

    again = opened("one")  # what is listed at start
    assert again.ingest(DOCUMENT, progress=False).present == 1
    assert not opened("three").generate(DOCUMENT + "Who sleeps?").report.blended

    two.forget(DOCUMENT)
    assert two.delete_except([]) == 0
    assert counts(one)["chunks"] == held
    assert again.generate(DOCUMENT + "Who sleeps?").report.blended


def test_what_a_tenant_pushes_out_of_anothers_is_not_counted(tmp_path: Path) -> None:
    url = f"{tmp_path}/kv?evict=lru"
    with open_store(url, namespace=MODEL, tenant="one") as one:
        for seed in range(5):
            one.put(key_of(seed), chunk_of(seed))
        nbytes = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
        limited = f"{url}&capacity={nbytes}"
        with open_store(limited, namespace=MODEL, tenant="two") as two:
            for seed in range(5, 8):
                two.put(key_of(seed), chunk_of(seed))
            assert (one.stats().chunks, two.stats().chunks) == (2, 3)
            assert one.stats().evictions == two.stats().evictions == 0
            for seed in range(8, 11):
                two.put(key_of(seed), chunk_of(seed))
            assert (one.stats().chunks, two.stats().chunks) == (0, 5)
            assert two.stats().evictions == 1  # its own


# --- the command line -----------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main([*map(str, arguments), "--json"]) == 0
    data: dict[str, Any] = json.loads(capsys.readouterr().out)
    return data


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One document, a.txt, of as many chunks as the tenant's number says: none 1, one 2, two 3."""
    path, passages = tmp_path / "kv", dict[Path, list[Passage]]()

    class FakeRetriever:
        def __init__(self, kept: list[Passage], folder: Path) -> None:
            passages[folder] = kept

        @staticmethod
        def load(folder: Path) -> Any:
            found = FakeRetriever(passages[folder], folder)
            found.passages = tuple(passages[folder])
            return found

        passages: tuple[Passage, ...] = ()

    monkeypatch.setattr("cacheblend_rag.cli.store.Retriever", FakeRetriever)
    document = str(tmp_path / "a.txt")
    for number, tenant in enumerate(("", "one", "two"), start=1):
        with open_store(str(path), namespace=MODEL, tenant=tenant) as store:
            for seed in range(number):
                store.put(key_of(f"{tenant}{seed}"), chunk_of(seed))
        keys = [key_of(f"{tenant}{seed}") for seed in range(number)]
        register(path, [document] * number, keys, tenant)
        index = index_of(path, tenant)
        index.mkdir()
        (index / MANIFEST).touch()
        passages[index] = [Passage(document, 0, "text")]
    return path


def held(capsys: pytest.CaptureFixture[str], folder: Path) -> list[int]:
    """Chunks of each tenant."""
    return [
        run(capsys, "stats", "--store", folder, "--namespace", tenant)["total"]["chunks"]
        for tenant in ("", "one", "two")
    ]


def test_commands_keep_to_a_tenant(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert held(capsys, folder) == [1, 2, 3]
    everything = run(capsys, "stats", "--store", folder)
    assert (everything["total"]["chunks"], len(everything["namespaces"])) == (6, 3)
    assert run(capsys, "stats", "--store", folder, "--namespace", "x")["total"]["chunks"] == 0
    assert run(capsys, "verify", "--store", folder, "--namespace", "one")["intact"] == 2
    assert run(capsys, "verify", "--store", folder)["intact"] == 6
    for command, arguments in (("forget", [folder.with_name("a.txt")]), ("gc", [])):
        asked = run(capsys, command, *arguments, "--store", folder, "--namespace", "one")
        assert asked["chunks"] == (2 if command == "forget" else 0)
        assert held(capsys, folder) == [1, 0, 3]
    run(capsys, "forget", folder.with_name("a.txt"), "--store", folder)
    assert held(capsys, folder) == [0, 0, 3]


def test_an_archive_may_hold_one_tenants_chunks(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive, other = tmp_path / "kv.tar", tmp_path / "other"
    run(capsys, "export", archive, "--store", folder, "--namespace", "two")
    run(capsys, "import", archive, "--store", other)
    assert held(capsys, other) == [0, 0, 3]
    assert namespaces(other) == namespaces(folder, "two")
    with (tmp_path / "all.tar").open("wb") as target:
        assert len(list(export(folder, target))) == 6
    with (tmp_path / "all.tar").open("rb") as source:
        added = [counted.added for _, counted in import_(source, tmp_path / "all")]
    assert sum(added) == 6


def test_stores_of_tenants_are_apart(tmp_path: Path) -> None:
    url = f"{tmp_path}/kv?quota=100KiB&memory=100KiB"
    with (
        open_store(url, namespace=MODEL, tenant="one") as one,
        open_store(url, namespace=MODEL, tenant="two") as two,
    ):
        one.put(key_of(1), chunk_of(1))
        one.register("a", [key_of(1)])
        assert two.get(key_of(1)) is None and not two.contains(key_of(1))
        assert list(two.scan()) == [] and two.documents() == set() and two.forget("a") == 0
        assert two.stats()[:3] == (0, 0, 0)
        two.discard(key_of(1))
        assert one.get(key_of(1)) is not None
    names = [path.name for path in (tmp_path / "kv" / "v3").iterdir()]
    assert sorted(names) == sorted(of_tenant(MODEL, tenant) for tenant in ("one", "two"))
    with DiskStore(tmp_path / "kv", namespace=MODEL) as bare:
        assert bare.stats().chunks == 0
