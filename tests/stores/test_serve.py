"""`holoray serve`: who may read what, what it tells, and what happens when it dies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from bounds import bounded
from certificates import make_certificate
from hostile_http import hangs, hostile
from pyarrow import flight
from serving import served

import holoray
from holoray.cli.output import Output
from holoray.cli.serve import run_serve
from holoray.errors import IntegrityError, SourceError, UsageError
from holoray.metrics import JobMetrics, MetricsServer
from holoray.pipelines import serve as serving
from holoray.pipelines.loader import Loader
from holoray.stores import FlightStore, LocalStore, MemoryStore, ReadLimits, Store
from holoray.stores.flight import MAX_RANGE_BYTES, MISSING, Range
from holoray.tensor import Array

Model = dict[str, Array]
TOKEN = "a-token-of-the-tests"
QUICK = ReadLimits(answer_s=20)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, model: Model) -> Path:
    directory = tmp_path_factory.mktemp("served") / "store"
    holoray.encode(model, directory)
    (directory / "secret.txt").write_text("not yours")
    (directory / "fragments-00000.arrow.partial").write_text("half")
    return directory


def same(weights: Model, model: Model) -> bool:
    return all(weights[name].tobytes() == array.tobytes() for name, array in model.items())


# -- a real server, in a process of its own ----------------------------------------------------------------


@dataclass
class Served:
    process: subprocess.Popen[str]
    said: dict[str, Any]

    def end(self, how: signal.Signals) -> int:
        self.process.send_signal(how)
        return self.process.wait(60)


@contextmanager
def command(store: Path, *arguments: str, port: int = 0, **environment: str) -> Iterator[Served]:
    """`holoray serve`, once it listens."""
    line = [sys.executable, "-m", "holoray", "serve", str(store), "--json", "--port", str(port), *arguments]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
    try:
        assert process.stdout is not None
        yield Served(process, json.loads(process.stdout.readline() or "{}"))
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def test_the_command_serves_until_a_signal(store: Path, model: Model) -> None:
    with command(store, "--metrics-port", "0") as server:
        assert server.said["root"] == holoray.open(store).root
        opened = holoray.open(server.said["uri"], expect=server.said["root"])
        assert opened.strict
        assert same(opened.load(), model)
        assert opened.verify() == []
        text = urllib.request.urlopen(server.said["metrics"], timeout=60).read().decode()
        sent = next(float(line.split()[1]) for line in text.splitlines() if line.startswith("holoray_served_bytes_tot"))
        assert sent > sum(path.stat().st_size for path in store.glob("fragments-*.arrow"))
        assert server.end(signal.SIGTERM) == 0
        with pytest.raises(SourceError, match="does not answer"):
            opened.store.size("ROOT")


@pytest.mark.fault("dead-server")
def test_a_killed_server_is_a_source_error_and_a_new_one_goes_on(store: Path, model: Model) -> None:
    """What is loaded stays, and the load ends bit for bit once the server is back at its address."""
    with command(store) as server:
        port = int(server.said["uri"].rpartition(":")[2])
        loader = holoray.open(FlightStore(server.said["uri"], limits=QUICK)).loader()
        reached = loader.load(holoray.Target(fragments=(0, 1))).ratio
        assert 0.5 < reached < 1
        assert server.end(signal.SIGKILL) == -signal.SIGKILL
        with bounded(seconds=60), pytest.raises(SourceError) as caught:
            loader.load()
        assert caught.value.hint
        assert loader.quality.ratio == reached
    with command(store, port=port) as server:
        resumed(loader)
        assert same(loader.state_dict(), model)
        assert server.end(signal.SIGINT) == 0


def resumed(loader: Loader) -> None:
    """GRPC tries an address that did not answer once a second."""
    for _ in range(600):
        try:
            loader.load()
        except SourceError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError("the server never came back")


_STUCK = """
import sys, threading
import holoray
from holoray.stores import LocalStore

class Stuck(LocalStore):
    def read_into(self, name, offset, out):
        if name.startswith("fragments") and offset >= 2 << 20:
            threading.Event().wait()
        return super().read_into(name, offset, out)

with holoray.serve(Stuck(sys.argv[1])) as server:
    print(server.uri, flush=True)
    threading.Event().wait()
