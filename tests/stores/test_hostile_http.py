"""HttpStore against servers that lie, stall and never end: a SourceError in time, and little memory."""

from __future__ import annotations

import gzip
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from bounds import bounded
from certificates import make_certificate
from hostile_http import (
    BYTES,
    Answer,
    drip,
    endless,
    hangs,
    head,
    hostile,
    part,
    redirects,
    resets,
    says,
)
from serving import served

from holoray.errors import FormatError, SourceError, UsageError
from holoray.pipelines.sealed_store import SealedStore
from holoray.stores import HttpStore, ReadLimits
from holoray.stores import redirects as rules
from holoray.stores.redirects import Hop, Objection, Scope, follow, scope

PATIENT = ReadLimits(connect_s=20, stall_s=20, answer_s=20)
HASTY = ReadLimits(connect_s=20, stall_s=20, answer_s=0.15, slowest_bytes_per_s=1e6)
STALLED = ReadLimits(connect_s=20, stall_s=0.15, answer_s=20)
TIME = "in time"
BROKE = "connection broke"
SENT = "the server sent"

AT, LENGTH = 100, 500
GOOD = part(AT, LENGTH)
BOMB = gzip.compress(bytes(200 << 20), 1)
COMPRESSED = f"Content-Range: bytes {AT}-{AT + LENGTH - 1}/{BYTES}"

BAD: dict[str, tuple[Answer, str, ReadLimits]] = {
    "hangs before the answer": (hangs(), TIME, HASTY),
    "hangs before the answer, without a byte for too long": (hangs(), TIME, STALLED),
    "hangs in the head": (hangs(GOOD[:20]), TIME, HASTY),
    "hangs in the body": (hangs(GOOD + bytes(10)), TIME, HASTY),
    "drips the status line": (drip(b"", b"HTTP/1.1 "), TIME, HASTY),
    "drips headers": (drip(b"HTTP/1.1 206 Partial Content\r\n", b"X-More: 1234567890123"), TIME, HASTY),
    "drips the body": (drip(GOOD, b"x"), TIME, HASTY),
    "says 100 Continue without end": (endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100), TIME, HASTY),
    "ends without an answer": (says(b""), BROKE, PATIENT),
    "ends in the body": (says(GOOD + bytes(10)), BROKE, PATIENT),
    "resets in the head": (resets(GOOD[:30]), BROKE, PATIENT),
    "resets in the body": (resets(GOOD + bytes(10)), BROKE, PATIENT),
    "has a status line of garbage": (says(b"\0\1\2 garbage \xff\r\n\r\n"), BROKE, PATIENT),
    "has a status that is no number": (says(b"HTTP/1.1 abc OK\r\n\r\n"), BROKE, PATIENT),
    "has a status line without end": (endless(b"HTTP/1.1 200 ", b"x" * 65536), BROKE, PATIENT),
    "has a million headers": (endless(b"HTTP/1.1 206 OK\r\n", b"X-A: b\r\n" * 1000), BROKE, PATIENT),
    "has a header without end": (endless(b"HTTP/1.1 206 OK\r\nX-A: ", b"x" * 65536), BROKE, PATIENT),
    "speaks HTTP 0.9": (endless(b"<html>"), BROKE, PATIENT),
    "sends a body without end": (endless(part(AT, 1 << 40, total=1 << 41)), SENT, PATIENT),
    "sends chunks without end": (
        endless(head(COMPRESSED, "Transfer-Encoding: chunked"), b"10000\r\n" + bytes(65536) + b"\r\n"),
        SENT,
        PATIENT,
    ),
    "sends chunks with a length besides": (
        endless(part(AT, LENGTH, "Transfer-Encoding: chunked"), b"10000\r\n" + bytes(65536) + b"\r\n"),
        SENT,
        PATIENT,
    ),
    "sends chunks of absurd size": (
        says(head(COMPRESSED, "Transfer-Encoding: chunked") + b"f" * 5000 + b"\r\n"),
        SENT,
        PATIENT,
    ),
    "sends another range": (says(part(0, LENGTH) + bytes(LENGTH)), SENT, PATIENT),
    "sends a longer range": (says(part(AT, LENGTH + 1) + bytes(LENGTH + 1)), SENT, PATIENT),
    "sends a shorter range": (says(part(AT, LENGTH - 1) + bytes(LENGTH - 1)), SENT, PATIENT),
    "sends an empty range": (says(part(AT, 0)), SENT, PATIENT),
    "sends many ranges": (
        says(head("Content-Type: multipart/byteranges; boundary=x", "Content-Length: 5") + b"--x--"),
        SENT,
        PATIENT,
    ),
    "has a length beside the range": (says(head(COMPRESSED, "Content-Length: 10") + bytes(10)), SENT, PATIENT),
    "has a negative length": (says(head(COMPRESSED, "Content-Length: -1") + bytes(LENGTH)), SENT, PATIENT),
    "has a length of 5,000 digits": (says(head(COMPRESSED, "Content-Length: " + "9" * 5000)), SENT, PATIENT),
    "has two lengths": (
        says(head(COMPRESSED, "Content-Length: 500", "Content-Length: 9") + bytes(500)),
        "InvalidHeader",
        PATIENT,
    ),
    "has a total before the end": (says(part(AT, LENGTH, total=AT + 1) + bytes(LENGTH)), SENT, PATIENT),
    "sends the whole": (endless(head(f"Content-Length: {1 << 40}", status="200 OK")), "ignores byte ranges", PATIENT),
    "compresses": (
        says(head(COMPRESSED, f"Content-Length: {LENGTH}", "Content-Encoding: gzip") + BOMB[:LENGTH]),
        "compresses it",
        PATIENT,
    ),
    "has an error page that is a bomb": (
        says(head("Content-Encoding: gzip", f"Content-Length: {len(BOMB)}", status="500 No") + BOMB),
        "HTTP status 500",
        PATIENT,
    ),
    "has an error page without end": (endless(head(status="404 Not Found")), "not found", PATIENT),
    "has an error page in endless chunks": (
        endless(head("Transfer-Encoding: chunked", status="500 No"), b"10000\r\n" + bytes(65536) + b"\r\n"),
        "HTTP status 500",
        PATIENT,
    ),
    "has an error page that drips": (drip(head("Content-Length: 10000", status="403 No"), b"x"), "refuses|time", HASTY),
    "is not modified": (says(head(status="304 Not Modified")), "HTTP status 304", PATIENT),
    "has no content": (says(head(status="204 No Content")), "HTTP status 204", PATIENT),
    "redirects to itself": (redirects("/again"), "more than 3 times", PATIENT),
    "redirects with a page without end": (
        endless(head("Location: /again", status="302 Moved")),
        "more than 3 times",
        PATIENT,
    ),
    "redirects to a file": (redirects("file:///etc/passwd"), "file, which is not the web", PATIENT),
    "redirects to another protocol": (redirects("ftp://127.0.0.1/a"), "ftp, which is not the web", PATIENT),
    "redirects to data": (redirects("data:,x"), "data, which", PATIENT),
    "redirects to what is no URI": (redirects("http://[::1"), "no URI", PATIENT),
    "redirects to a host that is not known": (redirects("http://nowhere.invalid/"), "not known", PATIENT),
    "redirects to the metadata of a cloud": (redirects("http://169.254.169.254/latest"), "loopback address", PATIENT),
    "redirects to the same, mapped": (redirects("http://[::ffff:169.254.169.254]/latest"), "closer one", PATIENT),
    "redirects to any address of this host": (redirects("http://0.0.0.0/a"), "closer one", PATIENT),
}


