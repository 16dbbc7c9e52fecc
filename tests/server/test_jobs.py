"""Ingestions as jobs: nothing that was acknowledged is lost, and nobody sees another's."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from cacheblend_rag.errors import (
    EmptyTextError,
    EngineDeadError,
    StoreError,
    UnavailableError,
)
from cacheblend_rag.ingest import IngestReport
from cacheblend_rag.reason import Reason
from cacheblend_rag.server import jobs as module
from cacheblend_rag.server import jobs_file, runner
from cacheblend_rag.server.bodies import Given
from cacheblend_rag.server.errors import HttpError, as_http
from cacheblend_rag.server.jobs import Job, Jobs, shown
from cacheblend_rag.server.runner import Runner, batches

A, B, C = (Given(f"text {n}") for n in "abc")


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Jobs]]:
    made: list[Jobs] = []

    def make(most: int = 1000) -> Jobs:
        made.append(Jobs(tmp_path / "jobs.sqlite", most))
        return made[-1]

    yield make
    for jobs in made:
        jobs.close()


@pytest.fixture
def jobs(make: Callable[..., Jobs]) -> Jobs:
    return make()


def look(jobs: Jobs, job: Job) -> dict[str, Any]:
    job = jobs.get(job.tenant, job.id)
    return shown(job, jobs.keys(job))


def refused(status: int) -> Any:
    return pytest.raises(HttpError, check=lambda error: error.status == status)


class FakeFront:
    """Stores keys; what it is told to raise it raises."""

    def __init__(self) -> None:
        self.stored: set[str] = set()
        self.raises: list[Exception | None] = []
        self.replaced: list[tuple[str, set[str]]] = []
        self.reason: Reason | None = None
        self.refuses = set[str]()  # texts
        self.hold = threading.Event()
        self.hold.set()
        self.calls = 0
        self.is_over = False

    def look(self) -> None:
        pass

    def batch_tokens(self) -> int:
        return 1  # one chunk a batch

    def ingest_given(self, batch: Sequence[Given]) -> IngestReport:
        self.calls += 1
        assert self.hold.wait(10)
        if self.raises and (error := self.raises.pop(0)):
            raise error
        if self.reason is not None:
            return IngestReport(chunks=len(batch), reason=self.reason, detail="not here")
        keys = [f"key of {chunk.text}" for chunk in batch]
        new = set(keys) - self.stored
        refused = {key: "too large" for key in new if key.removeprefix("key of ") in self.refuses}
        self.stored |= new - refused.keys()
        return IngestReport(
            chunks=len(batch),
            computed=len(new),
            present=len(keys) - len(new),
            not_stored=refused,
            tokens=7,
            keys=keys,
        )

    def replace_document(self, name: str, keys: set[str]) -> None:
        self.replaced.append((name, keys))


@pytest.fixture
def front() -> FakeFront:
    return FakeFront()


@pytest.fixture
def start(tmp_path: Path, front: FakeFront) -> Iterator[Callable[[Jobs], Runner]]:
    started: list[Runner] = []

    def start(jobs: Jobs) -> Runner:
        found: Any = front
        started.append(Runner(jobs, lambda tenant: found, tmp_path / "lock"))
        return started[-1]

    yield start
    front.hold.set()
    for running in started:
        running.stop()


def ended(jobs: Jobs, job: Job) -> dict[str, Any]:
    for _ in range(500):
        if (told := look(jobs, job))["status"] not in ("queued", "in_progress"):
            return told
        time.sleep(0.01)
    raise AssertionError(told)


def until(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError


# ---- the file ------------------------------------------------------------------------------------


def test_a_job_is_there_for_every_process(make: Callable[..., Jobs]) -> None:
    job = make().create("", [A, B])
    told = look(make(), job)
    assert told["status"] == "queued" and told["keys"] is None and told["error"] is None
    assert told["counts"]["total"] == told["counts"]["remaining"] == 2


def test_the_same_key_is_the_same_job(make: Callable[..., Jobs]) -> None:
    job = make().create("t", [A], idempotency="k")
    assert make().create("t", [A], idempotency="k").id == job.id
    assert make().create("u", [A], idempotency="k").id != job.id, "another tenant's"
    for other in ([B], [Given("text a", document="d")]):
        with refused(409):
            make().create("t", other, idempotency="k")
    with refused(409):
        make().create("t", [A], idempotency="k", document="d", replaces=True)


def test_jobs_of_others_are_not_there(jobs: Jobs) -> None:
    job = jobs.create("t", [A])
    with refused(404):
        jobs.get("u", job.id)
    with refused(404):
        jobs.cancel("u", job.id)
    with refused(404):
        jobs.page("u", job.id, 5, "desc")
    assert jobs.page("u", None, 5, "desc") == []


def test_pages(jobs: Jobs) -> None:
    made = [jobs.create("", [A]).id for _ in range(5)]
    newest = [job.id for job in jobs.page("", None, 2, "desc")]
    assert newest == made[:2:-1]
    assert [job.id for job in jobs.page("", newest[-1], 9, "desc")] == made[2::-1]
    assert [job.id for job in jobs.page("", made[1], 2, "asc")] == made[2:4]


def test_too_much_may_not_wait(make: Callable[..., Jobs]) -> None:
    jobs = make(most=10)
    large = Given(list(range(50)))
    jobs.create("", [large])  # alone, one may be as large as it likes
    with pytest.raises(HttpError, match="wait to be ingested") as error:
        jobs.create("", [A])
    assert error.value.status == 429 and int(error.value.headers()["Retry-After"]) > 0
    assert jobs.begin() is not None
    with refused(429):
        jobs.create("", [A])


def test_old_jobs_go(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT", 3)
    made = [jobs.create("", [A]) for _ in range(6)]
    for job in made[:5]:
        jobs.progress(job, [], 0)
        jobs.end(job, "completed")
    jobs.create("", [A])
    assert {job.id for job in jobs.page("", None, 99, "asc")} >= {made[5].id, made[4].id}
    with refused(404):
        jobs.get("", made[0].id)


def test_what_lived_in_an_engine_that_ended_is_void(make: Callable[..., Jobs]) -> None:
    jobs = make()
    jobs.forget_ended("first")
    done, open_ = jobs.create("", [A], idempotency="k"), jobs.create("", [B])
    jobs.end(done, "completed")
    open_.done.place = 1
    jobs.progress(open_, ["key"], 0)
    make().forget_ended("first")
    assert look(jobs, done)["status"] == "completed"
    make().forget_ended("second")
    assert look(jobs, open_)["counts"]["remaining"] == 1 and jobs.keys(open_) == []
    with refused(404):
        jobs.get("", done.id)
    assert jobs.create("", [A], idempotency="k").id != done.id


# ---- running -------------------------------------------------------------------------------------


def test_a_job_runs(jobs: Jobs, front: FakeFront, start: Callable[..., Any]) -> None:
    front.stored.add("key of text c")
    job = jobs.create("", [A, B, A, C])
    start(jobs)
    told = ended(jobs, job)
    assert told["status"] == "completed" and told["completed_at"] >= told["created_at"]
    counts = {n: told["counts"][n] for n in ("computed", "present", "repeated", "remaining")}
    assert counts == {"computed": 2, "present": 1, "repeated": 1, "remaining": 0}
    assert told["keys"] == [f"key of text {n}" for n in "abac"]
    until(lambda: not jobs._rows("SELECT * FROM texts"))  # a moment behind its end


def test_a_document_is_replaced_at_the_end(
    jobs: Jobs, front: FakeFront, start: Callable[..., Any]
) -> None:
    job = jobs.create("", [A, B], document="d", replaces=True)
    empty = jobs.create("", [], document="e", replaces=True)
    start(jobs)
    assert ended(jobs, job)["document"] == "d" and ended(jobs, empty)["status"] == "completed"
    assert front.replaced == [("d", {"key of text a", "key of text b"}), ("e", set())]


def test_what_the_engine_does_not_blend_is_not_stored(
    jobs: Jobs, front: FakeFront, start: Callable[..., Any]
) -> None:
    front.reason = Reason.MLA
    job = jobs.create("", [A], document="d", replaces=True)
    start(jobs)
    told = ended(jobs, job)
    assert (told["status"], told["reason"], told["detail"]) == ("completed", "mla", "not here")
    assert told["keys"] is None and front.replaced == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (StoreError("the disk is full"), "ingestion_failed"),
        (EmptyTextError("text 1 of 1: empty"), "invalid_chunk"),
        (ZeroDivisionError("secret"), "ingestion_failed"),
    ],
)
def test_a_failure_ends_one_job(
    jobs: Jobs, front: FakeFront, start: Callable[..., Any], error: Exception, code: str
) -> None:
    front.raises = [error]
    job, other = jobs.create("", [A], document="d", replaces=True), jobs.create("", [B])
    start(jobs)
    told = ended(jobs, job)
    assert told["status"] == "failed" and told["error"]["code"] == code
    assert "secret" not in told["error"]["message"] and front.replaced == []
    assert ended(jobs, other)["status"] == "completed"


def test_a_job_of_which_nothing_was_stored_has_failed(
    jobs: Jobs, front: FakeFront, start: Callable[..., Any]
) -> None:
    front.refuses = {"text a", "text b"}
    nothing = jobs.create("", [A, B], document="d", replaces=True)
    some, there = jobs.create("", [A, C]), jobs.create("", [A, C])
    start(jobs)
    told = ended(jobs, nothing)
    assert told["status"] == "failed" and told["error"]["code"] == "not_stored"
    assert "too large" in told["error"]["message"] and told["counts"]["not_stored"] == 2
    assert told["keys"] == ["key of text a", "key of text b"]
    assert front.replaced == [], "the document keeps what it had"
    for job in (some, there):
        told = ended(jobs, job)
        assert told["status"] == "completed" and told["counts"]["not_stored"] == 1
        assert "too large" in told["detail"]


def test_the_chunk_that_is_wrong_is_named_by_its_place_in_the_job(
    jobs: Jobs, front: FakeFront, start: Callable[..., Any]
) -> None:
    front.raises = [None, EmptyTextError("text 1 of 1: empty")]
    job = jobs.create("", [A, B, C])
    start(jobs)
    message = ended(jobs, job)["error"]["message"]
    assert message == "of chunks[1] to chunks[1], text 1 of 1: empty"


def test_a_store_that_is_away_is_asked_again(
    jobs: Jobs, front: FakeFront, start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "_PAUSE_S", 0.001)
    front.raises = [UnavailableError("away")] * 2
    job = jobs.create("", [A])
    start(jobs)
    assert ended(jobs, job)["status"] == "completed" and front.calls == 3
    front.raises = [UnavailableError("away")] * 99
    job = jobs.create("", [B])
    assert ended(jobs, job)["error"]["code"] == "store_unavailable"


def test_documents_that_are_deleted_meanwhile(
    jobs: Jobs, front: FakeFront, start: Callable[..., Any]
) -> None:
    of = {name: Given(f"text {name}", document=name[0]) for name in ("d1", "e1", "d2", "e2")}
    front.hold.clear()
    mixed = jobs.create("", list(of.values()))
    start(jobs)
    until(lambda: front.calls == 1)
    put = jobs.create("", [of["d1"], of["d2"]], document="d", replaces=True)
    others = jobs.create("red", [of["d1"]], document="d", replaces=True)
    before = jobs.delete_documents("", ["d"])
    assert before is not None and before.place == 0 and jobs.under_way("") == before
    assert jobs.under_way("red") is None
    later = jobs.create("", [of["d2"]], document="d", replaces=True)
    assert look(jobs, put)["status"] == "cancelled" and front.calls == 1
    front.hold.set()
    told = ended(jobs, mixed)
    assert told["keys"] == ["key of text d1", "key of text e1", "", "key of text e2"]
    assert told["counts"]["deleted"] == 1 and told["counts"]["computed"] == 3
    assert told["counts"]["remaining"] == 0
    assert jobs.under_way("") != before, "from here on what it stored can be forgotten"
    assert ended(jobs, others)["status"] == ended(jobs, later)["status"] == "completed"
    assert front.replaced == [("d", {"key of text d1"}), ("d", {"key of text d2"})]
    assert jobs.delete_documents("", ["d"]) is None


def test_a_put_that_runs_ends_where_its_document_is_deleted(
    jobs: Jobs, front: FakeFront, start: Callable[..., Any]
) -> None:
    front.hold.clear()
    one, two = (Given(f"text {n}", document="d") for n in "12")
    put = jobs.create("", [one, two], document="d", replaces=True)
    start(jobs)
    until(lambda: front.calls == 1)
    before = jobs.delete_documents("", ["d"])
    front.hold.set()
    assert ended(jobs, put)["status"] == "cancelled"
    assert front.replaced == [] and front.stored == {"key of text 1"}
    assert before is not None and jobs.under_way("") is None


def test_cancelled(jobs: Jobs, front: FakeFront, start: Callable[..., Any]) -> None:
    waiting = jobs.create("", [A])
    assert jobs.cancel("", waiting.id).status == "cancelled"
    assert jobs.cancel("", waiting.id).status == "cancelled", "again"
    front.hold.clear()
    job = jobs.create("", [A, B, C], document="d", replaces=True)
    start(jobs)
    until(lambda: front.calls == 1)
    assert jobs.cancel("", job.id).status == "in_progress"
    front.hold.set()
    told = ended(jobs, job)
    assert told["status"] == "cancelled" and told["counts"]["remaining"] == 2
    assert front.replaced == []
    done = jobs.create("", [C])
    ended(jobs, done)
    with refused(409):
        jobs.cancel("", done.id)


@pytest.mark.parametrize("chunks", [[A], []], ids=["some", "none"])
def test_a_cancel_that_is_acknowledged_replaces_nothing(
    jobs: Jobs, front: FakeFront, monkeypatch: pytest.MonkeyPatch, chunks: list[Any], start: Any
) -> None:
    """Behind its last batch, too; later it is refused."""
    job, completes, told = jobs.create("", chunks, document="d", replaces=True), Jobs.completes, []

    def cancelled(self: Jobs, of: Any) -> bool:
        if not told:
            told.append(jobs.cancel("", job.id).status)
        return completes(self, of)

    monkeypatch.setattr(Jobs, "completes", cancelled)
    start(jobs)
    assert ended(jobs, job)["status"] == "cancelled" and told == ["in_progress"]
    assert front.replaced == []
    replace = front.replace_document

    def replacing(name: str, keys: set[str]) -> None:
        with refused(409):
            jobs.cancel("", late.id)
        replace(name, keys)

    monkeypatch.setattr(front, "replace_document", replacing)
    late = jobs.create("", chunks, document="d", replaces=True)
    assert ended(jobs, late)["status"] == "completed" and len(front.replaced) == 1


def test_a_job_that_was_about_to_complete_goes_on_after_a_crash(jobs: Jobs) -> None:
    job = jobs.create("", [A], document="d", replaces=True)
    for _ in range(2):
        begun = jobs.begin()
        assert begun is not None and begun[0].id == job.id
        assert jobs.progress(begun[0], ["k"], 0) and jobs.completes(begun[0])
        jobs.resume()


def test_a_stop_puts_the_job_back(
    make: Callable[..., Jobs], front: FakeFront, start: Callable[..., Any]
) -> None:
    jobs = make()
    front.hold.clear()
    job = jobs.create("", [A, B, C])
    first = start(jobs)
    until(lambda: front.calls == 1)
    threading.Timer(0.05, front.hold.set).start()
    first.stop()
    told = look(jobs, job)
    assert told["status"] == "queued" and told["counts"]["remaining"] == 2
    start(make())
    told = ended(jobs, job)
    assert told["counts"]["computed"] == 3 and front.calls == 3, "none was computed twice"


def test_an_engine_that_died_leaves_the_job(
    make: Callable[..., Jobs], front: FakeFront, start: Callable[..., Any]
) -> None:
    jobs = make()
    front.raises = [EngineDeadError("dead")]
    job = jobs.create("", [A])
    start(jobs)
    until(lambda: front.calls == 1)
    until(lambda: look(jobs, job)["status"] == "queued")
    start(make())
    assert ended(jobs, job)["status"] == "completed"


def test_whatever_fails_while_the_engine_ends_leaves_the_job(
    jobs: Jobs, front: FakeFront, start: Callable[..., Any]
) -> None:
    front.raises, front.is_over = [RuntimeError("a worker went away")], True
    job = jobs.create("", [A])
    start(jobs)
    until(lambda: front.calls == 1)
    until(lambda: look(jobs, job)["status"] == "queued")


class Full:
    """The connection of a file on a disk that is full where a statement has one of these words."""

    room_after: int | None = None  # statements that were refused

    def __init__(self, jobs: Jobs, *words: str) -> None:
        self.own: Any = jobs._db
        self.words, self.refused = words, 0
        jobs._db = self  # type: ignore[assignment]

    def execute(self, statement: str, *values: Any) -> Any:
        if any(word in statement for word in self.words):
            self.refused += 1
            if self.refused == self.room_after:
                self.words = ()
            raise sqlite3.OperationalError("database or disk is full")
        return self.own.execute(statement, *values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)


@pytest.mark.parametrize("word", ["BEGIN", "INSERT", "COMMIT"])
def test_a_full_disk_loses_and_blocks_nothing(make: Callable[..., Jobs], word: str) -> None:
    """Nor is anything acknowledged that is not there."""
    jobs = make()
    before = jobs.create("", [A])
    disk = Full(jobs, word)
    for _ in range(2):
        with pytest.raises(sqlite3.OperationalError, match="full"):
            jobs.create("", [B])
    assert [job.id for job in jobs.page("", None, 9, "asc")] == [before.id]
    disk.words = ()
    after = jobs.create("", [C])
    found = [before.id, after.id]
    assert [job.id for job in jobs.page("", None, 9, "asc")] == found
    assert [job.id for job in make().page("", None, 9, "asc")] == found


class FullWithReserve(Full):
    """It has room as soon as what was set aside is given up."""

    def __init__(self, jobs: Jobs, aside: Path) -> None:
        super().__init__(jobs)
        self._aside = aside

    def execute(self, statement: str, *values: Any) -> Any:
        self.words = ("SET done", "SET status") if self._aside.exists() else ()
        return super().execute(statement, *values)


def test_a_job_on_a_full_disk_fails_and_its_client_is_told(jobs: Jobs, tmp_path: Path) -> None:
    aside = tmp_path / "jobs.sqlite.aside"
    assert aside.stat().st_size >= 1 << 12 and aside.stat().st_blocks
    job = jobs.create("", [A])
    number, chunks = jobs.begin() or (job, [])
    disk = FullWithReserve(jobs, aside)
    with pytest.raises(sqlite3.OperationalError, match="full"):
        jobs.progress(number, ["k"], 0)
    jobs.end(number, "failed", {"code": "ingestion_failed", "message": "full"})
    assert disk.refused >= 2 and len(chunks) == 1
    assert look(jobs, job)["status"] == "failed"
    assert aside.exists(), "the next one may need it"


def test_the_runner_fails_a_job_whose_progress_finds_no_room(
    start: Callable[[Jobs], Runner], jobs: Jobs
) -> None:
    disk = Full(jobs, "SET done")
    job = jobs.create("", [A])
    start(jobs)
    until(lambda: look(jobs, job)["status"] == "failed")
    assert "Free disk space" in look(jobs, job)["error"]["message"] and disk.refused == 1


def test_a_file_that_is_gone_is_no_full_disk() -> None:
    """Whatever its folder is called."""
    assert not jobs_file.is_full(sqlite3.OperationalError("/full/jobs.sqlite was removed"))
    assert jobs_file.is_full(sqlite3.OperationalError("database or disk is full"))


def test_room_is_set_aside_again_once_there_is_some(
    jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aside = tmp_path / "jobs.sqlite.aside"
    aside.unlink()

    def full(*args: int) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(jobs_file.os, "posix_fallocate", full)
        jobs.end(jobs.create("", [A]), "completed")
    jobs.end(jobs.create("", [B]), "completed")
    assert aside.stat().st_size


def test_nothing_is_acknowledged_that_no_later_start_would_find(
    make: Callable[..., Jobs], tmp_path: Path
) -> None:
    jobs, file = make(), tmp_path / "jobs.sqlite"
    before = jobs.create("", [A])
    file.rename(tmp_path / "away")
    with pytest.raises(sqlite3.OperationalError, match="start the server anew"):
        jobs.create("", [B])
    file.touch()
    with pytest.raises(sqlite3.OperationalError, match="removed or replaced"):
        jobs.create("", [B])
    assert as_http(sqlite3.OperationalError("it")).status == 503
    (tmp_path / "away").rename(file)
    after = jobs.create("", [C])
    assert [job.id for job in make().page("", None, 9, "asc")] == [before.id, after.id]


@pytest.mark.parametrize("words", [["BEGIN"], ["COMMIT"], ["status = ?, completed_at"]], ids=str)
def test_jobs_go_on_when_their_disk_has_room_again(
    jobs: Jobs,
    front: FakeFront,
    start: Callable[..., Any],
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner, "_PAUSE_S", 0.01)
    front.hold.clear()
    job = jobs.create("", [A, B])
    start(jobs)
    until(lambda: front.calls == 1)
    disk = Full(jobs, *words)
    # An end that is refused is tried as a failure, which is refused as well: room that came in
    # between would have the job fail.
    disk.room_after = 4
    front.hold.set()
    told = ended(jobs, job)
    assert disk.refused == 4
    assert told["status"] == "completed" and told["error"] is None
    assert told["keys"] == ["key of text a", "key of text b"]


SECRET = "the words of a text that is secret"
LONG = Given(f"{SECRET} " * 20_000, document="d")  # on pages of its own


def traces(folder: Path) -> set[str]:
    """The files in which the text can be read."""
    files = folder.glob("jobs.sqlite*")
    return {file.name for file in files if SECRET.encode() in file.read_bytes()}


def is_deleted(jobs: Jobs) -> None:
    jobs.delete_documents("", ["d"])


def is_cancelled(jobs: Jobs) -> None:
    [job] = jobs.page("", None, 1, "asc")
    jobs.cancel("", job.id)


def has_ended(jobs: Jobs) -> None:
    job, _ = jobs.begin() or pytest.fail("none waits")
    job.done.place = 1
    jobs.progress(job, ["k" * 64], 0)
    jobs.end(job, "completed")


def is_void(jobs: Jobs) -> None:
    jobs.forget_ended("an engine")
    job, _ = jobs.begin() or pytest.fail("none waits")
    jobs._write_though_full(lambda db: jobs._end(db, job, "completed", None))
    jobs.forget_ended("another engine")


@pytest.mark.parametrize("goes", [is_deleted, is_cancelled, has_ended, is_void])
@pytest.mark.parametrize("chunk", [Given(SECRET, document="d"), LONG], ids=["short", "long"])
def test_no_text_stays_on_the_disk(
    make: Callable[..., Jobs], tmp_path: Path, goes: Callable[[Jobs], None], chunk: Given
) -> None:
    jobs, other = make(10**9), make(10**9)
    jobs.create("", [chunk])
    assert traces(tmp_path), "or it could not be seen to go"
    goes(jobs)
    assert not traces(tmp_path)
    assert other.begin() is None


def test_a_text_that_could_not_be_erased_is_erased_later(
    make: Callable[..., Jobs], start: Callable[..., Any], tmp_path: Path
) -> None:
    """The end of its job is noted: to overwrite a text takes more room than that."""
    jobs = make(10**9)
    disk = Full(jobs, "FROM texts", "wal_checkpoint")
    job = jobs.create("", [LONG])
    jobs.cancel("", job.id)
    assert look(jobs, job)["status"] == "cancelled" and disk.refused and traces(tmp_path)
    make(10**9).resume()
    assert not traces(tmp_path), "a later start does it"
    again = jobs.create("", [LONG])
    jobs.cancel("", again.id)
    assert traces(tmp_path)
    disk.words = ()
    start(jobs)
    until(lambda: not traces(tmp_path))


def test_the_end_of_a_large_job_is_a_small_write(make: Callable[..., Jobs], tmp_path: Path) -> None:
    """It has to find room in what was set aside of a full disk; so its texts are not in its row."""
    jobs, log = make(10**9), tmp_path / "jobs.sqlite-wal"
    jobs.create("", [LONG])
    job, _ = jobs.begin() or pytest.fail("none waits")
    jobs._clean()
    Full(jobs, "FROM texts", "wal_checkpoint")
    job.done.place, job.done.tokens = 1, 10**9
    jobs.progress(job, ["k" * 64], 0)
    jobs.end(job, "completed")
    assert 0 < log.stat().st_size < len(str(LONG.text)) / 4


def test_a_reader_that_is_in_the_way_is_not_waited_for(
    make: Callable[..., Jobs], start: Callable[..., Any], tmp_path: Path
) -> None:
    jobs, other = make(10**9), make(10**9)
    job = jobs.create("", [LONG])
    other._db.execute("BEGIN")
    assert other._db.execute("SELECT COUNT(*) FROM jobs").fetchone() == (1,)
    before = time.monotonic()
    jobs.cancel("", job.id)
    assert time.monotonic() - before < 10 and traces(tmp_path)
    other._db.execute("COMMIT")
    start(jobs)
    until(lambda: not traces(tmp_path))


def test_a_text_is_erased_later_where_another_process_runs_the_jobs(
    make: Callable[..., Jobs], front: FakeFront, start: Callable[..., Any], tmp_path: Path
) -> None:
    runs, jobs, reader = (make(10**9) for _ in range(3))
    front.hold.clear()
    running = runs.create("", [A])
    start(runs)
    until(lambda: front.calls == 1)
    start(jobs)
    job = jobs.create("", [LONG])
    reader._db.execute("BEGIN")
    assert reader._db.execute("SELECT COUNT(*) FROM jobs").fetchone() == (2,)
    jobs.cancel("", job.id)
    assert traces(tmp_path)
    reader._db.execute("COMMIT")
    until(lambda: not traces(tmp_path))
    assert look(runs, running)["status"] == "in_progress", "its process was not through"
    front.hold.set()


def test_ends_that_two_threads_note_are_both_erased(
    make: Callable[..., Jobs], tmp_path: Path
) -> None:
    jobs = make(10**9)
    first, second = jobs.create("", [LONG]), jobs.create("", [LONG])
    clean, cleaned = jobs._clean, list[bool]()

    def clean_beside() -> bool:
        cleaned.append(clean())
        if len(cleaned) == 2:  # the first thread is all but through
            with jobs._writing() as db:
                jobs._end(db, second, "cancelled", None)
            jobs._has_texts = True  # as the other thread begins to erase
        return cleaned[-1]

    jobs._clean = clean_beside  # type: ignore[method-assign]
    jobs.cancel("", first.id)
    assert traces(tmp_path)
    jobs.erase()
    assert not traces(tmp_path)


def test_one_process_runs_them_and_another_takes_over(
    make: Callable[..., Jobs], front: FakeFront, start: Callable[..., Any]
) -> None:
    jobs = make()
    front.hold.clear()
    job = jobs.create("", [A, B])
    first, second = start(jobs), start(make())
    until(lambda: front.calls == 1)
    time.sleep(0.1)
    assert front.calls == 1, "two run the same"
    front.hold.set()
    ended(jobs, job)
    first.stop()
    later = jobs.create("", [C])
    second.wake()
    assert ended(jobs, later)["status"] == "completed"


def test_batches() -> None:
    chunks = [Given([0] * n) for n in (5, 5, 30, 2)]
    sizes = [[len(c.text) for c in batch] for batch in batches(chunks, lambda: 13)]
    assert sizes == [[5, 5], [30], [2]]