"""


@pytest.mark.fault("dead-server")
def test_a_server_that_dies_in_the_middle_of_an_answer(tmp_path: Path) -> None:
    (holoray.encode({"w": make_noise(4 << 20)}, tmp_path, codec="raw"))
    process = subprocess.Popen([sys.executable, "-c", _STUCK, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    out = bytearray(4 << 20)
    failed: list[SourceError] = []
    try:
        assert process.stdout is not None
        client = FlightStore(process.stdout.readline().strip(), limits=ReadLimits(answer_s=100))

        def read() -> None:
            try:
                client.read_into("fragments-00000.arrow", 0, memoryview(out))
            except SourceError as error:
                failed.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        while not any(out[(2 << 20) - 64 : 2 << 20]):  # two pieces are here, and the third will never come
            assert reader.is_alive()
            reader.join(0.01)
        process.kill()
        reader.join(60)
        assert not reader.is_alive()
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
    assert failed[0].hint
    assert failed[0].received == 2 << 20
    assert all(out[64 : 2 << 20 : 4096])
    assert not any(out[3 << 20 :])


def make_noise(nbytes: int) -> Array:
    import numpy as np

    return np.random.default_rng(0).integers(1, 255, nbytes, np.uint8)


def test_the_command_can_be_interrupted_while_it_opens_the_store() -> None:
    with hostile(hangs()) as silent:
        line = [sys.executable, "-m", "holoray", "serve", silent.url, "--port", "0"]
        process = subprocess.Popen(line, stderr=subprocess.DEVNULL)
        try:
            while not silent.requests:
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 130  # the server has 30 s to answer
        finally:
            process.kill()
            process.wait()


def test_the_command_serves_shares_of_several_places(tmp_path: Path, model: Model) -> None:
    root = holoray.encode(model, tmp_path / "s", shares=holoray.Shares.usable(4, 2, 3)).root
    one, two, three = (str(tmp_path / "s" / f"share-{i}") for i in (0, 2, 3))
    with command(Path(one), "--share", two, "--share", three) as server:
        assert server.said["root"] == root
        assert same(holoray.open(server.said["uri"]).load(), model)
        assert server.end(signal.SIGINT) == 0


def test_what_the_command_refuses(store: Path) -> None:
    line = [sys.executable, "-m", "holoray", "serve", str(store), "--port", "0", "--host", "0.0.0.0"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "TLS and a token" in done.stderr
    with pytest.raises(UsageError, match="no HOLORAY_NO_SUCH"):
        run_serve(Output(json=True, quiet=True), str(store), token_env="HOLORAY_NO_SUCH", metrics_port=None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        options = ["--port", "0", "--metrics-port", str(taken.getsockname()[1])]
        done = subprocess.run([*line[:5], *options], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "metrics cannot be served on port" in done.stderr
    for port in (-1, 1 << 16):
        with pytest.raises(UsageError, match=f"there is no port {port}"):
            MetricsServer(JobMetrics(), port)


# -- who may read -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.1", "example.com"])
@pytest.mark.fault("stranger")
def test_other_machines_need_tls_and_a_token(host: str, store: Path, tmp_path: Path) -> None:
    certificate = make_certificate(tmp_path, "127.0.0.1")
    tls: dict[str, Any] = {"tls_cert": certificate.chain, "tls_key": certificate.key}
    options: tuple[dict[str, Any], ...] = ({}, {"token": TOKEN}, tls)
    for given in options:
        with pytest.raises(UsageError, match="TLS and a token") as caught:
            holoray.serve(store, host=host, **given)
        assert "127.0.0.1" in caught.value.hint


@pytest.mark.fault("stranger")
def test_tls_and_a_token(store: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = make_certificate(tmp_path, "127.0.0.1")
    other = make_certificate(tmp_path, "other.example")
    tls: dict[str, Any] = {"tls_cert": certificate.chain, "tls_key": certificate.key}
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.chain))
    with holoray.serve(store, host="0.0.0.0", token=TOKEN, **tls) as server:
        uri = f"grpc+tls://127.0.0.1:{server.port}"
        assert same(holoray.open(uri.replace("//", f"//{TOKEN}@")).load(), model)
        monkeypatch.setenv("HOLORAY_TOKEN", TOKEN)
        assert holoray.open(uri).root == server.root
        for wrong in ("not-the-token", TOKEN[:-1], f"{TOKEN}x"):
            with pytest.raises(SourceError, match="refuses the token"):
                holoray.open(uri.replace("//", f"//{wrong}@"))
        monkeypatch.delenv("HOLORAY_TOKEN")
        with pytest.raises(SourceError, match="wants a token") as caught:
            holoray.open(uri)
        assert "HOLORAY_TOKEN" in caught.value.hint
        plain = FlightStore(f"grpc://127.0.0.1:{server.port}", token=TOKEN, limits=QUICK)
        with pytest.raises(SourceError):
            plain.size("ROOT")
        monkeypatch.setenv("SSL_CERT_FILE", str(other.chain))
        with pytest.raises(SourceError, match="does not answer"):
            FlightStore(uri, token=TOKEN, limits=QUICK).size("ROOT")
        assert server.metrics.value("holoray_served_calls_total", outcome="refused") >= 4
    certificate = make_certificate(tmp_path, "other.example")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.chain))
    tls = {"tls_cert": certificate.chain, "tls_key": certificate.key}
    with holoray.serve(store, token=TOKEN, **tls) as server, pytest.raises(SourceError, match="does not answer"):
        FlightStore(server.uri, token=TOKEN, limits=QUICK).size("ROOT")  # trusted, and somebody else's


@pytest.mark.fault("leaked-secret")
def test_the_token_is_in_no_message(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = []
    with holoray.serve(store, token=TOKEN) as server:
        assert TOKEN not in server.uri
        for token in (TOKEN, f"{TOKEN}-wrong"):
            client = FlightStore(server.uri.replace("//", f"//{token}@"), limits=QUICK)
            assert client.uri == server.uri
            with pytest.raises(SourceError) as caught:
                client.size("fragments-99999.arrow")
            texts += [str(caught.value), caught.value.hint, str(caught.value.source), repr(caught.value)]
            assert caught.value.__suppress_context__
    with pytest.raises(SourceError) as caught:
        client.size("ROOT")
    texts.append(str(caught.value))
    with pytest.raises(UsageError) as refused:
        FlightStore(f"grpc://{TOKEN}@example.com:1")
    texts += [str(refused.value), refused.value.hint]
    assert not any(TOKEN in text for text in texts)


def test_tokens_go_through_tls_or_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLORAY_TOKEN", TOKEN)
    for uri in ("grpc://example.com:1", "grpc://10.0.0.1:1"):
        with pytest.raises(UsageError, match="in the clear"):
            FlightStore(uri)
    for uri in ("grpc://localhost:1", "grpc://127.0.0.1:1", "grpc://[::1]:1", "grpc+tls://example.com:1"):
        assert FlightStore(uri).uri == uri
    with pytest.raises(UsageError, match="no header"):
        FlightStore("grpc://localhost:1", token="a\nb")
    monkeypatch.setenv("SSL_CERT_FILE", "/nonexistent")
    monkeypatch.setattr("holoray.stores.flight.ssl.get_default_verify_paths", lambda: _NoPaths())
    with pytest.raises(UsageError, match="no trusted certificates") as caught:
        FlightStore("grpc+tls://example.com:1")
    assert "SSL_CERT_FILE" in caught.value.hint


class _NoPaths:
    cafile = None


@pytest.mark.parametrize("uri", ["grpc://h", "grpc://h:1/path", "grpc://h:1?x=1", "grpc://:1", "grpc+tls://h"])
def test_what_is_no_address(uri: str) -> None:
    with pytest.raises(UsageError, match="no address"):
        FlightStore(uri)


# -- what may be read -------------------------------------------------------------------------------------


@pytest.mark.fault("stranger")
def test_only_files_of_the_store_are_told(store: Path) -> None:
    with holoray.serve(store) as server:
        client = FlightStore(server.uri)
        assert list(client.names()) == sorted(["ROOT", "manifest.arrow", *(p.name for p in store.glob("frag*.arrow"))])
        for name in ("secret.txt", "fragments-00000.arrow.partial", "fragments-99999.arrow"):
            assert not client.exists(name)
            with pytest.raises(SourceError, match="has no"):
                client.read(name, 100)


@pytest.mark.fault("stranger")
def test_what_a_stranger_sends(store: Path) -> None:
    """Whatever it is, an error that says nothing of us; and the server goes on."""
    with holoray.serve(store) as server, flight.FlightClient(server.uri) as client:
        tickets = (
            b"",
            b"\xff" * 100,
            b"0 10 ../secret.txt",
            b"0 10 /etc/passwd",
            b"0 10 secret.txt",
            b"-1 10 ROOT",
            b"0 -1 ROOT",
            b"0 10 ROOT\n",
            b"0 " + b"9" * 30 + b" ROOT",
            b"0 %d ROOT" % (MAX_RANGE_BYTES + 1),
            b"9" * 100_000,
            "0 ١ ROOT".encode(),
        )
        for ticket in tickets:
            with pytest.raises(flight.FlightServerError) as caught:
                client.do_get(flight.Ticket(ticket)).read_all()
            assert str(store.parent) not in str(caught.value)
            assert "Traceback" not in str(caught.value)
        for descriptor in (flight.FlightDescriptor.for_command(b"x"), flight.FlightDescriptor.for_path("../x")):
            with pytest.raises(flight.FlightServerError) as caught:
                client.get_flight_info(descriptor)
            assert caught.value.extra_info == MISSING
        with pytest.raises(flight.FlightServerError):
            list(client.do_action(flight.Action("no", b"")))
        for call in (
            lambda: list(client.list_flights()),
            lambda: client.do_put(flight.FlightDescriptor.for_path("ROOT"), pa.schema([]))[0].close(),
            lambda: client.do_exchange(flight.FlightDescriptor.for_path("ROOT"))[1].read_chunk(),
            lambda: client.get_schema(flight.FlightDescriptor.for_path("ROOT")),
        ):
            with pytest.raises((NotImplementedError, pa.ArrowException)):
                call()
        refused = server.metrics.value("holoray_served_calls_total", outcome="refused")
        assert refused == len(tickets) + 3
        beyond = client.do_get(flight.Ticket(Range("ROOT", 10**18, 5).ticket))
        assert [chunk.app_metadata for chunk in beyond] == []
        assert FlightStore(server.uri).read("ROOT", 100) == (store / "ROOT").read_bytes()


class Broken(MemoryStore):
    """Fails in ways that name what is no stranger's business."""

    error: Exception | None = None
    short = 0

    def read_into(self, name: str, offset: int, out: memoryview) -> int:
        if name != "ROOT" and self.error is not None:
            raise self.error
        return super().read_into(name, offset, out[: out.nbytes - self.short])


