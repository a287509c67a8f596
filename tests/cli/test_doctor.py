"""`holoray doctor`: useful without a GPU, and honest about what is missing."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from types import SimpleNamespace
from typing import Any

import pytest

from holoray.cli import doctor
from holoray.cli.output import Output
from holoray.errors import DeviceError
from holoray.kernels import xp


def diagnose(device: str = "cpu") -> dict[str, Any]:
    """The JSON object, which must say what the answer says."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        ready = doctor.run_doctor(Output(json=True, quiet=False), device=device)
    result: dict[str, Any] = json.loads(printed.getvalue())
    assert result["ready"] is ready
    return result


def test_it_runs_as_a_program_and_says_what_there_is() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "holoray", "doctor", "--json"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    findings = {f["subject"]: f for f in json.loads(done.stdout)["findings"]}
    assert {"cpu", "numba", "ray", "shared memory", "promtool", "g++", "cupy"} <= findings.keys()
    assert all(f["hint"] for f in findings.values() if f["status"] != "ok")


def test_a_missing_gpu_only_matters_to_whoever_asks_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise DeviceError("CuPy cannot be imported: no module", hint=xp.INSTALL_HINT)

    monkeypatch.setattr(xp, "cupy", missing)
    assert diagnose()["ready"]
    assert not diagnose("cuda")["ready"]


def test_asking_for_what_is_missing_is_exit_code_5() -> None:
    try:
        count = xp.device_count()
    except DeviceError:
        count = 0
    done = subprocess.run(
        [sys.executable, "-m", "holoray", "doctor", "--device", "cuda"], capture_output=True, timeout=120
    )
    assert done.returncode == (0 if count else DeviceError.exit_code)
    assert (b"warning:" in done.stderr) == (count == 0)


def test_nvcomp_is_told_by_its_version_or_by_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise DeviceError("nvCOMP cannot be imported: no module", hint="pip install it")

    monkeypatch.setattr(xp, "nvcomp", lambda: SimpleNamespace(__version__="6.0.0"))
    assert (doctor._nvcomp(xp).status, doctor._nvcomp(xp).detail) == ("ok", "6.0.0")
    monkeypatch.setattr(xp, "nvcomp", missing)
    assert (doctor._nvcomp(xp).status, doctor._nvcomp(xp).hint) == ("missing", "pip install it")


class RuntimeFailureError(RuntimeError):
    status = 35


def cupy_with(devices: int | Exception) -> Any:
    """As much of CuPy as is asked before a device is touched."""

    def count() -> int:
        if isinstance(devices, Exception):
            raise devices
        return devices

    runtime = SimpleNamespace(getDeviceCount=count, CUDARuntimeError=RuntimeFailureError)
    return SimpleNamespace(__version__="14", cuda=SimpleNamespace(runtime=runtime))


@pytest.mark.parametrize(
    ("devices", "said"), [(0, "no device"), (RuntimeFailureError("insufficient driver"), "insufficient")]
)
def test_a_driver_without_devices_or_none_at_all(monkeypatch: pytest.MonkeyPatch, devices: Any, said: str) -> None:
    monkeypatch.setattr(xp, "cupy", lambda: cupy_with(devices))
    answer = diagnose("cuda")
    found = {f["subject"]: f for f in answer["findings"]}
    assert not answer["ready"]
    assert found["cuda device"]["status"] == "missing"
    assert said in found["cuda device"]["detail"]
    with pytest.raises(DeviceError):
        xp.check_device(0)


def test_full_shared_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=64 << 20, free=1 << 20))
    (finding,) = doctor.shared_memory()
    assert "--shm-size" in finding.hint
