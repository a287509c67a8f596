"""The kernels of `holoray/kernels/cuda` compiled as C++ and run on the CPU, behind the interface of a device."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import shutil
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.fft

from holoray.kernels.cuda.source import MODULES, source
from holoray.kernels.device import Geometry

HEADER = Path(__file__).with_name("cuda_on_cpu.h")
COMPILER = shutil.which("g++") or shutil.which("clang++")
SHARED_BYTES = 48 << 10
"""Shared memory that a thread block gets on every device from 7.5 on without asking for more."""
NO_COMPILER = "needs a C++ compiler to run CUDA kernels on the CPU; on Debian: apt-get install g++"
KERNEL = re.compile(r'extern "C" __global__ void(?: __launch_bounds__\([^)]*\))? (\w+)\(')
# -ffp-contract=off: a CPU that fuses where the GPU's text does not say so would differ in the last place.
FLAGS = ("-x", "c++", "-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-fno-strict-aliasing", "-w")


def kernels(module: str) -> list[str]:
    """The names of a module's kernels."""
    return KERNEL.findall(source(module))


def compile_kernels(folder: Path) -> ctypes.CDLL:
    """A library with `cpu_<kernel>(grid, block, shared bytes, pointers to arguments)` for each kernel.

    One translation unit: parsing the C++ library once is most of the time. Namespaces keep the modules apart.
    """
    assert COMPILER is not None
    text, library = folder / "kernels.cpp", folder / "kernels.so"  # which stays mapped when its file is gone
    text.write_text("".join(_in_namespace(module) for module in MODULES))
    subprocess.run([COMPILER, *FLAGS, "-include", HEADER, text, "-o", library], check=True, timeout=100)
    return ctypes.CDLL(str(library))


def _in_namespace(module: str) -> str:
    doors = "".join(
        f'extern "C" int cpu_{name}(const unsigned* grid, const unsigned* block, size_t shared, void** arguments) {{\n'
        f"  return on_cpu::launch_packed({name}, grid, block, shared, arguments);\n}}\n"
        for name in kernels(module)
    )
    return f"namespace {module} {{\n{source(module)}{doors}}}\n"


@cache
def kernels_on_cpu() -> CpuDevice:
    """The device of this process; compiled at its first use."""
    with tempfile.TemporaryDirectory() as folder:
        return CpuDevice(compile_kernels(Path(folder)))


class CpuDevice:
    """NumPy arrays in the places of device arrays; `launches` tells what ran. Without a library only memory works."""

    number = 0
    multiprocessors = 2

    def __init__(self, library: ctypes.CDLL | None) -> None:
        self._library = library
        self._one_launch = threading.Lock()
        """The header keeps the threads of a launch in global variables."""
        self.launches: list[tuple[str, Geometry]] = []
        self._files: dict[int, int] = {}

    def stream(self) -> AbstractContextManager[None]:
        return nullcontext()

    def shared(self) -> AbstractContextManager[None]:
        return nullcontext()

    def range(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def free_bytes(self) -> int:
        return 1 << 40

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Zeros at a multiple of 256 bytes, as CuPy's."""
        nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        memory = np.zeros(nbytes + 256, np.uint8)
        start = -memory.ctypes.data % 256
        return memory[start : start + nbytes].view(dtype).reshape(shape)

    def segment(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """In a file without a name: who may look into this process can map it, and it is gone when all have let go."""
        file = os.memfd_create("holoray-on-cpu")
        os.ftruncate(file, max(nbytes, 1))
        mapping = mmap.mmap(file, max(nbytes, 1))
        weakref.finalize(mapping, os.close, file)
        memory = np.frombuffer(mapping, np.uint8)
        self._files[memory.ctypes.data] = file
        return memory[:nbytes]

    def share(self, segment: npt.NDArray[np.uint8]) -> bytes:
        return f"/proc/{os.getpid()}/fd/{self._files[segment.ctypes.data]}".encode()

    def attach(self, handle: bytes, nbytes: int) -> npt.NDArray[np.uint8]:
        with open(handle, "r+b") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), max(nbytes, 1)), np.uint8)[:nbytes]

    def copy(self, array: npt.NDArray[Any], to: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        to = self.zeros(array.shape, array.dtype) if to is None else to
        to[...] = array
        return to

    def clear(self, array: npt.NDArray[Any]) -> None:
        array[...] = 0

    def address(self, array: npt.NDArray[Any]) -> int:
        return int(array.ctypes.data)

    def upload(self, host: npt.NDArray[Any]) -> npt.NDArray[Any]:
        copy = self.zeros(host.shape, host.dtype)
        copy[...] = host
        return copy

    def write(self, array: npt.NDArray[Any], host: npt.NDArray[Any]) -> None:
        array.reshape(-1).view(np.uint8)[:] = host.reshape(-1).view(np.uint8)

    def download(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return array.copy()

    def launch(self, module: str, kernel: str, geometry: Geometry, arguments: Sequence[np.generic]) -> None:
        assert kernel in kernels(module)
        assert geometry.shared_bytes <= SHARED_BYTES
        held = [np.array([argument]) for argument in arguments]  # as wide as the scalar, as for the driver
        pointers = (ctypes.c_void_p * len(held))(*(one.ctypes.data for one in held))
        grid, block = (ctypes.c_uint * 3)(geometry.grid, 1, 1), (ctypes.c_uint * 3)(geometry.block, 1, 1)
        door = getattr(self._library, f"cpu_{kernel}")
        with self._one_launch:
            divergent = door(grid, block, ctypes.c_size_t(geometry.shared_bytes), pointers)
        assert not divergent, f"threads of a block met different numbers of barriers in {kernel}"
        self.launches.append((kernel, geometry))

    def matmul(self, a: npt.NDArray[Any], b: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return self.upload(a @ b)

    def inverse_dct(self, coefficients: npt.NDArray[Any], axes: tuple[int, int]) -> npt.NDArray[Any]:
        return self.upload(scipy.fft.idctn(coefficients, type=2, axes=axes, norm="ortho", workers=1))

    def synchronize(self) -> None:
        """Launches are done when they return."""