@pytest.mark.parametrize(("answer", "message", "limits"), BAD.values(), ids=BAD)
@pytest.mark.fault("hostile-server")
def test_a_hostile_server_is_a_source_error(answer: Answer, message: str, limits: ReadLimits) -> None:
    out = memoryview(bytearray(LENGTH))
    with hostile(answer) as server:
        store = HttpStore(f"http://us:secret@{server.host_and_port}?token=t0ken", limits=limits)
        with bounded(seconds=60):
            with pytest.raises(SourceError, match=message) as caught:
                store.read_into("fragments-00001.arrow", AT, out)
            accesses: tuple[Callable[[], object], ...] = (
                lambda: store.read("ROOT", 4096),
                lambda: store.size("ROOT"),
                lambda: store.exists("ROOT"),
                lambda: SealedStore(store),
            )
            for access in accesses[: 2 if limits is not PATIENT else None]:
                with suppress(SourceError, FormatError):  # a HEAD may well be answered
                    access()
    text = f"{caught.value} {caught.value.hint} {caught.value.source}"
    assert caught.value.hint
    assert "secret" not in text
    assert "t0ken" not in text


def test_a_blob_of_no_known_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """`bytes 0-4/*` says that there are five bytes, and not whether there are more."""
    monkeypatch.setattr("holoray.stores.read_only._FIRST_BYTES", 4)
    answer = head("Content-Range: bytes 0-4/*", "Content-Length: 5") + b"abcde"
    with hostile(says(answer)) as server, pytest.raises(SourceError, match="how long"):
        HttpStore(server.url, limits=PATIENT).read("ROOT", 10)


