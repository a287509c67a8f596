"""The text of the CUDA kernels, as NVRTC and the tests' C++ compiler get it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Final

from holoray.errors import UsageError

MODULES: Final = {
    "cast": ("common.cuh", "cast.cu"),
    "deal": ("common.cuh", "deal.cu"),
    "dequant": ("common.cuh", "dequant.cu"),
    "rotation": ("common.cuh", "rotation.cu"),
    "dct": ("common.cuh", "dct.cu"),
    "dct_tiles": ("common.cuh", "dct_tiles.cu"),
    "planes": ("common.cuh", "planes.cuh", "planes.cu"),
    "planes_refine": ("common.cuh", "planes.cuh", "planes_refine.cu"),
}
"""What each module is put together from: no file includes another, so that NVRTC needs no include path."""
OPTIONS: Final = ("-std=c++17", "-ftz=false")
"""Subnormal weights stay what they are."""
CAPABILITIES: Final = (75, 80, 86, 89, 90, 100, 120)
"""Compute capabilities (times ten) that every kernel is compiled for by the tests."""


@cache
def source(module: str) -> str:
    """The CUDA C++ of a module; errors and profilers name the file and line that a person can open."""
    if module not in MODULES:
        raise UsageError(f"no kernel module is called {module!r}", hint=f"there are {', '.join(MODULES)}")
    here = Path(__file__).parent
    return "".join(f'#line 1 "{name}"\n{(here / name).read_text(encoding="utf-8")}' for name in MODULES[module])
