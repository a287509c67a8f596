"""`raw`: the tensor's own bytes, in runs of 1 MiB."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np

from holoray.codecs.base import Codec, FragmentShape
from holoray.codecs.registry import register_codec
from holoray.fragment import NO_PREREQUISITE
from holoray.tensor import Array, TensorSpec

RUN_BYTES: Final = 1 << 20


@register_codec
@dataclass(frozen=True)
class RawCodec(Codec):
    """Fragment i holds bytes [i, i+1) * 1 MiB of the little-endian tensor; an empty tensor has one empty fragment."""

    name: ClassVar[str] = "raw"

    def check(self, spec: TensorSpec) -> None:
        """Every tensor can be raw."""

    def shapes(self, spec: TensorSpec) -> Iterator[FragmentShape]:
        for index in range(max(1, -(-spec.nbytes // RUN_BYTES))):
            nbytes = min(RUN_BYTES, spec.nbytes - index * RUN_BYTES)
            yield FragmentShape(index, 0, index, NO_PREREQUISITE, nbytes, nbytes)

    def decode(self, spec: TensorSpec, payloads: Mapping[int, Any]) -> Array:
        out = np.zeros(spec.nbytes, np.uint8)
        for index, payload in payloads.items():
            data = np.frombuffer(payload, np.uint8)
            out[index * RUN_BYTES : index * RUN_BYTES + data.size] = data
        return out.view(spec.numpy_dtype).reshape(spec.shape)

    def can_reconstruct(self, spec: TensorSpec, present: frozenset[int]) -> bool:
        return bool(present)
