"""What `CudaDevice` and the communicator say to CuPy, without a driver: order of calls, types, errors."""

from __future__ import annotations

from threading import Event
from types import SimpleNamespace

import numpy as np
import pytest
from cupy_stand_in import CompileException, CUDARuntimeError, CupyStandIn, OutOfMemoryError

from holoray.errors import CapacityError, DeviceError
from holoray.kernels import xp
from holoray.kernels.cuda.device import CudaDevice
from holoray.kernels.device import Geometry
from holoray.kernels.nccl import NcclCommunicators

MIB = 1 << 20


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> CupyStandIn:
    cupy = CupyStandIn()
    monkeypatch.setattr(xp, "cupy", lambda: cupy)
    monkeypatch.setattr(xp, "nvtx", lambda: None)
    return cupy


def test_zeros_of_a_segment_are_there_before_anybody_writes(cupy: CupyStandIn) -> None:
    """Other streams do not wait for them; and the pool gives back what it keeps first, since it is not asked."""
    CudaDevice(streams=1).segment(3 * MIB)
    assert cupy.said == ["give back pool", f"malloc {4 * MIB}", f"memset {4 * MIB}", "synchronize null"]


def test_a_segment_without_room_is_a_capacity_error(cupy: CupyStandIn) -> None:
    cupy.fails["malloc"] = CUDARuntimeError(2)
    with pytest.raises(CapacityError, match="no room") as raised:
        CudaDevice(streams=1).segment(1)
    assert "two generations" in raised.value.hint


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (CUDARuntimeError(700), DeviceError),  # an illegal address
        (CompileException("no such arch"), DeviceError),
        (RuntimeError("libnvrtc cannot be loaded"), DeviceError),
        (ImportError("libcufft cannot be loaded"), DeviceError),
        (CUDARuntimeError(2), CapacityError),
        (OutOfMemoryError("4 GiB"), CapacityError),
    ],
)
@pytest.mark.parametrize("what", ["compile", "launch", "synchronize"])
def test_failures_of_the_device_are_errors_of_ours(
    cupy: CupyStandIn, what: str, error: Exception, kind: type[Exception]
) -> None:
    device = CudaDevice(streams=1)
    cupy.fails[what] = error
    with pytest.raises(kind), device.stream():
        device.launch("cast", "cast_weights", Geometry(1, 32), (np.uint64(0),))


def test_a_kernel_is_looked_up_once(cupy: CupyStandIn) -> None:
    device = CudaDevice(streams=1)
    for _ in range(3):
        device.launch("cast", "cast_weights", Geometry(1, 32), ())
    assert cupy.said == ["compile cast_weights", *3 * ["launch cast_weights"]]


def test_nccl_is_asked_for_where_it_finds_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """CuPy loads what pip installed only in `cupy.cuda.nccl`, which says in `available` whether it did."""
    module = SimpleNamespace(available=True)
    monkeypatch.setattr(xp, "cupy", lambda: None)
    monkeypatch.setattr("holoray.kernels.xp.importlib.import_module", {"cupy.cuda.nccl": module}.__getitem__)
    assert xp.nccl() is module
    module.available = False
    with pytest.raises(DeviceError, match="NCCL"):
        xp.nccl()


def test_the_unique_id_stays_bytes(monkeypatch: pytest.MonkeyPatch, cupy: CupyStandIn) -> None:
    """As CuPy 14 gives and takes it; a tuple, as before that, is a TypeError there."""
    seen = []
    unique = bytes(range(128, 256))

    class Communicator:
        def __init__(self, count: int, unique: bytes, rank: int) -> None:
            seen.append((count, unique, rank))

    nccl = SimpleNamespace(
        get_unique_id=lambda: unique,
        NcclCommunicator=Communicator,
        **{f"NCCL_UINT{bits}": bits for bits in (8, 32, 64)},
    )
    monkeypatch.setattr(xp, "nccl", lambda: nccl)
    makers = NcclCommunicators()
    ticket = makers.ticket()
    makers.join(ticket, rank=1, size=2, device=CudaDevice(streams=1), stop=Event())
    assert seen == [(2, unique, 1)]
