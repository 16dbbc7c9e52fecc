"""The order in which chunks of a memory store leave; the disk store's is in its index."""

from __future__ import annotations

import heapq
from collections.abc import Container
from typing import NamedTuple

from cacheblend_rag.store.evict.base import Policy, Usage, age_step, warmed

_REMEMBERED = 4  # heats kept of chunks that left, times the number of chunks held
_FEWEST_REMEMBERED = 1000


class Member(NamedTuple):
    """A chunk held."""

    nbytes: int
    cost: float
    priority: float


class Ranking:
    """At most ``capacity`` bytes of chunks, ranked by ``policy``. Not thread-safe."""

    def __init__(self, policy: Policy, capacity: int) -> None:
        self.nbytes = 0
        self._policy, self._capacity = policy, capacity
        self._members: dict[str, Member] = {}
        self._heats: dict[str, float] = {}  # of members and of some that left, least recent first
        self._heap: list[tuple[float, str]] = []  # also outdated pairs, skipped when met
        self._tick, self._age = 0, 0.0

    def use(self, key: str) -> None:
        """Note a use of a member; does nothing where it is none."""
        if key in self._members:
            nbytes, cost, _ = self._members[key]
            self._rank(key, nbytes, cost)

    def add(self, key: str, nbytes: int, cost: float, pinned: Container[str]) -> list[str] | None:
        """Make ``key`` a member; returns the members that had to leave, or None where it stays out.

        It stays out where it is too large, ranks below what it would push out (if the policy
        refuses), or all the others are pinned.
        """
        if key in self._members:
            self.use(key)
            return []
        usage = self._usage(key, nbytes, cost)
        priority = self._policy.priority(usage)
        victims = self._victims(nbytes, priority, pinned)
        if victims is None:
            return None
        for victim in victims:
            self.remove(victim)
        self.nbytes += nbytes
        self._place(key, Member(nbytes, cost, priority))
        return victims

    def remove(self, key: str) -> None:
        """Drop a member; its heat is remembered for a while."""
        self.nbytes -= self._members.pop(key).nbytes

    def _rank(self, key: str, nbytes: int, cost: float) -> None:
        priority = self._policy.priority(self._usage(key, nbytes, cost))
        self._place(key, Member(nbytes, cost, priority))

    def _place(self, key: str, member: Member) -> None:
        self._members[key] = member
        heapq.heappush(self._heap, (member.priority, key))
        # A pair that is outdated stays where it is, since a heap has no cheap removal. Where most
        # are, a heap that is built anew is cheaper than skipping them.
        if len(self._heap) > 4 * len(self._members) + 100:
            self._heap = [(m.priority, k) for k, m in self._members.items()]
            heapq.heapify(self._heap)

    def _usage(self, key: str, nbytes: int, cost: float) -> Usage:
        self._tick += 1
        self._age += age_step(len(self._members))
        heat = warmed(self._heats.pop(key, None), self._age)
        # Taken out and put in again: a dictionary keeps the order of insertion, which is that of
        # uses.
        self._heats[key] = heat  # now the most recent
        if len(self._heats) > _REMEMBERED * len(self._members) + _FEWEST_REMEMBERED:
            self._forget()
        return Usage(heat, cost, nbytes, self._tick)

    def _forget(self) -> None:
        gone = next((key for key in self._heats if key not in self._members), None)
        if gone is not None:
            del self._heats[gone]

    def _victims(self, nbytes: int, priority: float, pinned: Container[str]) -> list[str] | None:
        missing = self.nbytes + nbytes - self._capacity
        victims: list[tuple[float, str]] = []
        passed: list[tuple[float, str]] = []  # pinned, to be put back
        while missing > 0 and self._heap:
            rank, key = heapq.heappop(self._heap)
            # Outdated: its chunk left, or was used since and has a later pair.
            if key not in self._members or self._members[key].priority != rank:
                continue
            if key in pinned:
                passed.append((rank, key))
                continue
            # Before the policy is asked, so that what was taken off the heap is put back where it
            # refuses.
            victims.append((rank, key))
            if self._policy.refuses and rank > priority:
                break
            missing -= self._members[key].nbytes
        refused = missing > 0
        for pair in passed + (victims if refused else []):
            heapq.heappush(self._heap, pair)
        return None if refused else [key for _, key in victims]
