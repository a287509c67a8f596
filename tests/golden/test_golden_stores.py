"""Stores that earlier versions wrote: each is read back, whole and in parts."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from make import DIRECTORY, STORES, weights

import holoray
from holoray.kernels.registry import ENCODERS
from holoray.tensor import as_bytes

FOUND = sorted(path for name in STORES for path in (DIRECTORY / name).glob("[0-9]*"))
TOLERANCE = {"raw": 0.0, "planes": 0.0, "spectral": 1e-6, "projection": 1e-6, "lowrank": 1e-6}


def named(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


@pytest.mark.parametrize("path", FOUND, ids=named)
def test_everything_is_there(path: Path) -> None:
    sealed = holoray.open(path, expect=(path / "ROOT").read_text().strip())
    assert sealed.verify() == []
    found, expected = sealed.load(), weights(path.parent.name)
    assert found.keys() == expected.keys()
    for tensor in sealed.manifest.tensors:
        got, true = found[tensor.name], expected[tensor.name]
        assert (got.dtype, got.shape) == (true.dtype, true.shape)
        assert tensor.sha256 == hashlib.sha256(as_bytes(true).data).digest()
        tolerance = TOLERANCE[tensor.codec] if tensor.config.get("coefficients") != "float16" else 1e-3
        error = float(np.linalg.norm(got.astype(np.float64) - true.astype(np.float64)))
        assert error <= tolerance * float(np.linalg.norm(true.astype(np.float64)))
        if tolerance == 0:
            assert as_bytes(got).tobytes() == as_bytes(true).tobytes()


@pytest.mark.parametrize("path", FOUND, ids=named)
def test_parts_have_the_quality_of_the_books(path: Path) -> None:
    sealed, expected = holoray.open(path), weights(path.parent.name)
    energy = sum(float(np.sum(w.astype(np.float64) ** 2)) for w in expected.values() if w.dtype.kind != "i")
    mandatory = sum(t.stored_bytes for t in sealed.manifest.tensors if t.mandatory)
    least = sealed.quality_curve()[0].bytes + mandatory
    for nbytes in (point.bytes for point in sealed.quality_curve() if point.bytes >= least):
        loader = sealed.loader()
        loader.load(holoray.Target(bytes=nbytes))
        found = loader.state_dict()
        differences = (found[name].astype(np.float64) - true.astype(np.float64) for name, true in expected.items())
        error = sum(float(np.sum(difference**2)) for difference in differences)
        assert loader.quality.ratio == pytest.approx(1 - error / energy, abs=2e-5)


def test_every_codec_has_one() -> None:
    assert {path.parent.name for path in FOUND} == STORES.keys()
    codecs = {t.codec for path in FOUND for t in holoray.open(path).manifest.tensors}
    assert codecs == ENCODERS.keys()
    carried = {t.codec for path in FOUND for t in holoray.open(path).manifest.tensors if t.essential_gain}
    assert carried == {"spectral", "projection", "lowrank"}


def test_the_weights_are_still_the_weights() -> None:
    """Golden stores are compared with arrays that are computed: pinned here."""
    digest = hashlib.sha256()
    for name in STORES:
        for array in weights(name).values():
            digest.update(as_bytes(array).data)
    assert digest.hexdigest() == "f3263e1a7122c623dad4d03874d606c38712578da002c18105fc54985e90a88c"
