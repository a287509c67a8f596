"""What the manifest will say about a tensor and its fragments, as the encoder gave them."""

from __future__ import annotations

from holoray.fragment import FragmentEntry, TensorEntry
from holoray.integrity import Digests
from holoray.kernels.encoder import EncodedFragment, Encoder


def fragment_entry(encoded: EncodedFragment, digests: Digests) -> FragmentEntry:
    return FragmentEntry(
        index=encoded.index,
        layer=encoded.layer,
        slot=encoded.slot,
        requires=encoded.requires,
        compression=encoded.compression,
        stored_bytes=len(encoded.payload),
        raw_bytes=encoded.raw_bytes,
        gain=encoded.gain,
        xxh3_64=digests.xxh3_64,
        sha256=digests.sha256,
    )


def tensor_entry(
    encoder: Encoder, fragments: list[FragmentEntry], *, sha256: bytes, mandatory: bool = False
) -> TensorEntry:
    return TensorEntry(
        spec=encoder.spec,
        codec=encoder.codec.name,
        config=encoder.codec.get_config(),
        residual=encoder.residual,
        essential_gain=encoder.essential_gain,
        mandatory=mandatory,
        sha256=sha256,
        fragments=tuple(fragments),
    )
