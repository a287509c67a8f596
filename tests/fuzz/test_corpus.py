"""The kept corpus of the fuzzer, replayed; and that its targets see what they are there for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import fuzz_targets
import pytest
from fuzz_targets import CODECS, TARGETS, encoded

import holoray
from holoray.errors import FormatError

CORPUS = Path(__file__).with_name("corpus")


@pytest.mark.fault("mutated")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's remarks about weights that are nonsense
@pytest.mark.parametrize("target", TARGETS)
def test_the_corpus_is_harmless(target: str) -> None:
    inputs = sorted((CORPUS / target).iterdir())
    assert len(inputs) > 5
    for path in inputs:
        TARGETS[target](path.read_bytes())


def accepted(target: str, reader: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """How many inputs of a corpus the reader behind a target takes, and how many it refuses."""
    taken = refused = 0
    honest: Callable[..., object] = getattr(fuzz_targets, reader)

    def counting(*arguments: object) -> object:
        nonlocal taken, refused
        try:
            result = honest(*arguments)
        except holoray.HolorayError:
            refused += 1
            raise
        taken += 1
        return result

    monkeypatch.setattr(fuzz_targets, reader, counting)
    for path in (CORPUS / target).iterdir():
        TARGETS[target](path.read_bytes())
    return taken, refused


@pytest.mark.parametrize(("target", "reader"), [("manifest", "read_manifest"), ("safetensors", "SafetensorsFile")])
def test_the_corpus_has_what_is_taken_and_what_is_refused(
    target: str, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, refused = accepted(target, reader, monkeypatch)
    assert taken >= 1
    assert refused >= 5


@pytest.mark.parametrize("codec", CODECS)
def test_an_honest_payload_reaches_the_decoder(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, own = encoded(codec)
    reached = []
    honest = holoray.TensorDecoder.reconstruct

    def reconstruct(decoder: holoray.TensorDecoder) -> object:
        reached.append(codec)
        return honest(decoder)

    monkeypatch.setattr(holoray.TensorDecoder, "reconstruct", reconstruct)
    for fragment in own:
        TARGETS["fragments"](bytes([CODECS.index(codec), fragment.index]) + fragment.payload)
    assert len(reached) == len(own)


def test_a_reader_that_lies_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    path = CORPUS / "safetensors" / "honest-several"
    monkeypatch.setattr("safetensors.deserialize", lambda data: [])
    with pytest.raises(AssertionError, match="reference"):
        TARGETS["safetensors"](path.read_bytes())

    def crash(data: bytes) -> None:
        raise FormatError("ours") if not data else ValueError("not ours")

    monkeypatch.setattr(fuzz_targets, "read_manifest", crash)
    TARGETS["manifest"](b"")
    with pytest.raises(ValueError, match="not ours"):
        TARGETS["manifest"](b"x")
