"""Stores at URIs: which store a URI gives, what its messages never show, and the whole way from encode to load."""

from __future__ import annotations

import base64
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import KEY, SECRET, s3_server, served

import holoray
from holoray.checkpoint import open_checkpoint, save_checkpoint
from holoray.errors import HolorayError, SourceError, UsageError
from holoray.stores import HttpStore, LocalStore, RemoteStore, Store, open_store
from holoray.stores.uri import join, public, redacted, scheme_of
from holoray.tensor import Array

Model = dict[str, Array]


def holoray_command(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "holoray", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


# -- which store -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "kind", "uri"),
    [
        ("a/b", LocalStore, "a/b"),
        ("file:///a/b", LocalStore, "/a/b"),
        ("http://h/a/b/", HttpStore, "http://h/a/b"),
        ("HTTPS://u:p@h:8/a?sig=x", HttpStore, "https://h:8/a"),
        ("s3://k:s@bucket/a?region=eu-west-1", RemoteStore, "s3://bucket/a"),
        ("gs://bucket/a", RemoteStore, "gs://bucket/a"),
        ("memory://a/b", RemoteStore, "memory://a/b"),
    ],
)
def test_the_scheme_chooses(where: str, kind: type[Store], uri: str) -> None:
    store = open_store(where)
    assert type(store) is kind
    assert store.uri == uri
    assert store.remote == (kind is not LocalStore)
    assert pickle.loads(pickle.dumps(store)).uri.endswith(uri)  # noqa: S301


