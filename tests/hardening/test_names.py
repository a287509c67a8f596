"""Hostile tensor names are keys: they load back as they are or are refused, never become paths or terminal codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from manifest_mutations import read_rows, reseal, write_rows
from rich.markup import render
from small_store import blobs, store_of

import holoray
from holoray.cli.main import main
from holoray.cli.output import printable, short
from holoray.errors import FormatError, LimitError
from holoray.formats.safetensors import SafetensorsFile
from holoray.stores import MANIFEST, MemoryStore

HOSTILE = (
    "../../escape",
    "/etc/escape",
    "..",
    "CON",
    "ROOT",
    "manifest.arrow",
    "a\0b",
    "a\nb\r\n",
    "\x1b[2J\x1b]0;owned\x07",
    "\x9b31m",
    "\u202egnp.exe\u2066",
    "\u200b\ufeff",
    "\u2028\u2029",
    "[bold red]x[/][link=file:///]",
    "[/]",
    "e\u0301",
    "\u00e9",
    "\U0001f9ff",
    "'; DROP TABLE--",
    "%s{0}$(id)`id`",
    "x" * 4096,
)
REFUSED = ("", "x" * 4097, "n" * (1 << 20), "half \ud800", "\udfff", "\U0001f9ff" * 1025)


def _is_tame(text: str) -> bool:
    """No control, format (bidi, zero width), surrogate or line separator characters."""
    return all(unicodedata.category(c) not in {"Cc", "Cf", "Cs", "Zl", "Zp"} for c in text)


@pytest.mark.fault("hostile-name")
def test_hostile_names_are_only_keys(tmp_path: Path) -> None:
    tensors = {name: np.full(3, i, np.float32) for i, name in enumerate(HOSTILE)}
    store = tmp_path / "deep" / "store"
    holoray.encode(tensors, store)
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*")) if path.is_file()] == [
        "deep/store/ROOT",
        "deep/store/fragments-00000.arrow",
        "deep/store/manifest.arrow",
    ]
    loaded = holoray.open(store).load()
    assert list(loaded) == list(HOSTILE)
    for name, array in tensors.items():
        np.testing.assert_array_equal(loaded[name], array)


@pytest.mark.fault("hostile-name")
def test_hostile_names_survive_a_checkpoint_file(tmp_path: Path) -> None:
    store = MemoryStore()
    holoray.encode({name: np.ones(3, np.float32) for name in HOSTILE}, store)
    from holoray.pipelines.api import load_file

    load_file(holoray.open(store), tmp_path / "out.safetensors")
    file = SafetensorsFile(tmp_path / "out.safetensors")
    assert {spec.name for spec in file.specs} == set(HOSTILE)
    file.close()
    assert os.listdir(tmp_path) == ["out.safetensors"]


@pytest.mark.fault("hostile-name")
@pytest.mark.parametrize("name", REFUSED, ids=range(len(REFUSED)))
def test_names_that_nothing_can_hold_are_refused_when_encoding(name: str) -> None:
    store = MemoryStore()
    with pytest.raises((FormatError, LimitError)):
        holoray.encode({name: np.ones(3, np.float32)}, store)
    assert store.blobs == {}


def test_texts_of_a_checkpoint_file_are_checked_before_any_work(tmp_path: Path) -> None:
    """JSON can spell half a character: in a name and in the metadata."""
    fine = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    for text in (f'{{"\\ud800":{fine}}}', f'{{"__metadata__":{{"a":"\\ud800"}},"x":{fine}}}'):
        path = tmp_path / "in.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + bytes(4))
        store = MemoryStore()
        with pytest.raises(FormatError, match="half"):
            holoray.encode(path, store)
        assert store.blobs == {}


@pytest.mark.fault("malformed")
def test_what_cannot_be_read_back_is_not_sealed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the reader's reason: better no store than one that nobody can open."""
    monkeypatch.setattr("holoray.manifest.MAX_CONFIG_BYTES", 1)
    store = MemoryStore()
    with pytest.raises(LimitError):
        holoray.encode({"x": np.ones(3, np.float32)}, store)
    assert "ROOT" not in store.blobs


