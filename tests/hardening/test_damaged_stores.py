"""Every truncation and every flipped bit of a small store ends in a typed error or in exactly the unchanged weights.

`make test` tries every truncation of every file, every bit of `ROOT` and of the manifest, and of the fragment files one
bit of every few bytes; the slow tests try every bit of those too.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from small_store import PATTERNS, Blobs, bits, blobs, fragment_files, load, pristine, store_of, weights

import holoray
from holoray.errors import HolorayError
from holoray.pipelines.sealed_store import SealedStore
from holoray.stores import MANIFEST, ROOT

VERIFY_STEP = 121
"""Sampled bits of fragment files; odd, so that all places in a byte are met."""
LOAD_STEP = 307


def flip(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def damaged(name: str, data: bytes) -> Blobs:
    return blobs() | {name: data}


def fate(files: Blobs) -> str:
    """`error` or `unchanged`; anything else that open and load come to is raised or reported as it is."""
    try:
        loaded = load(store_of(files))
    except HolorayError:
        return "error"
    return "unchanged" if loaded == pristine() else "changed silently"


def flips_of_fragments(step: int) -> Iterator[tuple[str, int]]:
    for name in fragment_files():
        for bit in range(0, 8 * len(blobs()[name]), step):
            yield name, bit


def undetected(step: int) -> list[tuple[str, int]]:
    """Flips in fragment files that `verify` does not see, or blames on another file."""
    files = blobs()
    sealed = SealedStore(store_of(files))
    store = sealed.store = store_of(files)
    missed = []
    for name, bit in flips_of_fragments(step):
        store.blobs[name] = flip(files[name], bit)
        if {bad.file for bad in sealed.verify()} != {name}:
            missed.append((name, bit))
        store.blobs[name] = files[name]
    return missed


def test_the_undamaged_store_is_whole() -> None:
    assert fate(blobs()) == "unchanged"
    assert SealedStore(store_of(blobs())).verify() == []


@pytest.mark.fault("flipped")
def test_every_bit_of_root_and_manifest_is_sealed() -> None:
    for name in (ROOT, MANIFEST):
        data = blobs()[name]
        harmless = [bit for bit in range(8 * len(data)) if fate(damaged(name, flip(data, bit))) != "error"]
        assert harmless == [], name


@pytest.mark.fault("truncated")
def test_every_truncation_of_root_and_manifest_is_an_error() -> None:
    for name in (ROOT, MANIFEST):
        data = blobs()[name]
        harmless = [length for length in range(len(data)) if fate(damaged(name, data[:length])) != "error"]
        assert harmless == [], name


@pytest.mark.fault("truncated")
@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_truncations_of_every_fragment_file_are_errors(step: int) -> None:
    files = blobs()
    sealed = SealedStore(store_of(files))
    store = sealed.store = store_of(files)
    for name in fragment_files():
        for length in range(len(files[name]) - 1, -1, -step):
            store.blobs[name] = files[name][:length]
            with pytest.raises(HolorayError):
                sealed.load()
        store.blobs[name] = files[name]


@pytest.mark.fault("truncated")
def test_verify_names_every_truncated_file() -> None:
    files = blobs()
    sealed = SealedStore(store_of(files))
    store = sealed.store = store_of(files)
    for name in fragment_files():
        for length in range(0, len(files[name]), 31):
            store.blobs[name] = files[name][:length]
            assert {bad.file for bad in sealed.verify()} == {name}, length
        store.blobs[name] = files[name]


@pytest.mark.fault("flipped")
def test_verify_names_the_file_of_flipped_bits() -> None:
    assert undetected(VERIFY_STEP) == []


@pytest.mark.fault("flipped")
def test_flipped_bits_of_fragment_files_never_change_a_weight() -> None:
    """Bits between the payloads are not read by a load, so some flips are harmless; none is silent."""
    fates = {fate(damaged(name, flip(blobs()[name], bit))) for name, bit in flips_of_fragments(LOAD_STEP)}
    assert fates == {"error", "unchanged"}


@pytest.mark.fault("missing")
def test_files_that_are_missing_empty_or_longer() -> None:
    for name in blobs():
        missing = blobs()
        del missing[name]
        assert fate(missing) == "error", name
        assert fate(damaged(name, b"")) == "error", name
    for name in (ROOT, MANIFEST):
        assert fate(damaged(name, blobs()[name] + b"\0")) == "error"
    for name in fragment_files():
        longer = damaged(name, blobs()[name] + b"\0")
        assert fate(longer) == "unchanged"
        assert {bad.file for bad in SealedStore(store_of(longer)).verify()} == {name}


@pytest.mark.fault("replayed")
def test_files_of_another_store_are_refused() -> None:
    """The same checkpoint encoded with another seed: every file is whole, but not of this store."""
    other = holoray.MemoryStore()
    holoray.encode(weights(), other, pattern=PATTERNS, fragments=4, seed=1, threads=1)
    for name, data in other.blobs.items():
        if data != blobs()[name]:
            assert fate(damaged(name, data)) == "error", name


@pytest.mark.fault("flipped")
@pytest.mark.slow
def test_verify_sees_every_single_bit() -> None:
    assert undetected(1) == []


@pytest.mark.fault("flipped")
@pytest.mark.slow
def test_no_single_bit_changes_a_weight_silently() -> None:
    files = blobs()
    silent: list[tuple[str, int]] = []
    sealed = SealedStore(store_of(files))
    store = sealed.store = store_of(files)  # opened once: flips of fragment files do not change that
    for name, bit in flips_of_fragments(1):
        store.blobs[name] = flip(files[name], bit)
        try:
            if bits(sealed.load()) != pristine():
                silent.append((name, bit))
        except HolorayError:
            pass
        store.blobs[name] = files[name]
    assert silent == []
