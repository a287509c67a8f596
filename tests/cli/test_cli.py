"""The command line as a program: real processes, exit codes, JSON, and silence off a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from holoray.checkpoint import open_checkpoint, save_checkpoint
from holoray.cli import main
from holoray.cli.output import printable, short
from holoray.errors import DeviceError, UsageError
from holoray.tensor import Array

HOLORAY = [sys.executable, "-m", "holoray"]


def run(*args: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*HOLORAY, *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | (env or {}),
        timeout=120,
    )


def as_json(*args: object) -> Any:
    done = run(*args, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, model: dict[str, Array]) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    save_checkpoint(path, model)
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    path = tmp_path_factory.mktemp("stores") / "store"
    assert run("encode", checkpoint, path, "-q").returncode == 0
    return path


def test_encode_inspect_verify_load(checkpoint: Path, tmp_path: Path, model: dict[str, Array]) -> None:
    encoded = as_json("encode", checkpoint, tmp_path / "s", "--pattern", "embed.*=raw", "--seed", 7)
    assert set(encoded) == {"root", "tensors", "fragments", "bytes_in", "bytes_stored", "seconds", "notes"}
    assert encoded["notes"] == []
    shown = as_json("inspect", tmp_path / "s")
    assert set(encoded) - {"notes"} < set(shown)
    assert {k: shown[k] for k in ("root", "tensors", "fragments", "bytes_in", "bytes_stored")} == {
        k: encoded[k] for k in ("root", "tensors", "fragments", "bytes_in", "bytes_stored")
    }
    assert sum(p.stat().st_size for p in (tmp_path / "s").iterdir()) == encoded["bytes_stored"]
    by_name = {row["name"]: row for row in shown["per_tensor"]}
    assert by_name["embed.weight"]["codec"] == "raw"
    assert by_name["embed.weight"]["shape"] == [1500, 400]
    assert {"name", "dtype", "shape", "codec", "fragments", "bytes"} <= set(by_name["embed.weight"])
    assert [p["bytes"] for p in shown["quality_curve"]] == sorted(p["bytes"] for p in shown["quality_curve"])
    verified = as_json("verify", tmp_path / "s", "--expect", encoded["root"])
    assert verified == {"root": encoded["root"], "ok": True, "bad": []}
    loaded = as_json("load", tmp_path / "s", tmp_path / "out.safetensors", "--expect", encoded["root"])
    assert set(loaded) == {
        "root", "tensors", "fragments", "bytes_read", "quality", "relative_error", "snr_db", "seconds", "notes"
    }  # fmt: skip
    assert (loaded["quality"], loaded["relative_error"], loaded["snr_db"]) == (1.0, 0.0, None)
    got = open_checkpoint(tmp_path / "out.safetensors")
    for name, array in model.items():
        assert got.read(name).tobytes() == np.ascontiguousarray(array).tobytes()


def test_partial_loads(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    by_quality = as_json("load", store, out, "--quality", 0.9)
    assert 0.9 <= by_quality["quality"] < 1
    assert by_quality["relative_error"] == pytest.approx((1 - by_quality["quality"]) ** 0.5)
    by_bytes = as_json("load", store, out, "--bytes", by_quality["bytes_read"])
    assert by_bytes["bytes_read"] <= by_quality["bytes_read"]
    assert by_bytes["quality"] == pytest.approx(by_quality["quality"], abs=1e-6)
    by_layer = as_json("load", store, out, "--fragments", "0,1")
    manifest = as_json("inspect", store)
    assert 0 < by_layer["fragments"] < manifest["fragments"]


@pytest.mark.parametrize(
    ("args", "code", "hint"),
    [
        (["load", "STORE", "OUT", "--quality", "1.5"], 2, "every byte"),
        (["load", "STORE", "OUT", "--quality", "0.5", "--bytes", "10"], 2, "choose one"),
        (["load", "STORE", "OUT", "--fragments", "a,b"], 2, "0,2,5"),
        (["load", "STORE", "OUT", "--device", "tpu"], 2, "cpu"),
        (["load", "STORE", "OUT", "--device", "cuda:999"], 5, "hint"),  # no CuPy, no driver, or no such device
        (["load", "STORE", "OUT", "--expect", "sha256:12"], 2, "64 hex"),
        (["load", "STORE", "OUT", "--expect", "sha256:" + "0" * 64], 3, "another model"),
        (["load", "STORE", "OUT", "--bytes", "10"], 5, "at least"),
        (["load", "MISSING", "OUT"], 6, "path"),
        (["load", "STORE", "MISSING/dir/x"], 6, "directory"),
        (["inspect", "MISSING"], 6, "path"),
        (["inspect", "STORE", "OUT.png"], 2, "--plot"),
        (["inspect", "STORE", "OUT.txt", "--plot"], 2, ".svg"),
        (["inspect", "STORE", "MISSING/x.png", "--plot"], 6, "directory"),
        (["inspect", "STORE", "--plot", "--tensor", "no.such"], 2, "lists the tensors"),
        (["verify", "MISSING"], 6, "path"),
        (["encode", "MISSING", "OUT"], 6, "path"),
        (["encode", "MODEL", "STORE"], 2, "--overwrite"),
        (["encode", "MODEL", "OUT", "--codec", "zip"], 2, "planes"),
        (["encode", "MODEL", "OUT", "--pattern", "x"], 2, "GLOB=CODEC"),
        (["encode", "MODEL", "OUT", "--dtype", "f64"], 2, "bf16"),
        (["encode", "MODEL", "OUT", "--fragments", "x"], 2, "--help"),
        (["frobnicate"], 2, "--help"),
        (["load", "STORE"], 2, "--help"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else None,
)
def test_what_goes_wrong(args: list[str], code: int, hint: str, store: Path, checkpoint: Path, tmp_path: Path) -> None:
    places = {
        "STORE": str(store),
        "OUT": str(tmp_path / "out"),
        "MISSING": str(tmp_path / "no"),
        "MODEL": str(checkpoint),
    }
    args = [places.get(a, a.replace("MISSING", places["MISSING"])) for a in args]
    done = run(*args)
    assert done.returncode == code, done.stderr
    assert hint in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []  # nothing half-done is left
    assert done.stderr.count("\n") == 2  # the error and its hint
    if args[0] != "verify":
        error = json.loads(run(*args, "--json").stdout)["error"]
        assert error["message"]
        assert error["hint"]


@pytest.mark.fault("flipped")
def test_a_damaged_store_is_named_and_exits_3(store: Path, tmp_path: Path) -> None:
    import shutil

    bad = tmp_path / "bad"
    shutil.copytree(store, bad)
    file = bad / "fragments-00001.arrow"
    blob = bytearray(file.read_bytes())
    blob[len(blob) // 2] ^= 1
    file.write_bytes(blob)
    done = run("verify", bad, "--json")
    assert done.returncode == 3
    report = json.loads(done.stdout)
    assert report["ok"] is False
    assert [set(row) for row in report["bad"]] == [{"file", "tensor", "fragment", "why"}]
    assert report["bad"][0]["file"] == "fragments-00001.arrow"
    said = run("verify", bad).stderr
    assert said.startswith("1 fault in ")
    assert "fragments-00001.arrow, fragment " in said
    assert repr(report["bad"][0]["tensor"]) in said
    done = run("load", bad, tmp_path / "x.safetensors")
    assert done.returncode == 3
    assert report["bad"][0]["tensor"] in done.stderr
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.fault("flipped")
@pytest.mark.parametrize("file", ["ROOT", "manifest.arrow"])
def test_verify_says_so_when_the_root_or_the_manifest_is_damaged(file: str, store: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(store, tmp_path / "bad")
    blob = bytearray((tmp_path / "bad" / file).read_bytes())
    blob[20] ^= 1
    (tmp_path / "bad" / file).write_bytes(blob)
    done = run("verify", tmp_path / "bad", "--json")
    assert done.returncode == 3
    report = json.loads(done.stdout)
    assert (report["ok"], len(report["bad"])) == (False, 1)
    assert "ROOT" in report["bad"][0]["why"]


def test_names_with_markup_are_only_names(store: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(store, tmp_path / "a[bold]x[" / "y]")
    done = run("verify", tmp_path / "a[bold]x[" / "y]")
    assert done.returncode == 0
    assert "a[bold]x[/y]" in done.stderr


def test_off_a_terminal_a_command_says_one_plain_line(store: Path) -> None:
    done = run("inspect", store)
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "\x1b" not in done.stderr
    assert run("inspect", store, "-q").stderr == ""


def test_on_a_terminal_there_are_tables(store: Path) -> None:
    leader, follower = pty.openpty()
    with subprocess.Popen([*HOLORAY, "inspect", str(store)], stdout=subprocess.PIPE, stderr=follower) as process:
        os.close(follower)
        shown = b""
        try:
            while block := os.read(leader, 65536):
                shown += block
        except OSError:  # the other side closed
            pass
        assert process.stdout is not None
        assert process.stdout.read() == b""
    os.close(leader)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert "embed.weight" in text
    assert "quality by bytes read" in text


@pytest.mark.fault("killed-encode")
def test_interrupting_an_encode_is_130_and_resumable(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    save_checkpoint(tmp_path / "in.safetensors", {str(i): rng.standard_normal((2000, 2000)) for i in range(12)})
    args = [*HOLORAY, "encode", str(tmp_path / "in.safetensors"), str(tmp_path / "s"), "--codec", "raw"]
    with subprocess.Popen(args, stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "s").exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, shown = process.communicate(timeout=60)
    assert process.returncode == 130, shown
    assert shown == "interrupted\n"
    assert not (tmp_path / "s" / "ROOT").exists()
    assert subprocess.run([*args, "-q"], check=False).returncode == 0


def test_unexpected_errors_are_one_line_unless_asked(store: Path, tmp_path: Path) -> None:
    code = (
        "import sys, holoray.pipelines.sealed_store as s\n"
        "def broken(*a, **k): raise ZeroDivisionError('on purpose')\n"
        "s.SealedStore.__init__ = broken\n"
        "from holoray.cli.main import main\n"
        f"sys.argv = ['holoray', 'inspect', {str(store)!r}]\nmain()\n"
    )
    for debug, expected in (("", "this is a bug"), ("1", "Traceback")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"HOLORAY_DEBUG": debug},
        )
        assert done.returncode == 1
        assert expected in done.stderr


@pytest.mark.fault("hostile-name")
@pytest.mark.parametrize("name", ["a\x1b[31mred", "a\nb", "\u202egnp.exe", "a\0b", "\ud800", "\x9b2J"])
def test_hostile_names_do_not_reach_the_terminal(name: str) -> None:
    for text in (printable(name), short(name)):
        assert text.isprintable()
        assert "\x1b" not in text


def test_help_is_quick_and_version_is_plain() -> None:
    import holoray

    assert run("version").stdout == f"{holoray.__version__}\n"
    shown = run("--help").stdout
    assert all(verb in shown for verb in ("encode", "inspect", "verify", "load", "warmup"))
    heavy = "import sys, holoray.cli.main; print([m for m in ('ray', 'numba', 'scipy', 'cupy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.ray
def test_warmup(store: Path, tmp_path: Path, model: dict[str, Array]) -> None:
    values = as_json(
        "warmup", store, "--workers", 2, "--quality", 0.9, "--quality", 1, "--out", tmp_path / "out", "--patience", 90
    )
    assert set(values) == {
        "root", "tensors", "fragments", "bytes_read", "quality", "relative_error", "snr_db", "seconds", "generations",
        "notes",
    }  # fmt: skip
    assert [set(g) for g in values["generations"]] == [{"generation", "quality", "bytes_read", "seconds"}] * 2
    assert [g["generation"] for g in values["generations"]] == [1, 2]
    assert 0.9 <= values["generations"][0]["quality"] < values["quality"] == 1.0
    loaded = as_json("load", store, tmp_path / "x.safetensors")
    assert {k: loaded[k] for k in ("root", "fragments", "bytes_read")} == {
        k: values[k] for k in ("root", "fragments", "bytes_read")
    }
    got = open_checkpoint(tmp_path / "out" / "model.safetensors")
    for name, array in model.items():
        assert got.read(name).tobytes() == np.ascontiguousarray(array).tobytes()


@pytest.mark.ray
def test_warmup_errors(store: Path, tmp_path: Path) -> None:
    for args, code in (
        (["warmup", tmp_path / "no"], 6),
        (["warmup", store, "--quality", "2"], 2),
        (["warmup", store, "--workers", "0"], 2),
        (["warmup", store, "--device", "tpu"], 2),
        (["warmup", store, "--placement", "shard"], 2),
        (["warmup", store, "--in-place"], 2),
        (["warmup", store, "--device", "cuda", "--placement", "shard", "--place", "*"], 2),
        (["warmup", store, "--patience", "-1"], 2),
        (["warmup", store, "--expect", "sha256:" + "0" * 64], 3),
    ):
        done = run(*args)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.ray
def test_a_warmup_on_gpus_says_where_there_are_none(store: Path) -> None:
    done = run("warmup", store, "--device", "cuda", env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 5, done.stderr
    assert "Ray knows of 0 GPUs here, and 1 are needed" in done.stderr
    assert "holoray doctor" in done.stderr


def test_what_is_said_of_devices_reaches_a_warmup(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def note(*_: Any, accelerator: Any, **__: Any) -> None:
        seen.append(accelerator)
        raise DeviceError("that is enough")

    monkeypatch.setattr("holoray.actors.warm_model.warm_up", note)
    options = ["--device", "cuda", "--device-bytes", "5000", "--decompress", "auto"]
    assert isinstance(CliRunner().invoke(main.app, ["warmup", str(store), *options]).exception, DeviceError)
    assert isinstance(CliRunner().invoke(main.app, ["warmup", str(store), *options[:2]]).exception, DeviceError)
    told, plain = seen
    assert (told.device_bytes, told.decompress) == (5000, "auto")
    assert (plain.device_bytes, plain.decompress) == (None, "host")


@pytest.mark.parametrize(
    "options",
    [("--device-bytes", "5000"), ("--decompress", "device"), ("--device", "cuda", "--decompress", "gpu")],
    ids=" ".join,
)
def test_options_of_a_device_that_nobody_asked_for_are_refused(options: tuple[str, ...], store: Path) -> None:
    verbs = (["warmup", str(store)], ["load", str(store), "out.safetensors"])
    for command in verbs[: 1 if "cuda" in options else 2]:
        result = CliRunner().invoke(main.app, [*command, *options])
        assert isinstance(result.exception, UsageError), result.output


def test_options_of_the_transforms(checkpoint: Path, tmp_path: Path) -> None:
    options = ("--essential", 0.2, "--rank", 90, "--energy", 0.99, "--coefficients", "float16", "--fragments", 4)
    patterns = ("--pattern", "*.0.mlp.*=lowrank", "--pattern", "*.attention.*=projection", "--pattern", "embed.*=auto")
    encoded = as_json("encode", checkpoint, tmp_path / "s", "--codec", "spectral", *options, *patterns)
    assert [note.split(" ")[0] for note in encoded["notes"]] == ["essential"]
    shown = as_json("inspect", tmp_path / "s")
    codecs = {row["name"]: row["codec"] for row in shown["per_tensor"]}
    assert codecs["layers.0.mlp.weight"] == "lowrank"
    assert codecs["layers.0.attention.weight"] == "projection"
    assert codecs["layers.1.mlp.weight"] == "spectral"
    assert codecs["embed.weight"] == "planes"
    kept = {key: shown["options"][key] for key in ("essential", "rank", "energy", "coefficients")}
    assert kept == {"essential": 0.2, "rank": 90, "energy": 0.99, "coefficients": "float16"}
    loaded = as_json("load", tmp_path / "s", tmp_path / "out.safetensors", "--fragments", "0,2")
    assert 0.2 < loaded["quality"] < 1


def test_what_does_not_pay_is_a_warning(checkpoint: Path, tmp_path: Path) -> None:
    done = run("encode", checkpoint, tmp_path / "s", "--codec", "lowrank")
    assert done.returncode == 0
    assert re.search(r"warning: lowrank does not pay.*embed\.weight", done.stderr)
    assert run("encode", checkpoint, tmp_path / "q", "--codec", "lowrank", "-q").stderr == ""