@pytest.mark.fault("absurd-layout")
def test_shapes_that_nothing_can_hold_are_refused(tmp_path: Path) -> None:
    text = '{"x":{"dtype":"F32","shape":[1099511627776,0,1099511627776],"data_offsets":[0,0]}}'
    path = tmp_path / "in.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode())
    with pytest.raises(LimitError):
        holoray.encode(path, MemoryStore())


@pytest.mark.fault("hostile-name")
@pytest.mark.parametrize("name", ["", "n" * 5000, "layer.bias"])
def test_a_manifest_with_an_impossible_name_is_refused(name: str) -> None:
    header, rows = read_rows(blobs()[MANIFEST])
    rows[0]["name"] = name
    with pytest.raises((FormatError, LimitError)):
        holoray.open(store_of(reseal(blobs() | {MANIFEST: write_rows(header, rows)})))


def test_metadata_with_half_a_character_is_refused() -> None:
    header, rows = read_rows(blobs()[MANIFEST])
    header["metadata"] = {"a": "\ud800"}
    with pytest.raises(FormatError):
        holoray.open(store_of(reseal(blobs() | {MANIFEST: write_rows(header, rows)})))


@pytest.mark.fault("hostile-name")
@pytest.mark.parametrize("name", [*HOSTILE, *REFUSED], ids=range(len(HOSTILE) + len(REFUSED)))
def test_what_a_terminal_gets_is_tame(name: str) -> None:
    assert _is_tame(printable(name))
    assert _is_tame(short(name))
    assert len(render(short(name)).plain) <= 61


@pytest.mark.fault("hostile-name")
def test_markup_in_names_is_shown_and_not_obeyed() -> None:
    for left, right in [(at, 80) for at in range(80)] + [(80, at) for at in range(80)]:
        for markup in ("[bold]", "[/red]"):
            assert render(short("y" * left + markup + "z" * right)).spans == []


@pytest.mark.fault("hostile-name")
def test_errors_about_hostile_names_are_shown_tamely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A damaged fragment of each hostile tensor: what `verify` lists, and the error that ends a load."""
    store = tmp_path / "store"
    holoray.encode({name: np.ones(3, np.float32) for name in HOSTILE}, store)
    entries = {t.name: t.fragments[0] for t in holoray.open(store).manifest.tensors}
    path = store / "fragments-00000.arrow"
    data = bytearray(path.read_bytes())
    for entry in entries.values():
        data[entry.offset] ^= 1
    path.write_bytes(data)
    monkeypatch.setattr("signal.signal", lambda *_: None)  # the command line would keep SIGINT for itself
    shown = []
    for arguments in (["verify", str(store)], ["verify", str(store), "--json"], ["load", str(store), "out"]):
        monkeypatch.setattr("sys.argv", ["holoray", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 3
        out, err = capsys.readouterr()
        assert _is_tame(out.rstrip("\n"))
        assert all(_is_tame(line) for line in err.split("\n"))
        shown.append(out)
    assert {bad["tensor"] for bad in json.loads(shown[1])["bad"]} == set(HOSTILE)


@pytest.mark.fault("hostile-name")
def test_names_that_only_look_alike_are_two_tensors(tmp_path: Path) -> None:
    """Nothing normalises: é in one character and in two, and the same in what a file system might fold."""
    twins = {"\u00e9": 1.0, "e\u0301": 2.0, "\u212b": 3.0, "\u00c5": 4.0, "A": 5.0, "a": 6.0, "\uff21": 7.0}
    holoray.encode({name: np.full(3, value, np.float32) for name, value in twins.items()}, tmp_path)
    sealed = holoray.open(tmp_path)
    assert {name: float(array[0]) for name, array in sealed.load().items()} == twins
    assert [sealed.entry(name).name for name in twins] == list(twins)


@pytest.mark.fault("hostile-name")
def test_the_command_line_shows_hostile_names_tamely(tmp_path: Path) -> None:
    holoray.encode({name: np.ones(3, np.float32) for name in HOSTILE}, tmp_path / "store")
    for arguments in (["inspect", "--json"], ["inspect"], ["verify"]):
        environment = os.environ | {"PYTHONPATH": str(Path(holoray.__file__).parents[1])}
        command = [sys.executable, "-m", "holoray", arguments[0], str(tmp_path / "store"), *arguments[1:]]
        run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        assert _is_tame(run.stdout.rstrip("\n"))
        assert all(_is_tame(line) for line in run.stderr.split("\n"))
