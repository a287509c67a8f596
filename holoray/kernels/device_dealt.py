"""`spectral`, `projection` and `lowrank` on a device: shares lie there as they came, weights are made there.

A slot's numbers are one stretch of the state, float32: a share is copied, and widened, to where it stays, in any order,
and only `finalize` deals all of them back to their places. The essential part stays on the host, which checks it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from holoray.codecs.lowrank import LowRankCodec
from holoray.codecs.projection import ProjectionCodec
from holoray.codecs.spectral import SpectralCodec
from holoray.codecs.transform import TransformCodec
from holoray.kernels import launchers
from holoray.kernels.accumulator import SharedPart
from holoray.kernels.dealt import DealtAccumulator, Floats
from holoray.kernels.device import Device
from holoray.kernels.lowrank import LowRankAccumulator
from holoray.kernels.transform import TransformAccumulator
from holoray.tensor import TensorSpec, matrix_shape


class DeviceDealtAccumulator(DealtAccumulator):
    """Before the accumulator of its codec in the order of base classes: it decides where numbers lie."""

    def __init__(self, spec: TensorSpec, codec: Any, out: Any, device: Device) -> None:
        self._device = device
        super().__init__(spec, codec, out)
        counts = [self._count(slot) for slot in range(self._held.size)]
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64)
        self._matrix = out.reshape(matrix_shape(spec.shape))

    def _make_state(self, memory: npt.NDArray[np.uint8] | None) -> None:
        shared, count = self.state_sizes(self.spec, self.codec)
        self._essential = SharedPart(np.zeros(SharedPart.state_nbytes(shared), np.uint8), shared)
        self._numbers = self._new_numbers(count)

    def _new_numbers(self, count: int) -> Any:
        """float32[count] zeros on the device."""
        return self._device.zeros((count,), np.float32)

    def _share(self, slot: int) -> Any:
        return self._numbers[int(self._starts[slot]) : int(self._starts[slot + 1])]

    def _gather(self, slot: int) -> Floats:
        own: Floats = self._device.download(self._share(slot))
        return own

    def _scatter(self, slot: int, values: npt.NDArray[Any]) -> None:
        self._share(slot)[...] = self._device.upload(values.reshape(-1))
        self._device.synchronize()

    def finalize(self) -> None:
        self._store_weights()
        self._device.synchronize()

    @abstractmethod
    def _store_weights(self) -> None:
        """Queue what turns the state into the weights of `out`."""


class DeviceTransformAccumulator(DeviceDealtAccumulator, TransformAccumulator):
    """Deals the coefficients of all shares back, in a raster of its own, and transforms that."""

    codec: TransformCodec

    def __init__(self, spec: TensorSpec, codec: TransformCodec, out: Any, device: Device) -> None:
        super().__init__(spec, codec, out, device)
        self._starts_there = device.upload(self._starts[:-1])
        self._offsets_there = device.upload(self._offsets.astype(np.uint16))  # below the number of fragments

    def _store_weights(self) -> None:
        device = self._device
        raster = device.zeros((self.spec.size,), np.float32)
        launchers.collect_shares(device, self._numbers, self._starts_there, self._offsets_there, self._deal, raster)
        if self._essential.held:
            positions, values = self._layout.parse(self._essential.content)
            wide = values.astype(np.float32)
            launchers.put_numbers(device, device.upload(positions), device.upload(wide), raster)
        self._transform(raster.reshape(self._matrix.shape))

    @abstractmethod
    def _transform(self, raster: Any) -> None:
        """Queue the inverse transform of float32[rows, columns], which it may use up, and the cast to `out`."""


class DeviceSpectralAccumulator(DeviceTransformAccumulator):
    """Small tiles in one kernel of ours with the cast behind; large ones, and the whole matrix, by the library."""

    codec: SpectralCodec

    def _transform(self, raster: Any) -> None:
        tile, exponent = self.codec.tile, self.codec.exponent
        if 0 < tile <= launchers.MAX_TILE:
            launchers.inverse_dct(self._device, raster, self._matrix, exponent, tile)
            return
        for rows, height in _cuts(raster.shape[0], tile):
            for columns, width in _cuts(raster.shape[1], tile):
                part = raster[rows, columns]
                tiled = part.reshape(part.shape[0] // height, height, part.shape[1] // width, width)
                part[...] = self._device.inverse_dct(tiled, axes=(1, 3)).reshape(part.shape)
        launchers.store(self._device, raster, self._matrix, exponent)


def _cuts(length: int, tile: int) -> Iterator[tuple[slice, int]]:
    """The stretch of whole tiles and that of a smaller one behind, with the length of their tiles; 0 is one for all."""
    whole = length - length % tile if tile else length
    if whole:
        yield slice(0, whole), tile or length
    if whole < length:
        yield slice(whole, length), length - whole


class DeviceProjectionAccumulator(DeviceTransformAccumulator):
    """The transposed transform in place, and the cast."""

    codec: ProjectionCodec

    def _transform(self, raster: Any) -> None:
        launchers.inverse_rotation(self._device, raster.reshape(-1), self.codec.seed)
        launchers.store(self._device, raster, self._matrix, self.codec.exponent)


class DeviceLowRankAccumulator(DeviceDealtAccumulator, LowRankAccumulator):
    """Terms [rank, rows + columns], the essential ones first, then share by share: one matrix product sums them."""

    codec: LowRankCodec

    def _new_numbers(self, count: int) -> Any:
        self._terms = self._device.zeros((self.codec.rank, self.codec.width(self.spec)), np.float32)
        return self._terms[self.codec.essential :].reshape(-1)

    def _store_weights(self) -> None:
        leading = self.codec.essential
        if self._essential.held and leading:
            known = self._essential.content.view(np.float32).reshape(leading, -1)
            self._terms[:leading] = self._device.upload(known)
        rows = self._matrix.shape[0]
        weights = self._device.matmul(self._terms[:, :rows].T, self._terms[:, rows:])
        launchers.store(self._device, weights, self._matrix, self.codec.exponent)
