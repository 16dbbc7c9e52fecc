"""Memory, descriptors and threads of the processes of a server, over time. Linux only."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

PARTS = 5  # of a life: the first fifth behind the warm-up is compared with the last


class Sample(NamedTuple):
    """One process at one time."""

    at_s: float
    kib: int  # resident
    descriptors: int
    threads: int


class Growth(NamedTuple):
    """Of one thing of one process, by medians."""

    process: str
    what: str
    first: float
    last: float

    @property
    def share(self) -> float:
        return self.last / self.first - 1


class Watch:
    """Looks at every process of a session, again and again, until it is stopped.

    Args:
        session: id of the process that began it.
        every_s: seconds between two looks.
    """

    def __init__(self, session: int, every_s: float = 5.0) -> None:
        self._session, self._every_s = session, every_s
        self._started, self._stopped = time.monotonic(), threading.Event()
        self.samples: dict[str, list[Sample]] = {}  # by process
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._stopped.set()
        self._thread.join()

    def growth(self, warm_up_s: float) -> list[Growth]:
        """Of each process that lived longer than the warm-up."""
        found = list[Growth]()
        for process, samples in self.samples.items():
            warm = [sample for sample in samples if sample.at_s >= warm_up_s]
            part = len(warm) // PARTS
            if not part:
                continue
            for what in ("kib", "descriptors", "threads"):
                first, last = (
                    statistics.median(getattr(sample, what) for sample in some)
                    for some in (warm[:part], warm[-part:])
                )
                found.append(Growth(process, what, first, last))
        return found

    def _run(self) -> None:
        while not self._stopped.wait(self._every_s):
            now = time.monotonic() - self._started
            for process in _session(self._session):
                try:
                    name, sample = _name(process), _sample(process, now)
                except OSError:  # it has ended
                    continue
                self.samples.setdefault(f"{name} {process.name}", []).append(sample)


def _session(leader: int) -> Sequence[Path]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                inside = os.getsid(int(entry.name)) == leader
            except ProcessLookupError:
                continue
            found += [entry] if inside else []
    return found


def _name(process: Path) -> str:
    """Its title; of one that has none of its own, the module that it runs."""
    words = (process / "cmdline").read_bytes().rstrip(b"\0 ").decode(errors="replace").split("\0")
    if "-m" in words:
        return " ".join(words[words.index("-m") + 1 :][:2])
    if "-c" in words:  # a helper of multiprocessing
        return words[words.index("-c") + 1].partition("import ")[2].partition(";")[0]
    return words[0]


def _sample(process: Path, at_s: float) -> Sample:
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    kib = int(status["VmRSS"].split()[0]) if "VmRSS" in status else 0
    descriptors = len(list((process / "fd").iterdir()))
    return Sample(at_s, kib, descriptors, int(status["Threads"]))
