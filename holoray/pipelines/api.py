"""The two verbs of the Python interface that need no Ray: `holoray.encode` and `holoray.open`."""

from __future__ import annotations

import os
from collections.abc import Mapping

from holoray.compression import ZSTD
from holoray.pipelines.encode import EncodeReport, OnTensor
from holoray.pipelines.encode import encode as encode_with_policy
from holoray.pipelines.policy import EncodePolicy, parse_patterns
from holoray.pipelines.sealed_store import SealedStore
from holoray.stores import Store
from holoray.tensor import Array


def encode(
    checkpoint: str | os.PathLike[str] | Mapping[str, Array],
    uri: Store | str | os.PathLike[str],
    *,
    codec: str = "planes",
    fragments: int = 8,
    seed: int = 0,
    dtype: str | None = None,
    patterns: Mapping[str, str] | list[str] | tuple[str, ...] = (),
    compression: str = ZSTD,
    tile: int = 0,
    overwrite: bool = False,
    threads: int | None = None,
    on_tensor: OnTensor | None = None,
) -> EncodeReport:
    """Encode a checkpoint (safetensors file, sharded directory, or dict of arrays) into a store.

    `codec` is for tensors that no pattern (`"GLOB=CODEC"`, first match wins) names; `dtype` ("bf16", "f16", "f32")
    casts floating tensors first; `fragments`, `seed` and `tile` matter to `spectral`; `compression` is "zstd", "lz4"
    or "none". An interrupted encode of the same files resumes. Raises UsageError for options without meaning or a
    store that is already there, FormatError for a malformed checkpoint, CapacityError for a full disk.
    """
    policy = EncodePolicy(codec, fragments, seed, dtype, parse_patterns(patterns), compression, tile)
    return encode_with_policy(checkpoint, uri, policy, overwrite=overwrite, threads=threads, on_tensor=on_tensor)


def open(uri: Store | str | os.PathLike[str], expect: str | None = None) -> SealedStore:
    """Open a store; `expect` (`sha256:...`) pins its root and makes loads check sha256, not only xxh3_64.

    Raises SourceError if there is none, IntegrityError if its root, manifest or the expectation disagree.
    """
    return SealedStore(uri, expect)
