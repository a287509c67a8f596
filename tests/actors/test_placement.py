"""Who holds which tensors: dealt evenly, taken over, spread, claimed after a coordinator died."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from manifests import make_manifest

from holoray.actors.messages import Shard
from holoray.actors.placement import Placement, Shards, deal
from holoray.errors import UsageError

SIZES = st.lists(st.integers(0, 1000), min_size=1, max_size=30)


def tensors_of(shards: Shards, *nodes: str) -> list[int]:
    found = [shards.of_node(node) for node in nodes]
    return sorted(tensor for shard in found if shard is not None for tensor in shard.tensors)


@given(SIZES, st.integers(1, 5))
def test_places_differ_by_no_more_than_the_largest(sizes: list[int], count: int) -> None:
    places = deal(dict(enumerate(sizes)), [0] * count)
    assert sorted(places) == list(range(len(sizes)))
    totals = [sum(sizes[t] for t in places if places[t] == place) for place in range(count)]
    assert max(totals) - min(totals) <= max(sizes)
    assert places == deal(dict(reversed(list(enumerate(sizes)))), [0] * count), "whatever order they are named in"


@given(SIZES, st.integers(1, 4), st.lists(st.tuples(st.sampled_from("svd"), st.integers(0, 5)), max_size=30))
def test_no_tensor_has_two_holders_and_all_find_one(sizes: list[int], count: int, steps: list[tuple[str, int]]) -> None:
    """Devices come, go, and get what is left over, in any order."""
    shards, here = Shards(sizes, count), set[str]()
    for step, number in steps:
        node = f"d{number}"
        if step == "s":
            here.add(node)
            before = shards.of_node(node)
            shards.seat(node)
            assert not before or not before.tensors or shards.of_node(node) == before, "who has a shard keeps it"
        elif step == "v":
            here.discard(node)
            shards.vacate(node)
        else:
            assert shards.spread(sorted(here)) == bool(here)
            assert shards.are_all_held == bool(here)
        held = tensors_of(shards, *here)
        assert len(held) == len(set(held))
        assert shards.are_all_held == (held == list(range(len(sizes))))
    for node in map(str, range(count)):
        shards.seat(node)
    everybody = [*here, *map(str, range(count))]
    assert tensors_of(shards, *everybody) == list(range(len(sizes))), "as many newcomers as are expected suffice"


@given(st.permutations([(1, {0, 1}), (2, {1, 2}), (3, {2, 3})]))
def test_claims_are_settled_by_their_numbers_in_whatever_order_they_come(claims: list[tuple[int, set[int]]]) -> None:
    shards = Shards([1] * 5, 3, reign=2)
    for number, tensors in claims:
        shards.claim(f"d{number}", Shard((1, number), frozenset(tensors)))
    held = {number: tensors_of(shards, f"d{number}") for number in (1, 2, 3)}
    assert held == {1: [0], 2: [1], 3: [2, 3]}
    assert not shards.are_all_held
    shards.seat("late")
    assert tensors_of(shards, "late") == [4]
    shards.claim("d9", Shard((1, 99), frozenset({4})))
    assert tensors_of(shards, "d9") == [], "what the coordinator of now gave counts more"


def test_pins_keep_tensors_together_and_the_rest_makes_up_for_it() -> None:
    manifest = make_manifest(6)
    names = [entry.spec.name for entry in manifest.tensors]
    pins = Placement.parse("shard", [f"{names[0]}=1", "t[01]=0", f"{names[2]}=1"])
    shards = Shards.of(manifest, 2, pins)
    for node in ("a", "b"):
        shards.seat(node)
    assert {0, 2} <= set(tensors_of(shards, "b"))
    assert {1} <= set(tensors_of(shards, "a"))
    assert tensors_of(shards, "a", "b") == list(range(len(names)))


def test_no_shard_is_larger_than_it_must_be_where_one_could_take_two() -> None:
    """Two vacant shards and two devices that come: each gets one, though the first could take both."""
    shards = Shards([5, 4, 3], 3)
    for node in ("a", "b", "c"):
        shards.seat(node)
    for node in ("a", "b"):
        shards.vacate(node)
    for node in ("d", "e"):
        shards.seat(node)
    assert sorted(len(tensors_of(shards, node)) for node in ("c", "d", "e")) == [1, 1, 1]


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        ("scatter", []),
        ("replicate", ["*=0"]),
        ("shard", ["*"]),
        ("shard", ["=1"]),
        ("shard", ["*=-1"]),
        ("shard", ["*=one"]),
    ],
)
def test_placements_without_meaning_are_refused(kind: str, texts: list[str]) -> None:
    with pytest.raises(UsageError):
        Placement.parse(kind, texts)


@pytest.mark.parametrize("text", ["*=2", "nobody*=0"])
def test_pins_of_no_shard_or_no_tensor_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"no (shard|tensor)"):
        Placement.parse("shard", [text]).pinned(make_manifest(6), 2)


def test_dealing_is_greedy_the_largest_first() -> None:
    sizes = dict(enumerate([7, 1, 5, 4, 3]))
    totals = [0, 0]
    for tensor, place in deal(sizes, [0, 0]).items():
        totals[place] += sizes[tensor]
    assert totals == [11, 9] or totals == [10, 10]
    assert list(itertools.islice(deal(sizes, [0, 0]), 3)) == [0, 2, 3]
