"""NVRTC without CuPy, a driver or a device: kernels to machine code, and what the assembler says of them."""

from __future__ import annotations

import ctypes
import importlib.metadata
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from holoray.kernels.cuda.source import OPTIONS, source

PACKAGE = "nvidia-cuda-nvrtc"
_FUNCTION = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for '(?P<arch>\w+)'"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Usage:
    """What one kernel takes on one architecture: registers a thread, bytes of stack and of spilled registers."""

    kernel: str
    registers: int
    stack_bytes: int
    spill_bytes: int


class CompileError(Exception):
    """NVRTC's log."""


@cache
def library() -> ctypes.CDLL | None:
    """NVRTC of the wheel, or None where that is not installed."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = {path.name.partition(".so")[0]: str(path.locate()) for path in files if ".so" in path.name}
    ctypes.CDLL(paths["libnvrtc-builtins"])  # it looks for that by name
    return ctypes.CDLL(paths["libnvrtc"])


def compile_cubin(module: str, capability: int) -> tuple[bytes, list[Usage]]:
    """Machine code of a module for a compute capability (times ten), and what each kernel takes; or CompileError."""
    return compile_text(source(module), f"{module}.cu", capability)


def compile_text(text: str, name: str, capability: int) -> tuple[bytes, list[Usage]]:
    nvrtc = library()
    assert nvrtc is not None
    program = ctypes.c_void_p()
    _check(nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), name.encode(), 0, None, None))
    try:
        options = [option.encode() for option in (*OPTIONS, f"-arch=sm_{capability}", "--ptxas-options=-v")]
        result = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        log = _fetch(nvrtc, program, "ProgramLog").decode()
        if result:
            raise CompileError(log)
        usages = [
            Usage(m["kernel"], int(m["registers"]), int(m["stack"]), int(m["stores"]) + int(m["loads"]))
            for m in _FUNCTION.finditer(log)
        ]
        return _fetch(nvrtc, program, "CUBIN"), usages
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _fetch(nvrtc: Any, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw if what == "CUBIN" else buffer.raw.rstrip(b"\0")


def _check(nvrtc: Any, result: int) -> None:
    if result:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise CompileError(nvrtc.nvrtcGetErrorString(result).decode())
