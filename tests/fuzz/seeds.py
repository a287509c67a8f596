"""Writes the seeds of the corpus: honest inputs of each kind, and a damaged one of each.

python tests/fuzz/seeds.py
"""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
from fuzz_targets import CODECS, encoded

import holoray
from holoray.checkpoint import save_checkpoint
from holoray.stores import MANIFEST
from holoray.tensor import Array

CORPUS = Path(__file__).with_name("corpus")
MODELS: dict[str, dict[str, Array]] = {
    "empty": {},
    "scalar": {"a": np.asarray(1.0, np.float32)},
    "several": {"a": np.ones((2, 3), ml_dtypes.bfloat16), "b": np.zeros(0, np.int8), "é": np.arange(4.0)},
}


def keep(kind: str, name: str, data: bytes) -> None:
    (CORPUS / kind / f"honest-{name}").write_bytes(data)
    (CORPUS / kind / f"cut-{name}").write_bytes(data[: len(data) * 2 // 3])


def main() -> None:
    for name, model in MODELS.items():
        path = CORPUS / "safetensors" / f"honest-{name}"
        save_checkpoint(path, model, {"format": "np"} if model else None)
        keep("safetensors", name, path.read_bytes())
        whole = path.read_bytes()
        end = whole.rfind(b"}") + 1
        (CORPUS / "safetensors" / f"header-{name}").write_bytes(whole[8:end] + whole[end:].lstrip(b" "))
        store = holoray.MemoryStore()
        holoray.encode(model, store)
        keep("manifest", name, store.blobs[MANIFEST])
    (CORPUS / "manifest" / "header").write_bytes(
        b'{"files":[{"bytes":600,"framing_sha256":"%064d","number":0}],"format":1,"metadata":{},"options":{}}' % 0
    )
    for number, codec in enumerate(CODECS):
        _, fragments = encoded(codec)
        for fragment in fragments:
            keep("fragments", f"{codec}-{fragment.index}", bytes([number, fragment.index]) + fragment.payload)
        store = holoray.MemoryStore()
        holoray.encode({"w": np.ones((80, 80), np.float32)}, store, codec=codec, fragments=2)
        keep("manifest", codec, store.blobs[MANIFEST])


if __name__ == "__main__":
    main()
