"""The verbs of the Python interface that need no Ray."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from holoray.compression import ZSTD
from holoray.errors import QualityError
from holoray.kernels.device import Device
from holoray.kernels.devices import CPU, open_device
from holoray.kernels.frames import HOST
from holoray.manifest import Manifest
from holoray.pipelines.encode import EncodeReport, OnTensor
from holoray.pipelines.encode import encode as encode_with_policy
from holoray.pipelines.fault_policy import FaultPolicy
from holoray.pipelines.loader import OnFragment, load_to_file
from holoray.pipelines.open_sources import Place, open_places
from holoray.pipelines.plan import Target, select
from holoray.pipelines.policy import EncodePolicy, parse_patterns
from holoray.pipelines.sealed_store import SealedStore
from holoray.stores import Shares, Store, share_target
from holoray.tensor import Array


def encode(
    checkpoint: str | os.PathLike[str] | Mapping[str, Array],
    uri: Store | str | os.PathLike[str],
    *,
    codec: str = "planes",
    fragments: int = 8,
    seed: int = 0,
    dtype: str | None = None,
    pattern: str | Mapping[str, str] | Sequence[str] = (),
    compression: str = ZSTD,
    tile: int = 0,
    essential: float = 0.0,
    rank: int = 0,
    energy: float = 0.0,
    coefficients: str = "float32",
    shares: Shares | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    on_tensor: OnTensor | None = None,
) -> EncodeReport:
    """Encode a checkpoint (safetensors file, sharded directory, or dict of arrays) into a store.

    `codec` is for tensors that no `pattern` names (`"GLOB=CODEC"`, several of them, or a mapping; the first match
    wins); "auto" measures which one gives most quality for the bytes, tensor by tensor. `dtype` ("bf16", "f16", "f32")
    casts floating tensors first; `compression` is "zstd", "lz4" or "none".

    For `spectral`, `projection` and `lowrank`: `fragments` and `seed`; `essential`, the share of the energy that rides
    in every fragment (below 1; 0: none); `coefficients` is "float32" or "float16". `tile` is for `spectral`. For
    `lowrank`, `rank` (0: full) and `energy` (0: all) say how many terms are kept: those that meet both.
    `shares` spreads the store over folders `share-0`, `share-1`, … in `uri` (or give a `ShareTarget` as `uri`).
    An interrupted encode of the same files resumes.

    Raises UsageError for options without meaning or a store that is already there, FormatError for a malformed
    checkpoint, CapacityError for a full disk.
    """
    policy = EncodePolicy(
        codec=codec,
        fragments=fragments,
        seed=seed,
        dtype=dtype,
        patterns=parse_patterns(pattern),
        compression=compression,
        tile=tile,
        essential=essential,
        rank=rank,
        energy=energy,
        coefficients=coefficients,
    )
    target = uri if shares is None else share_target(uri, shares)
    return encode_with_policy(checkpoint, target, policy, overwrite=overwrite, threads=threads, on_tensor=on_tensor)


def open(
    uri: Place,
    *more_uris: Place,
    expect: str | None = None,
    fault_policy: FaultPolicy | None = None,
) -> SealedStore:
    """Open a store; with `more_uris`, copies of it that are read together and stand in for each other.

    `expect` (`sha256:...`) pins its root and makes loads check sha256, not only xxh3_64; with several places that is
    always done. `fault_policy`: what loads put up with. A single place is read as it is unless there is a policy.

    Raises SourceError if there is none, IntegrityError if its root, manifest or the expectation disagree.
    """
    return open_places((uri, *more_uris), expect, fault_policy)


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a load did; `bytes_read` includes the manifest, `snr_db` is inf for an exact result."""

    root: str
    tensors: int
    fragments: int
    bytes_read: int
    quality: float
    relative_error: float
    snr_db: float
    seconds: float
    skipped: int = 0
    """Planned fragments that are not in the result: they or what they require are corrupt or missing everywhere."""
    spilled: int = 0
    """Tensors for which the device had no room, so that they were decoded on the host."""


def load_file(
    sealed: SealedStore,
    path: str | os.PathLike[str],
    target: Target | None = None,
    on_fragment: OnFragment | None = None,
    *,
    dequantise: str | None = None,
    device: str | Device = CPU,
    device_bytes: int | None = None,
    decompress: str = HOST,
) -> LoadReport:
    """Load to a target straight into a safetensors file; neither the store nor the model need fit into memory.

    `dequantise` ("bf16", "f16", "f32"): each quantised layer becomes one weight of this dtype. `device`: where weights
    are decoded ("cpu", "cuda", "cuda:N"), within `device_bytes`; the file is the same. `decompress` as for
    `SealedStore.load`.
    """
    start = time.perf_counter()
    target = target or Target()
    progress = load_to_file(
        sealed.store,
        sealed.manifest,
        path,
        target,
        strict=sealed.strict,
        on_fragment=on_fragment,
        policy=sealed.policy,
        dequantise=dequantise,
        device=open_device(device) if isinstance(device, str) else device,
        device_bytes=device_bytes,
        decompress=decompress,
    )
    quality = progress.quality
    return LoadReport(
        root=sealed.root,
        tensors=len(sealed.manifest.tensors),
        fragments=progress.fragments_read,
        bytes_read=progress.bytes_read,
        quality=quality.ratio,
        relative_error=quality.relative_error,
        snr_db=quality.snr_db,
        seconds=time.perf_counter() - start,
        skipped=_wanted(sealed.manifest, target) - progress.fragments_read,
        spilled=len(progress.spilled),
    )


def _wanted(manifest: Manifest, target: Target) -> int:
    """How many fragments the target takes: of those that are left, or, where these do not do, of all."""
    try:
        return len(select(manifest, target))
    except QualityError:
        return len(select(manifest.without({}), target))
