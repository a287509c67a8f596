"""A load of every codec onto a device, to a target and on from there: what the host loads, within rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import holoray
from holoray.errors import CapacityError
from holoray.kernels.device import Device
from holoray.kernels.device_accumulators import turn_nbytes
from holoray.pipelines.api import load_file


@pytest.mark.parametrize(
    ("codec", "options", "tolerance"),
    [
        ("raw", {}, 0.0),
        ("planes", {}, 0.0),
        ("projection", {}, 0.0),
        ("spectral", {}, 1e-6),
        ("spectral", {"tile": 16}, 1e-6),
        ("spectral", {"essential": 0.3, "coefficients": "float16"}, 1e-6),
        ("lowrank", {}, 1e-5),
    ],
    ids=str,
)
def test_a_load(codec: str, options: dict[str, Any], tolerance: float, device: Device) -> None:
    rng = np.random.default_rng(0)
    model = {
        "half": (0.05 * rng.standard_normal((65, 130))).astype(ml_dtypes.bfloat16),
        "single": rng.standard_normal((33, 70)).astype(np.float32),
        "ids": np.arange(9),
    }
    store = holoray.MemoryStore()
    holoray.encode(model, store, codec=codec, **options)
    host = holoray.open(store).load()
    loader = holoray.open(store).loader(device=device)
    loader.load(holoray.Target(quality=0.5))
    loader.load()
    assert loader.quality.complete
    for name, array in loader.state_dict().items():
        got = device.download(array).view(host[name].dtype)
        if tolerance and name == "single":
            np.testing.assert_allclose(got, host[name], atol=tolerance * float(np.abs(host[name]).max()), rtol=0)
        elif tolerance and name == "half":  # at most the other side of a tie
            apart = got.view(np.int16).astype(int) - host[name].view(np.int16).astype(int)
            assert np.abs(apart).max() <= 1
        else:
            assert got.tobytes() == host[name].tobytes()


@pytest.mark.fault("no-device-memory")
def test_a_tensor_whose_state_does_not_fit_goes_to_the_host_alone(device: Device, tmp_path: Path) -> None:
    """Room for the small ones: weights, state, and what their transform takes. `projection` is equal bit for bit."""
    rng = np.random.default_rng(1)
    model = {f"small.{n}": rng.standard_normal((64, 70)).astype(np.float32) for n in range(3)}
    model["large"] = rng.standard_normal((200, 300)).astype(np.float32)
    store = holoray.MemoryStore()
    holoray.encode(model, store, codec="projection")
    sealed = holoray.open(store)
    entry, codec = sealed.entry("large"), sealed.manifest.codecs[sealed.manifest.by_name["large"]]
    room = turn_nbytes(entry.spec, codec) - 1  # without it nothing is left for the others
    report = load_file(sealed, tmp_path / "there", device=device, device_bytes=room)
    assert report.spilled == 1
    load_file(sealed, tmp_path / "here")
    assert (tmp_path / "there").read_bytes() == (tmp_path / "here").read_bytes()
    with pytest.raises(CapacityError, match="decoding takes") as caught:
        sealed.load(device=device, device_bytes=room)
    assert "to a file" in caught.value.hint