def test_what_came_before_it_broke_off_is_counted() -> None:
    """So that somebody can go on from there."""
    answer = part(0, 1 << 20, total=1 << 20) + bytes(700_000)
    with hostile(says(answer)) as server, pytest.raises(SourceError, match=BROKE) as caught:
        HttpStore(server.url, limits=PATIENT).read_into("a", 0, memoryview(bytearray(1 << 20)))
    assert 2 << 18 <= caught.value.received <= 700_000


# -- redirects -------------------------------------------------------------------------------------------


@pytest.mark.fault("bad-redirect")
def test_credentials_follow_no_redirect_to_another_host(tmp_path: Path) -> None:
    (tmp_path / "ROOT").write_bytes(b"0123456789")
    with served(tmp_path) as there, hostile(redirects(f"{there.url}/ROOT")) as server:
        store = HttpStore(f"http://us:secret@{server.host_and_port}?token=t0ken", limits=PATIENT)
        assert store.read("ROOT", 10) == b"0123456789"
        assert b"authorization: Basic" in server.requests[0]
        assert b"token=t0ken" in server.requests[0]
    with hostile(says(b"")) as there_too, hostile(redirects(f"{there_too.url}/ROOT")) as server:
        store = HttpStore(f"http://us:secret@{server.host_and_port}?token=t0ken", limits=PATIENT)
        with pytest.raises(SourceError):
            store.read("ROOT", 10)
        assert there_too.requests
        for request in there_too.requests:
            assert b"uthorization" not in request
            assert b"t0ken" not in request
            assert f"Host: {there_too.host_and_port}\r\n".encode() in request


def test_credentials_stay_on_the_same_host(tmp_path: Path) -> None:
    with hostile(redirects("/moved")) as server:
        with pytest.raises(SourceError, match="more than 3 times"):
            HttpStore(f"http://us:secret@{server.host_and_port}", limits=PATIENT).size("ROOT")
        assert len(server.requests) == 4
        assert all(b"authorization: Basic" in request for request in server.requests)


@pytest.mark.parametrize(("status", "hops", "works"), [(301, 3, True), (307, 3, True), (308, 4, False)])
@pytest.mark.fault("bad-redirect")
def test_three_redirects_and_no_more(status: int, hops: int, works: bool) -> None:
    def answer(connection: socket.socket, request: bytes) -> None:
        step = int(request.split()[1].rpartition(b"/")[2].replace(b"ROOT", b"0"))
        then = part(0, 4, total=4) + b"abcd" if step == hops else b""
        connection.sendall(then or head(f"Location: /{step + 1}", "Content-Length: 0", status=f"{status} Moved"))

    with hostile(answer) as server:
        store = HttpStore(server.url, limits=PATIENT)
        if works:
            assert store.read("ROOT", 10) == b"abcd"
        else:
            with pytest.raises(SourceError, match="more than 3 times"):
                store.read("ROOT", 10)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("8.8.8.8", Scope.PUBLIC),
        ("2600::1", Scope.PUBLIC),
        ("10.0.0.1", Scope.PRIVATE),
        ("100.64.0.1", Scope.PRIVATE),
        ("fd00::1", Scope.PRIVATE),
        ("127.8.0.1", Scope.LOOPBACK),
        ("::1", Scope.LOOPBACK),
        ("::ffff:127.0.0.1", Scope.LOOPBACK),
        ("::127.0.0.1", Scope.LOOPBACK),
        ("64:ff9b::7f00:1", Scope.LOOPBACK),
        ("64:ff9b::a9fe:a9fe", Scope.LINK),
        ("64:ff9b::808:808", Scope.PUBLIC),
        ("2002:7f00:1::", Scope.LOOPBACK),
        ("2002:a00:1::5", Scope.PRIVATE),
        ("::", Scope.LINK),
        ("169.254.169.254", Scope.LINK),
        ("fe80::1%eth0", Scope.LINK),
        ("0.0.0.0", Scope.LINK),
        ("224.0.0.1", Scope.LINK),
    ],
)
def test_who_can_reach_an_address(address: str, expected: Scope) -> None:
    assert scope(address) is expected


@pytest.mark.parametrize("here", ["8.8.8.8", "10.0.0.1", "127.0.0.1", "169.254.1.1"])
@pytest.mark.parametrize("there", ["9.9.9.9", "10.0.0.2", "127.0.0.2", "169.254.1.2"])
@pytest.mark.fault("bad-redirect")
def test_a_redirect_never_leads_closer(here: str, there: str) -> None:
    found = follow(Hop(f"http://{here}/a"), f"http://{there}/b", here)
    if scope(there) > scope(here):
        assert isinstance(found, Objection)
    else:
        assert found == Hop(f"http://{there}/b", there)


