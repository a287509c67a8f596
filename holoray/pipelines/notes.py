"""What whoever encoded a store should know about it, read from its manifest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from holoray.codecs.dealt import DealtCodec
from holoray.codecs.lowrank import LowRankCodec
from holoray.formats.quantised import find_quantisation
from holoray.manifest import Manifest
from holoray.pipelines.policy import AUTO, EncodePolicy

_NAMED: Final = 3
_EXACT: Final = ("raw", "planes", AUTO)


def encode_notes(manifest: Manifest, policy: EncodePolicy) -> tuple[str, ...]:
    """One sentence for each thing worth a warning."""
    return (
        *_essential_cost(manifest),
        *_does_not_pay(manifest),
        *_went_raw(manifest, policy),
        *_stays_packed(manifest),
    )


def _essential_cost(manifest: Manifest) -> Iterator[str]:
    """What the copies of the essential parts add: all but one of each tensor's."""
    copies = sum(
        (codec.fragments - 1) * codec.essential_nbytes(tensor.spec)
        for codec, tensor in zip(manifest.codecs, manifest.tensors, strict=True)
        if isinstance(codec, DealtCodec)
    )
    if copies:
        stored = sum(t.stored_bytes for t in manifest.tensors)
        yield (
            f"essential parts ride in every fragment: {copies} bytes more, "
            f"{stored / max(stored - copies, 1):.2f} times the size without them"
        )


def _does_not_pay(manifest: Manifest) -> Iterator[str]:
    names = [
        tensor.name
        for codec, tensor in zip(manifest.codecs, manifest.tensors, strict=True)
        if isinstance(codec, LowRankCodec) and codec.factor_nbytes(tensor.spec) > tensor.spec.nbytes
    ]
    if names:
        yield f"lowrank does not pay, the factors are larger than the tensor: {_named(names)}"


def _went_raw(manifest: Manifest, policy: EncodePolicy) -> Iterator[str]:
    names = [
        tensor.name
        for tensor in manifest.tensors
        if tensor.codec == "raw" and not tensor.mandatory and policy.codec_of(tensor.name) not in _EXACT
    ]
    if names:
        yield f"raw, since rounding would have falsified the quality of partial loads: {_named(names)}"


def _stays_packed(manifest: Manifest) -> Iterator[str]:
    """Quantised layers that `--dequantise` will refuse: the configuration is still at hand."""
    faults = find_quantisation((t.spec for t in manifest.tensors), manifest.metadata).faults
    if faults:
        why = f"{faults[0].message} ({faults[0].hint})"
        yield f"{len(faults)} quantised layers load only as they are stored: {why}"


def _named(names: Sequence[str]) -> str:
    """The first few of many."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
