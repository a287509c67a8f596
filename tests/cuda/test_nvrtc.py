"""The kernels compile for every supported GPU, without one; NVRTC says what they take."""

from __future__ import annotations

import pytest
from nvrtc import PACKAGE, CompileError, compile_cubin, compile_text, library
from on_cpu import kernels

from holoray.errors import UsageError
from holoray.kernels.cuda.source import CAPABILITIES, MODULES, source

pytestmark = pytest.mark.skipif(library() is None, reason=f"{PACKAGE} is not installed (extra dev)")
OLDEST, NEWEST = CAPABILITIES[0], CAPABILITIES[-1]
CELLS = [
    pytest.param(module, capability, marks=() if capability in (OLDEST, NEWEST) else pytest.mark.slow)
    for module in MODULES
    for capability in CAPABILITIES
]


@pytest.mark.parametrize(("module", "capability"), CELLS)
def test_compiles_to_machine_code_without_spilling(module: str, capability: int) -> None:
    cubin, usages = compile_cubin(module, capability)
    assert cubin.startswith(b"\x7fELF")
    assert sorted(usage.kernel for usage in usages) == sorted(kernels(module))
    for usage in usages:
        print(f"sm_{capability} {usage.kernel}: {usage.registers} registers, {usage.spill_bytes} bytes spilled")
        assert usage.spill_bytes == usage.stack_bytes == 0
        assert usage.registers <= 128  # 65,536 registers hold two blocks of 256 threads


def test_an_error_names_the_file_and_line_that_a_person_can_open() -> None:
    text = source("rotation").replace("__syncthreads();", "__syncthreds();", 1)
    line = 1 + source("rotation").partition('"rotation.cu"\n')[2].partition("__syncthreads();")[0].count("\n")
    with pytest.raises(CompileError, match=rf"rotation\.cu\({line}\)"):
        compile_text(text, "rotation", OLDEST)


def test_unknown_modules_are_refused() -> None:
    with pytest.raises(UsageError, match="nonsense"):
        source("nonsense")