@pytest.mark.parametrize("error", [SourceError("/home/me/x: no"), RuntimeError("/home/me/x"), MemoryError("/home/me")])
@pytest.mark.filterwarnings("ignore")
def test_what_goes_wrong_at_the_server_stays_there(
    error: Exception, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Broken()
    holoray.encode({"w": model["position_ids"]}, broken)
    with holoray.serve(broken) as server:
        client = FlightStore(server.uri)
        broken.error = error
        with pytest.raises(SourceError, match=type(error).__name__) as caught:
            client.read("manifest.arrow", 1 << 20)
        broken.error, broken.short = None, 1
        with pytest.raises(SourceError, match="became shorter"):
            client.read("manifest.arrow", 1 << 20)
    assert "/home/me" not in str(caught.value)
    assert "/home/me" in caplog.text
    assert server.metrics.value("holoray_served_calls_total", outcome="failed") == 2


def test_any_store_is_served(model: Model, store: Path, tmp_path: Path) -> None:
    """From memory, over HTTP, in shares one of which is lost, and through another server."""
    memory = MemoryStore()
    holoray.encode(model, memory)
    holoray.encode(model, tmp_path / "s", shares=holoray.Shares.usable(3, 1, 2))
    shutil.rmtree(tmp_path / "s" / "share-1")
    with served(store) as http:
        for where in (memory, http.url, LocalStore(store), tmp_path / "s"):
            with holoray.serve(where) as first, holoray.serve(first.uri) as second:
                assert second.root == first.root
                assert same(holoray.open(second.uri).load(), model)


def test_what_came_over_flight_is_checked_with_sha256(model: Model, store: Path) -> None:
    forged = MemoryStore()
    for name in ("ROOT", "manifest.arrow", *(path.name for path in store.glob("fragments-*.arrow"))):
        forged.blobs[name] = (store / name).read_bytes()
    entry = holoray.open(store).manifest.tensors[0].fragments[0]
    file = f"fragments-{entry.file:05d}.arrow"
    data = bytearray(forged.blobs[file])
    data[entry.offset] ^= 1
    with holoray.serve(forged) as server:
        opened = holoray.open(server.uri)
        forged.blobs[file] = bytes(data)
        with pytest.raises(IntegrityError):
            opened.load()
    with pytest.raises(SourceError, match="no holoray store"):
        holoray.serve(MemoryStore())


# -- how much ---------------------------------------------------------------------------------------------


@contextmanager
def stalled(uri: str) -> Iterator[None]:
    """A client that takes the first piece of a large range and then nothing more."""
    with flight.FlightClient(uri) as client:
        reader = client.do_get(flight.Ticket(Range("fragments-00000.arrow", 0, MAX_RANGE_BYTES).ticket))
        reader.read_chunk()
        yield
        reader.cancel()


@pytest.fixture
def large(tmp_path: Path) -> Store:
    """A file of 64 MiB: more than gRPC takes in advance."""
    holoray.encode({"w": make_noise(1 << 10)}, tmp_path)
    os.truncate(tmp_path / "fragments-00000.arrow", 64 << 20)
    return LocalStore(tmp_path)


@pytest.mark.fault("greedy-client")
def test_readers_are_bounded(large: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "_WAIT_S", 0.02)
    with holoray.serve(large, readers=1) as server:
        client = FlightStore(server.uri, limits=QUICK)
        refused = pytest.raises(SourceError, match="too much to do")
        with stalled(server.uri), bounded(seconds=60), refused as caught:
            client.read("ROOT", 100)
        assert caught.value.hint
        assert client.read("ROOT", 100).startswith(b"sha256:")
        assert server.metrics.value("holoray_served_calls_total", outcome="cancelled") == 1


class Stuck(MemoryStore):
    """Reads of fragments wait for a word."""

    def __init__(self) -> None:
        super().__init__()
        self.reading, self.go_on = threading.Event(), threading.Event()

    def read_into(self, name: str, offset: int, out: memoryview) -> int:
        if name.startswith("fragments"):
            self.reading.set()
            self.go_on.wait()
        return super().read_into(name, offset, out)


@pytest.mark.fault("greedy-client")
def test_a_call_that_does_not_end_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "_GRACE_S", 0.2)
    stuck = Stuck()
    holoray.encode({"w": make_noise(100)}, stuck)
    server = holoray.serve(stuck)
    client = FlightStore(server.uri, limits=QUICK)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(client.read_into, "fragments-00000.arrow", 0, memoryview(bytearray(100)))
        assert stuck.reading.wait(60)
        with bounded(seconds=60):
            assert not server.close()
        stuck.go_on.set()
        assert read.result(60) == 100  # its last piece had been asked for
    with holoray.serve(stuck) as server:
        assert server.close()
        assert server.close()


def test_a_port_that_is_taken(store: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UsageError, match="cannot listen") as caught:
            holoray.serve(store, port=taken.getsockname()[1])
    assert "--port" in caught.value.hint
    for port in (-1, 1 << 16):
        with pytest.raises(UsageError, match="cannot listen"):
            holoray.serve(store, port=port)


def test_options_without_meaning(store: Path, tmp_path: Path) -> None:
    certificate, other = make_certificate(tmp_path, "127.0.0.1"), make_certificate(tmp_path, "other")
    options: tuple[dict[str, Any], ...] = (
        {"readers": 0},
        {"token": "a b"},
        {"tls_cert": certificate.chain},
        {"tls_cert": certificate.chain, "tls_key": "/nonexistent"},
        {"tls_cert": certificate.chain, "tls_key": store / "ROOT"},
        {"tls_cert": certificate.chain, "tls_key": other.key},
    )
    for given in options:
        with pytest.raises(UsageError):
            holoray.serve(store, **given)
