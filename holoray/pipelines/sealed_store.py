"""An opened store: its root is checked, its manifest parsed, and fragments may be read."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, overload

from holoray.errors import IntegrityError, SourceError, UsageError
from holoray.fragment import TensorEntry
from holoray.integrity import format_root, parse_root
from holoray.manifest import MAX_MANIFEST_BYTES, Manifest, read_manifest
from holoray.pipelines.curve import CurvePoint, QualityCurve, curve_of, store_curve
from holoray.pipelines.fault_policy import FaultPolicy
from holoray.pipelines.plan import Target, select
from holoray.pipelines.source_pool import SourcePool, SourceStats
from holoray.pipelines.verify import BadFragment, verify
from holoray.stores import MANIFEST, ShareSet, Store, find_shares, fragment_file, open_store
from holoray.stores.root import read_root

if TYPE_CHECKING:
    from holoray.kernels.device import Device
    from holoray.pipelines.loader import Loader, OnFragment


class SealedStore:
    """A store whose `ROOT` matches its manifest.

    `expect` (`sha256:...`) pins the root. Where it is given, and for a remote store, the fragments are also checked
    against sha256, not only xxh3_64 (which anybody on the way could forge). `policy`: what loads put up with.
    A store whose shares lie in folders `share-*` inside `where` is opened as a `ShareSet`.
    Raises SourceError if there is no store, IntegrityError if root, manifest or expectation disagree.
    """

    def __init__(
        self, where: Store | str | os.PathLike[str], expect: str | None = None, policy: FaultPolicy | None = None
    ) -> None:
        self.store = open_store(where)
        self.policy = policy or (self.store.policy if isinstance(self.store, SourcePool) else FaultPolicy())
        try:
            manifest = self._open(expect)
        except SourceError:  # asking for shares first would cost every other store a round trip
            shares = find_shares(self.store)
            if shares is None:
                raise
            self.store = shares
            manifest = self._open(expect)
        self.strict = expect is not None or self.store.remote
        names = {fragment_file(file.number): file.number for file in manifest.files}
        if isinstance(self.store, ShareSet):
            _check_layout(self.store, manifest)
        lost = self.store.unreadable(list(names))
        self.manifest: Manifest = manifest.without({names[name]: why for name, why in lost.items()})

    def _open(self, expect: str | None) -> Manifest:
        """The manifest that the root of the store stands for."""
        self.root = read_root(self.store)
        if expect is not None and self.root != parse_root(expect, what="--expect"):
            raise IntegrityError(
                f"{self.store.uri} has root {self.root}, not the expected one",
                hint="this is another model or another version than you asked for",
                source=self.store.uri,
            )
        return read_manifest(self.store.read_checked(MANIFEST, MAX_MANIFEST_BYTES, self._check_manifest))

    def _check_manifest(self, encoded: bytes) -> None:
        if format_root(encoded) != self.root:
            raise IntegrityError(
                f"the manifest of {self.store.uri} does not match its ROOT",
                hint="the store is damaged: copy it again",
                source=self.store.uri,
            )

    def load(
        self,
        quality: float | None = None,
        bytes: int | None = None,
        fragments: tuple[int, ...] | list[int] | None = None,
        on_fragment: OnFragment | None = None,
        *,
        dequantise: str | None = None,
        device: str | Device = "cpu",
        device_bytes: int | None = None,
        decompress: str = "host",
    ) -> dict[str, Any]:
        """The weights at a target (default: everything), as fresh arrays by name.

        `dequantise` ("bf16", "f16", "f32"): each quantised layer becomes one array `….weight` [outputs, inputs] of this
        dtype. Raises UsageError where there are none or nothing says how they are packed, FormatError for bad ones.
        On a device they are made there; what they are made from takes no more than the largest layer, or 1/32 of the
        weights where there is room.

        `device`: "cpu" for NumPy arrays, "cuda" or "cuda:N" for CuPy arrays on that GPU, of which the load uses at
        most `device_bytes` (default: what is free, less a reserve). There BF16 is uint16:
        `torch.from_dlpack(array).view(torch.bfloat16)` shares its memory. Raises DeviceError if there is no such
        device, CapacityError if it has no room.

        `decompress`: "host"; "device" for fragments of `raw` that are zstd frames, by nvCOMP (DeviceError where it is
        missing); "auto" for the device where nvCOMP is installed, which was never measured to be faster.
        """
        target = Target(quality, bytes, None if fragments is None else tuple(fragments))
        if dequantise is not None:
            from holoray.pipelines.loader import load_dequantised

            return load_dequantised(
                self.store,
                self.manifest,
                target,
                dequantise,
                strict=self.strict,
                on_fragment=on_fragment,
                policy=self.policy,
                device=_device(device),
                device_bytes=device_bytes,
                decompress=decompress,
            )
        loader = self.loader(device=device, device_bytes=device_bytes, decompress=decompress)
        loader.load(target, on_fragment)
        return loader.state_dict()

    def loader(
        self, *, device: str | Device = "cpu", device_bytes: int | None = None, decompress: str = "host"
    ) -> Loader:
        """A load that can stop at a target and go on from there; `device` and `decompress` as for `load`."""
        from holoray.pipelines.loader import Loader  # brings the kernels, a second of imports that reading needs not

        return Loader(
            self.store,
            self.manifest,
            strict=self.strict,
            policy=self.policy,
            device=_device(device),
            device_bytes=device_bytes,
            decompress=decompress,
        )

    def stats(self) -> list[SourceStats]:
        """What each source did so far, where there are several."""
        return self.store.stats() if isinstance(self.store, SourcePool) else []

    def planned_bytes(self, target: Target) -> int:
        """Bytes of the fragments that a load to the target would fetch."""
        keys = select(self.manifest, target, skip_lost=self.policy.skip_corrupted)
        return sum(self.manifest.tensors[t].fragments[i].stored_bytes for t, i in keys)

    def quality_curve(self) -> list[CurvePoint]:
        """(bytes read, quality) in streaming order: the points of `curve()`."""
        return list(self.curve().points)

    @overload
    def curve(self, tensor: None = None) -> QualityCurve[tuple[str, int]]: ...

    @overload
    def curve(self, tensor: str) -> QualityCurve[int]: ...

    def curve(self, tensor: str | None = None) -> QualityCurve[tuple[str, int]] | QualityCurve[int]:
        """How quality grows with what is read: of the whole store, or of one tensor; from the manifest alone.

        Raises UsageError if there is no such tensor.
        """
        return store_curve(self.manifest) if tensor is None else curve_of(self.entry(tensor))

    def entry(self, tensor: str) -> TensorEntry:
        """What the manifest says of a tensor; raises UsageError if there is no such tensor."""
        if tensor not in self.manifest.by_name:
            raise UsageError(
                f"{self.store.uri} has no tensor {tensor!r}", hint="`holoray inspect` lists the tensors", tensor=tensor
            )
        return self.manifest.tensors[self.manifest.by_name[tensor]]

    def verify(self, on_progress: Callable[[int], None] | None = None) -> list[BadFragment]:
        """Everything that is wrong: each payload against both digests, each file's framing and size."""
        return verify(self.store, self.manifest, on_progress)


def _device(device: str | Device) -> Device | None:
    """A device by its name, or as it is; None for the host."""
    from holoray.kernels.devices import open_device

    return open_device(device) if isinstance(device, str) else device


def _check_layout(shares: ShareSet, manifest: Manifest) -> None:
    """Raise IntegrityError if shares state other sizes than the sealed manifest: memory is taken by what they state."""
    for file in manifest.files:
        name = fragment_file(file.number)
        if shares.size(name) != file.bytes:
            raise IntegrityError(
                f"the shares of {shares.uri} state {shares.size(name)} bytes for {name}, the manifest {file.bytes}",
                hint="the shares are forged: get them from elsewhere",
                source=shares.uri,
            )