@pytest.mark.parametrize(
    ("where", "message", "hint"),
    [
        ("floppy://a", "floppy:// is no scheme", "s3, gs"),
        ("gdrive://a", "not installed", "gdrive_fs"),
        ("s3://bucket/a?bogus=1", "bogus", "URI"),
        ("http://[::1/a", "no URI", "spelt"),
        ("s3://bucket:port/a", "no URI", "spelt"),
        ("", "empty", ""),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(where: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        open_store(where).exists("ROOT")
    assert hint in caught.value.hint


def test_without_fsspec_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(UsageError, match="fsspec") as caught:
        open_store("memory://a")
    assert "holoray[remote]" in caught.value.hint


def test_no_java_is_one_line() -> None:
    """Arrow lists every path on which it looked for libhdfs or libjvm."""
    with pytest.raises(SourceError) as caught:
        open_store("hdfs://127.0.0.1:1/a").exists("ROOT")
    assert "\n" not in caught.value.message
    assert caught.value.message.startswith("cannot open hdfs://127.0.0.1:1/a: ")


# -- what is never shown ---------------------------------------------------------------------------------


_TEXT = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=8, max_size=20)


@pytest.mark.fault("leaked-secret")
@settings(deadline=None, max_examples=50)
@given(user=_TEXT, password=_TEXT, token=_TEXT, host=st.sampled_from(["h", "h:80", "[::1]", "b-1.x"]))
def test_credentials_are_in_no_public_uri(user: str, password: str, token: str, host: str) -> None:
    path = "models/one"
    uri = f"s3://{user}:{password}@{host}/{path}?token={token}"
    assert public(uri) == f"s3://{host}/{path}"
    assert join(uri, "x") == f"s3://{user}:{password}@{host}/{path}/x?token={token}"
    assert scheme_of(uri) == "s3"
    message = redacted(f"GET {uri} failed, said '{uri}'; password was {password}\nmore", password)
    assert message == f"GET s3://{host}/{path} failed, said 's3://{host}/{path}'; password was ***"


def _told(access: Callable[[], object]) -> str:
    with pytest.raises(HolorayError) as caught:
        access()
    error = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
    assert caught.value.__suppress_context__ or caught.value.__context__ is None  # what a traceback would show
    return "\n".join([str(error), error.hint, str(error.source), repr(error)])


@pytest.mark.fault("leaked-secret")
def test_errors_show_no_credentials(tmp_path: Path) -> None:
    with served(tmp_path) as server:
        store = open_store(f"http://{KEY}:{SECRET}@{server.host}/a?token={SECRET}")
        texts = [_told(lambda: store.size("ROOT")), _told(lambda: holoray.open(store))]
        for mode in ("silent", "no ranges", "short", 403, 500):
            server.mode = mode
            texts.append(_told(lambda: store.read("ROOT", 10)))
    closed = open_store(f"http://{KEY}:{SECRET}@{server.host}/a?token={SECRET}")
    texts.append(_told(lambda: closed.size("ROOT")))
    with s3_server() as s3:
        there = open_store(s3.uri("nothing"))
        texts += [_told(lambda: there.size("ROOT")), _told(lambda: holoray.open(there))]
        texts.append(_told(lambda: open_store(s3.uri("nothing") + "&bogus=1").size("ROOT")))
    for text in texts:
        assert SECRET not in text
        assert KEY not in text


# -- the whole way ---------------------------------------------------------------------------------------


def test_basic_auth_and_a_token_travel(tmp_path: Path, model: Model) -> None:
    holoray.encode(model, tmp_path / "store")
    with served(tmp_path) as server:
        server.login, server.token = base64.b64encode(b"us:p@ss").decode(), "t0"
        with pytest.raises(SourceError, match="403"):
            holoray.open(f"{server.url}/store")
        weights = holoray.open(f"http://us:p%40ss@{server.host}/store?token=t0").load()
        assert weights["embed.weight"].tobytes() == model["embed.weight"].tobytes()


def test_the_command_line_over_http(tmp_path: Path, model: Model) -> None:
    root = holoray.encode(model, tmp_path / "store").root
    with served(tmp_path) as server:
        uri, out = f"{server.url}/store", tmp_path / "out.safetensors"
        for verb in (["inspect"], ["verify", "--expect", root], ["load", out]):
            done = holoray_command(verb[0], uri, *verb[1:], "--json")
            assert done.returncode == 0, done.stderr
        missing = holoray_command("inspect", f"{server.url}/nothing")
    assert missing.returncode == 6
    assert f"{server.url}/nothing is no holoray store" in missing.stderr
    _assert_equal(out, model)


def test_the_command_line_over_s3(tmp_path: Path, model: Model) -> None:
    save_checkpoint(tmp_path / "model.safetensors", model)
    with s3_server() as s3:
        uri, out = s3.uri("stores/one"), tmp_path / "out.safetensors"
        assert holoray_command("encode", tmp_path / "model.safetensors", uri, "-q").returncode == 0
        with pytest.raises(UsageError, match=r"^s3://models/stores/one already holds a store$"):
            holoray.encode(model, uri)
        holoray.encode(model, uri, overwrite=True)
        done = holoray_command("load", uri, out, "--json")
        assert done.returncode == 0, done.stderr
        assert SECRET not in done.stdout
        assert json.loads(done.stdout)["quality"] == 1
        assert holoray.open(uri).verify() == []
    _assert_equal(out, model)


@pytest.mark.fault("killed-encode")
def test_an_interrupted_encode_resumes_on_an_object_store(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holoray.pipelines.store_writer.SEGMENT_BYTES", 1)
    names: list[str] = []

    def stop(name: str, nbytes: int) -> None:
        names.append(name)
        if len(names) == 3:
            raise KeyboardInterrupt

    with s3_server() as s3:
        store = open_store(s3.uri("resumed"))
        with pytest.raises(KeyboardInterrupt):
            holoray.encode(model, store, on_tensor=stop)
        with pytest.raises(SourceError, match="never sealed"):
            holoray.open(store)
        local = holoray.MemoryStore()
        assert holoray.encode(model, store).root == holoray.encode(model, local).root
        assert set(store.names()) == set(local.names())


def _assert_equal(path: Path, model: Model) -> None:
    checkpoint = open_checkpoint(path)
    assert {spec.name for spec in checkpoint.specs} == set(model)
    for name, array in model.items():
        assert checkpoint.read(name).tobytes() == array.tobytes()
