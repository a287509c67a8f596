"""FlightStore against servers that lie, stall and never end: a SourceError in time, and little memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import chain, repeat

import grpc
import pyarrow as pa
import pytest
from bounds import bounded
from hostile_flight import (
    Messages,
    bomb,
    flight_data,
    hostile_flight,
    piece,
    schema_message,
    sized,
    total,
)
from hostile_http import Answer, drip, endless, hangs, hostile, resets, says

from holoray.errors import LimitError, SourceError
from holoray.stores import FlightStore, ReadLimits

PATIENT = ReadLimits(answer_s=20)
HASTY = ReadLimits(answer_s=0.15, slowest_bytes_per_s=1e7)
TIME = "no whole answer within"
SENT = "the server sent"
ANY = ": "  # an error of gRPC's or Arrow's, in whatever words

AT, LENGTH, BYTES = 100, 500, 1000
DATA = bytes(range(250)) * 2
KIB = bytes(1024)


def sends(*messages: bytes) -> Messages:
    return lambda ending: messages


def without_end(*messages: bytes) -> Messages:
    """The last message is repeated until the client goes away."""
    return lambda ending: chain(messages, repeat(messages[-1]))


def then_hangs(*messages: bytes) -> Messages:
    def answer(ending: threading.Event) -> Iterator[bytes]:
        yield from messages
        ending.wait()

    return answer


def bombs(schema: bytes) -> Messages:
    return lambda ending: chain([schema], repeat(bomb()))


@pytest.fixture(scope="module", autouse=True)
def _bomb() -> None:
    """Built before the memory of any test is looked at."""
    bomb()
    bomb(DATA)


UINT8 = pa.field("x", pa.uint8(), nullable=False)
WORDS = pa.field("w", pa.dictionary(pa.int32(), pa.string()))

BAD: dict[str, tuple[Messages, str, ReadLimits]] = {
    "hangs before the answer": (then_hangs(), TIME, HASTY),
    "hangs after the schema": (then_hangs(sized(BYTES)), TIME, HASTY),
    "hangs in the middle": (then_hangs(sized(BYTES), piece(DATA[:9])), TIME, HASTY),
    "hangs after the last byte": (then_hangs(sized(BYTES), piece(DATA)), TIME, HASTY),
    "ends without an answer": (sends(), ANY, PATIENT),
    "ends after the schema": (sends(sized(BYTES)), "sent 0 of 500 bytes", PATIENT),
    "ends too early": (sends(sized(BYTES), piece(DATA[:-1])), "sent 499 of 500 bytes", PATIENT),
    "sends a byte too many": (sends(sized(BYTES), piece(DATA + b"x")), "more bytes than", PATIENT),
    "sends a piece too many": (sends(sized(BYTES), piece(DATA), piece(b"x")), "more bytes than", PATIENT),
    "sends pieces without end": (without_end(sized(BYTES), piece(KIB)), "more bytes than", PATIENT),
    "sends empty pieces without end": (without_end(sized(BYTES), piece(b"")), "without bytes", PATIENT),
    "sends single bytes without end": (without_end(sized(1 << 40), piece(b"x")), "more bytes than", PATIENT),
    "sends schemas without end": (without_end(sized(BYTES)), ANY, HASTY),
    "has a column": (sends(sized(BYTES, [UINT8]), piece(DATA)), "not one of bytes", PATIENT),
    "has a bomb for a column": (bombs(sized(BYTES, [UINT8])), "not one of bytes", PATIENT),
    "has a bomb without a column": (bombs(sized(BYTES)), "without bytes", PATIENT),
    "has a column of dictionaries": (sends(sized(BYTES, [WORDS]), piece(DATA)), "not one of bytes", PATIENT),
    "does not say how long it is": (sends(schema_message(pa.schema([])), piece(DATA)), "not one of bytes", PATIENT),
    "is of negative length": (sends(sized(-1), piece(DATA)), "not one of bytes", PATIENT),
    "is of a length beyond numbers": (sends(sized("9" * 5000), piece(DATA)), "not one of bytes", PATIENT),
    "has a name of 8 MiB": (sends(sized(BYTES, [pa.field("x" * (8 << 20), pa.int8())])), "CLIENT|larger|call", PATIENT),
    "sends no protobuf": (sends(b"\xff" * 100), ANY, PATIENT),
    "sends no flatbuffer": (sends(flight_data(b"\xff" * 100)), ANY, PATIENT),
    "sends an empty message": (sends(b""), ANY, PATIENT),
    "sends empty messages without end": (without_end(sized(BYTES), b""), ANY, PATIENT),
    "sends a batch before the schema": (sends(piece(DATA)), ANY, PATIENT),
    "cuts a header": (sends(sized(BYTES)[:-9], piece(DATA)), ANY, PATIENT),
}


@pytest.mark.parametrize(("get", "message", "limits"), BAD.values(), ids=BAD)
def test_a_hostile_server_is_a_source_error(get: Messages, message: str, limits: ReadLimits) -> None:
    out = memoryview(bytearray(LENGTH))
    with hostile_flight(get, sends(total(BYTES)), sends()) as server:
        store = FlightStore(server.uri, limits=limits)
        with bounded(seconds=60):
            with pytest.raises(SourceError, match=message) as caught:
                store.read_into("fragments-00001.arrow", AT, out)
            with pytest.raises((SourceError, LimitError)):
                store.read("ROOT", 4096)
    assert caught.value.hint
    assert caught.value.source == server.uri


def test_messages_are_limited() -> None:
    """All of this is right but for the size of the message, which a client must hold as a whole."""
    out = memoryview(bytearray(8 << 20))
    with (
        hostile_flight(sends(sized(8 << 20), piece(bytes(8 << 20))), sends(), sends()) as server,
        pytest.raises(SourceError),
    ):
        FlightStore(server.uri, limits=PATIENT).read_into("a", 0, out)
    with hostile_flight(sends(sized(8 << 20), *[piece(bytes(2 << 20))] * 4), sends(), sends()) as server:
        assert FlightStore(server.uri, limits=PATIENT).read_into("a", 0, out) == 8 << 20


def test_a_compressed_body_is_never_inflated() -> None:
    """The bytes are right, and the batch that carries them claims a quarter of a gigabyte besides."""
    out = bytearray(LENGTH)
    with hostile_flight(sends(sized(BYTES), bomb(DATA)), sends(), sends()) as server, bounded(seconds=60):
        assert FlightStore(server.uri, limits=PATIENT).read_into("a", AT, memoryview(out)) == LENGTH
    assert out == DATA


def test_messages_compressed_by_grpc_are_never_inflated() -> None:
    """The answer is right, once inflated; but gRPC inflates before it looks at any limit."""
    honest = sends(sized(BYTES), piece(bytes(LENGTH)))
    out = memoryview(bytearray(LENGTH))
    with hostile_flight(honest, sends(), sends(), gzip=True) as server, pytest.raises(SourceError):
        FlightStore(server.uri, limits=PATIENT).read_into("a", AT, out)


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_every_status_is_a_source_error(code: grpc.StatusCode) -> None:
    with hostile_flight(sends(sized(BYTES)), sends(total(5)), sends(b""), code=code) as server:
        store = FlightStore(server.uri, limits=PATIENT)
        for access in (lambda: store.size("a"), lambda: store.read("a", 4096), lambda: list(store.names())):
            with pytest.raises(SourceError) as caught:
                access()
            assert len(str(caught.value)) < 400


SIZES: dict[str, tuple[Messages, str, ReadLimits]] = {
    "hangs": (then_hangs(), TIME, HASTY),
    "is negative": (sends(total(-1)), "negative size", PATIENT),
    "is no protobuf": (sends(b"\xff" * 9), ANY, PATIENT),
    "is 8 MiB of text": (sends(bytes(8 << 20)), ANY, PATIENT),
}


@pytest.mark.parametrize(("info", "message", "limits"), SIZES.values(), ids=SIZES)
def test_sizes(info: Messages, message: str, limits: ReadLimits) -> None:
    with (
        hostile_flight(sends(), info, sends()) as server,
        bounded(seconds=60),
        pytest.raises(SourceError, match=message),
    ):
        FlightStore(server.uri, limits=limits).size("a")


def name(text: bytes) -> bytes:
    return b"\x0a" + bytes([len(text)]) + text  # a Result whose body is the text


def test_names() -> None:
    with hostile_flight(sends(), sends(), sends(name(b"ROOT"), name(b"\xff\x1b[31m"), name(b"../x"))) as server:
        assert list(FlightStore(server.uri, limits=PATIENT).names()) == ["ROOT"]


def test_names_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holoray.stores.flight._MAX_NAMES", 5)
    cases = (
        (without_end(name(b"ROOT")), "more than 5 names", PATIENT),
        (then_hangs(name(b"ROOT")), TIME, HASTY),
    )
    for action, message, limits in cases:
        with hostile_flight(sends(), sends(), action) as server, bounded(seconds=60):
            store = FlightStore(server.uri, limits=limits)
            with pytest.raises(SourceError, match=message):
                store.names()


NO_FLIGHT: dict[str, Answer] = {
    "says nothing": hangs(),
    "ends at once": says(b""),
    "resets": resets(b"\0"),
    "speaks HTTP/1.1": says(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
    "sends garbage without end": endless(b""),
    "drips": drip(b"", b"\0"),
    "sends frames without end": endless(b"", b"\0\0\0\4\0\0\0\0\0" * 1000),
    "sends pings without end": endless(b"\0\0\0\4\0\0\0\0\0", b"\0\0\x08\6\0\0\0\0\0" + bytes(8)),
}


@pytest.mark.parametrize("answer", NO_FLIGHT.values(), ids=NO_FLIGHT)
def test_what_is_no_flight_server(answer: Answer) -> None:
    with hostile(answer) as server:
        store = FlightStore(server.url.replace("http:", "grpc:"), limits=HASTY)
        with bounded(seconds=60), pytest.raises(SourceError) as caught:
            store.read_into("a", AT, memoryview(bytearray(LENGTH)))
    assert caught.value.hint
