"""`holoray doctor`: what this machine has for a warm-up, what is missing, and how to get it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

from holoray.cli.output import Output, human_bytes, shown, table
from holoray.errors import DeviceError, HolorayError

OK: Final = "ok"
MISSING: Final = "missing"
"""Not there; nothing that was asked for needs it."""
BROKEN: Final = "broken"
"""There, but it does not work."""
_LITTLE_SHARED_BYTES: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at: `status` is ok, missing or broken, `hint` what to do where it is not ok."""

    subject: str
    status: str
    detail: str
    hint: str = ""


def run_doctor(out: Output, *, device: str) -> bool:
    """Show all findings; whether a warm-up on `device` (cpu or cuda) can work here."""
    findings = [finding for check in CHECKS for finding in check()]
    rows = table("", "what", "status", "found", "what to do")
    for f in findings:
        rows.add_row(f.subject, f.status, shown(f.detail), shown(f.hint))
    asked = GPU_SUBJECTS if device == "cuda" else frozenset()
    bad = [f for f in findings if f.status == BROKEN or (f.subject in asked and f.status != OK)]
    summary = f"not ready for {device}" if bad else f"ready for {device}"
    out.result({"device": device, "ready": not bad, "findings": [asdict(f) for f in findings]}, summary, rows)
    out.warn([f"{f.subject} is {f.status}: {f.detail} ({f.hint})" for f in bad])
    return not bad


def cpu() -> Iterator[Finding]:
    """Cores, what the kernels use of the processor, and Numba's threads."""
    import llvmlite.binding
    import numba

    from holoray.kernels.bits import HARDWARE

    cores = len(os.sched_getaffinity(0))
    features = [name for name, has in llvmlite.binding.get_host_cpu_features().items() if has]
    vectors = [name for name in ("avx2", "avx512f", "bmi2", "neon", "sve") if name in features]
    deposits = "by one instruction" if HARDWARE else "by tables"
    detail = (
        f"{platform.machine()}, {cores} cores, {' '.join(vectors) or 'no vectors known'}; bits are deposited {deposits}"
    )
    yield Finding("cpu", OK, detail)
    yield Finding("numba", OK, f"{numba.__version__}, {numba.get_num_threads()} threads")


def ray() -> Iterator[Finding]:
    """The version of Ray, without starting one."""
    yield Finding("ray", OK, importlib.metadata.version("ray"))


def shared_memory() -> Iterator[Finding]:
    """Room where warm models of a CPU node live."""
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError as error:
        yield Finding("shared memory", BROKEN, f"/dev/shm: {error.strerror}", "mount a tmpfs at /dev/shm")
        return
    detail = f"{human_bytes(usage.free)} of {human_bytes(usage.total)} free in /dev/shm"
    hint = "containers often get 64 MiB: start them with --shm-size" if usage.free < _LITTLE_SHARED_BYTES else ""
    yield Finding("shared memory", OK, detail, hint)


def tools() -> Iterator[Finding]:
    """Programs that some parts ask for: the monitoring tests, and the tests of CUDA kernels on a CPU."""
    for program, hint in (
        ("promtool", "on Debian: apt-get install prometheus"),
        ("g++", "on Debian: apt-get install g++"),
    ):
        path = shutil.which(program)
        yield Finding(program, OK, path) if path else Finding(program, MISSING, "not on the PATH", hint)


def gpu() -> Iterator[Finding]:
    """CuPy, the driver, its devices with the speed of page-locked copies, the compiler, NCCL, nvCOMP, NVTX."""
    from holoray.kernels import xp

    try:
        cupy = xp.cupy()
    except DeviceError as error:
        yield Finding("cupy", MISSING, error.message, error.hint)
        return
    yield Finding("cupy", OK, str(cupy.__version__))
    try:
        count = xp.device_count()
    except DeviceError as error:
        yield Finding("cuda device", MISSING, error.message, error.hint)
        return
    if count == 0:
        hint = "CUDA_VISIBLE_DEVICES may hide devices, and a container needs --gpus all"
        yield Finding("cuda device", MISSING, "the driver is there, but no device", hint)
        return
    driver, runtime = cupy.cuda.runtime.driverGetVersion(), cupy.cuda.runtime.runtimeGetVersion()
    for number in range(count):
        yield _device(cupy, number, f"driver for CUDA {_dotted(driver)}, CUDA {_dotted(runtime)}")
    yield _compiler()
    yield _nccl(xp)
    yield _nvcomp(xp)
    yield _nvtx(xp)


def _device(cupy: Any, number: int, versions: str) -> Finding:
    from holoray.kernels.cuda.device import pinned_copy_speed

    try:
        with cupy.cuda.Device(number):
            properties = cupy.cuda.runtime.getDeviceProperties(number)
            free, total = cupy.cuda.runtime.memGetInfo()
            speed = pinned_copy_speed(cupy)
    except (RuntimeError, MemoryError) as error:  # what CuPy raises for drivers, and where others took all memory
        return Finding("cuda device", BROKEN, f"{number}: {error}", "is it in use by others (nvidia-smi)?")
    name, major, minor = properties["name"].decode(), properties["major"], properties["minor"]
    detail = (
        f"{number}: {name}, compute capability {major}.{minor}, {human_bytes(free)} of {human_bytes(total)} free, "
        f"page-locked copies {speed / 1e9:.1f} GB/s, {versions}"
    )
    if 10 * major + minor < 75:
        return Finding("cuda device", BROKEN, detail, "compute capability 7.5 is the least")
    return Finding("cuda device", OK, detail)


def _compiler() -> Finding:
    import numpy as np

    from holoray.kernels.cuda.device import CudaDevice
    from holoray.kernels.launchers import store

    try:
        device = CudaDevice()
        out = device.zeros((8,), np.float16)
        store(device, device.upload(np.ones(8, np.float32)), out, 1)
        works = bool((device.download(out) == 2).all())
    except (HolorayError, RuntimeError) as error:  # what CuPy raises for compilers and drivers
        return Finding(
            "nvrtc", BROKEN, str(error).splitlines()[0], "reinstall the extra for your driver's CUDA version"
        )
    return Finding("nvrtc", OK if works else BROKEN, "a kernel was compiled and ran")


def _nccl(xp: Any) -> Finding:
    try:
        version = int(xp.nccl().get_version())
    except DeviceError as error:
        return Finding("nccl", MISSING, error.message, error.hint)
    return Finding("nccl", OK, f"{version // 10000}.{version // 100 % 100}.{version % 100}")


def _nvcomp(xp: Any) -> Finding:
    try:
        return Finding("nvcomp", OK, str(xp.nvcomp().__version__))
    except DeviceError as error:
        return Finding("nvcomp", MISSING, error.message, error.hint)


def _nvtx(xp: Any) -> Finding:
    if xp.nvtx() is None:
        return Finding("nvtx", MISSING, "this CuPy cannot name stages in a profiler's trace", xp.INSTALL_HINT)
    return Finding("nvtx", OK, "stages of a load are named in traces: nsys profile -t cuda,nvtx holoray load …")


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


CHECKS: Final[tuple[Callable[[], Iterator[Finding]], ...]] = (cpu, ray, shared_memory, tools, gpu)
GPU_SUBJECTS: Final = frozenset({"cupy", "cuda device", "nvrtc"})
"""What `--device cuda` asks for; NCCL only where several GPUs are to share."""
