"""What docs/fleet.md states of routing and of scale, on a small scale."""

from __future__ import annotations

import pytest
from benchmark import benchmark


def simulated(topics: bool) -> dict[str, object]:
    route = benchmark("route")
    texts = route.corpus(0)
    requests = list(route.traffic(texts, 4, topics, 1800, 1))
    made = route.policies(800, [1.0], [route.SLACK])
    found = {}
    for name, make in made.items():
        replicas = route.Replicas(4, 800)
        found[name] = route.run(requests, replicas, make(replicas))
    return found


def test_warm_routing_beats_its_rivals_where_traffic_has_topics() -> None:
    found = simulated(True)
    warm = found.pop("warm")
    assert found.keys() == {"round robin", "two choices", "prefix"}
    for result in found.values():
        assert warm.hits >= 1.5 * result.hits  # type: ignore[attr-defined]
    assert warm.load <= 1.25 and warm.window_load <= 1.25  # type: ignore[attr-defined]


def test_the_prefix_rival_does_what_is_documented() -> None:
    """Otherwise the comparison would be with a straw man."""
    route = benchmark("route")
    replicas = route.Replicas(3, 10)
    prefix = route.Prefix(replicas, 0)
    first = prefix.choose("a" * 100)
    assert prefix.choose("a" * 50 + "b" * 50) == first  # half of it is common
    second = prefix.choose("c" * 100)
    assert second != first  # nothing is common: the one with the least text
    assert prefix.choose("c" * 11 + "d" * 89) == second
    assert prefix.choose("c" * 9 + "e" * 91) not in (first, second)  # less than a tenth
    replicas.in_flight[first] = 10
    assert {prefix.choose("a" * 100) for _ in range(20)} <= {0, 1, 2} - {first}
    assert route.common_beginning("abcd", "abxd") == 2 and route.common_beginning("", "a") == 0


@pytest.mark.slow
def test_warm_routing_costs_nothing_where_traffic_has_no_topics() -> None:
    found = simulated(False)
    warm = found.pop("warm")
    for result in found.values():
        assert warm.hits > result.hits  # type: ignore[attr-defined]
    assert warm.load <= 1.25  # type: ignore[attr-defined]


def test_bounds_of_scale_are_kept_on_a_small_scale() -> None:
    scale = benchmark("fleet_scale")
    found = scale.feed(150, 2, 10) | scale.router(40, 512, 50) | scale.index(3000)
    assert found.keys() >= scale.BOUNDS.keys()
    # not times, which are for machines that do nothing else, nor the index, whose arrays grow ahead
    sizes = [n for n in scale.BOUNDS if "_bytes_" in n and not n.startswith("index")]
    assert len(sizes) == 2 and all(found[name] <= scale.BOUNDS[name] for name in sizes)
    assert found["feed_bytes_a_changed_chunk"] > 1600  # the chunk's token ids came
    assert found["index_bytes_a_chunk"] > 4 * scale.TOKENS