def test_one_close_address_among_others_is_too_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name with several addresses: connecting might take any of them."""
    known = {"web.example": ["8.8.8.8"], "mixed.example": ["9.9.9.9", "10.0.0.1"]}
    monkeypatch.setattr(rules, "_addresses", lambda host, port: known[host])
    for url, to in (
        ("http://web.example/a", "http://mixed.example/b"),
        ("https://web.example/a", "http://web.example/"),
    ):
        assert isinstance(follow(Hop(url), to, "8.8.8.8"), Objection)
    found = follow(Hop("http://web.example/a"), "https://web.example/b", "8.8.8.8")
    assert found == Hop("https://web.example/b", "8.8.8.8")


@pytest.mark.fault("bad-redirect")
@pytest.mark.parametrize("later", [["169.254.169.254"], []], ids=["closer", "unknown"])
def test_the_host_that_answers_is_the_one_that_counts(monkeypatch: pytest.MonkeyPatch, later: list[str]) -> None:
    """Its name may mean another address, or nothing, when it is looked up once more."""
    looked_up: list[str] = []

    def addresses(host: str, port: int) -> list[str]:
        looked_up.append(host)
        if host != "169.254.169.254" and not later:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return later or [host]

    monkeypatch.setattr(rules, "_addresses", addresses)
    closer = pytest.raises(SourceError, match="from a loopback address to a closer one")
    with hostile(redirects("http://169.254.169.254/latest")) as server, closer:
        HttpStore(server.url, limits=PATIENT).read("ROOT", 10)
    assert looked_up == ["169.254.169.254"]


def test_the_address_that_was_checked_is_the_one_connected_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is looked up again may be another address by then; the certificate is still that of the name."""
    certificate = make_certificate(tmp_path, "store.example")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.chain))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate.chain, certificate.key)
    monkeypatch.setattr(rules, "_addresses", lambda host, port: ["127.0.0.1"])
    with hostile(says(part(0, 4, total=4) + b"abcd"), context=context) as there:
        name = f"store.example:{there.server_address[1]}"
        with hostile(redirects(f"https://{name}/ROOT")) as server:
            assert HttpStore(server.url, limits=PATIENT).read("ROOT", 10) == b"abcd"
        assert f"Host: {name}\r\n".encode() in there.requests[0]
        impostor = redirects(f"https://other.example:{there.server_address[1]}/ROOT")
        with hostile(impostor) as server, pytest.raises(SourceError, match="SSLError"):
            HttpStore(server.url, limits=PATIENT).read("ROOT", 10)


# -- TLS -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "trusted", "works"),
    [(("127.0.0.1",), True, True), (("127.0.0.1",), False, False), (("other.example",), True, False)],
)
@pytest.mark.fault("hostile-server")
def test_certificates(
    names: tuple[str], trusted: bool, works: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = make_certificate(tmp_path, *names)
    other = make_certificate(tmp_path, "unrelated.example")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.chain if trusted else other.chain))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate.chain, certificate.key)
    with hostile(says(part(0, 4, total=4) + b"abcd"), context=context) as server:
        store = HttpStore(server.url, limits=PATIENT)
        if works:
            assert store.read("ROOT", 10) == b"abcd"
        else:
            with pytest.raises(SourceError, match="SSLError"):
                store.read("ROOT", 10)


def test_a_server_without_tls_behind_https() -> None:
    with hostile(hangs(b"HTTP/1.1 200 OK\r\n\r\n")) as server, bounded(seconds=60), pytest.raises(SourceError):
        HttpStore(server.url.replace("http:", "https:"), limits=ReadLimits(connect_s=0.3)).size("ROOT")


def test_a_tls_handshake_that_hangs() -> None:
    def silent(connection: socket.socket, request: bytes) -> None:
        connection.recv(1)

    with hostile(silent) as server, bounded(seconds=60), pytest.raises(SourceError, match=TIME):
        HttpStore(server.url.replace("http:", "https:"), limits=ReadLimits(connect_s=0.3)).size("ROOT")


@pytest.mark.parametrize(
    "limits", [{"answer_s": 0}, {"stall_s": -1}, {"redirects": -1}, {"slowest_bytes_per_s": float("nan")}]
)
def test_limits_without_meaning(limits: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ReadLimits(**limits)
