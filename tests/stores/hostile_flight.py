"""A Flight server that sends whatever bytes a test gives it: gRPC below, and nothing of Arrow's server."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
import numpy as np
import pyarrow as pa

Messages = Callable[[threading.Event], Iterable[bytes]]
"""What a call answers; gets an event that is set when the test is over."""

_SERVICE = "arrow.flight.protocol.FlightService"


def _field(number: int, data: bytes) -> bytes:
    """A length-delimited field of a protobuf message."""
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes([value])


def flight_data(header: bytes = b"", metadata: bytes = b"", body: bytes = b"") -> bytes:
    """A FlightData message; empty fields are left out."""
    parts = [_field(n, data) for n, data in ((2, header), (3, metadata), (1000, body)) if data]
    return b"".join(parts)


def schema_message(schema: pa.Schema) -> bytes:
    return flight_data(pa.ipc.read_message(schema.serialize()).metadata.to_pybytes())


def sized(size: object, columns: Iterable[pa.Field] = ()) -> bytes:
    return schema_message(pa.schema(list(columns), metadata={"size": str(size)}))


def piece(data: bytes) -> bytes:
    """A batch without columns, and bytes beside it."""
    return flight_data(_EMPTY.metadata.to_pybytes(), data)


_EMPTY = pa.ipc.read_message(pa.RecordBatch.from_arrays([], schema=pa.schema([])).serialize())
BOMB_BYTES = 256 << 20


@functools.cache
def bomb(metadata: bytes = b"") -> bytes:
    """A batch of a column that is a few kilobytes now and a quarter of a gigabyte when it is read."""
    batch = pa.record_batch({"x": np.zeros(BOMB_BYTES, np.uint8)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_batch(batch)
    _, message = pa.ipc.MessageReader.open_stream(sink.getvalue())
    return flight_data(message.metadata.to_pybytes(), metadata, message.body.to_pybytes())


def total(nbytes: int) -> bytes:
    """A FlightInfo that says how long a blob is."""
    return _field(2, b"\x08\x01") + _varint(5 << 3) + _varint(nbytes % (1 << 64))


@dataclass
class HostileFlight:
    port: int
    ending: threading.Event
    headers: list[dict[str, str]] = field(default_factory=list)

    @property
    def uri(self) -> str:
        return f"grpc://127.0.0.1:{self.port}"


@contextmanager
def hostile_flight(
    get: Messages, info: Messages, action: Messages, *, gzip: bool = False, code: grpc.StatusCode | None = None
) -> Iterator[HostileFlight]:
    """`gzip`: every message is compressed by gRPC. `code`: each call ends so, after its messages, with a long text."""
    ending = threading.Event()
    pool = ThreadPoolExecutor(8)
    options = [("grpc.max_send_message_length", -1), ("grpc.so_reuseport", 0)]
    server = grpc.server(pool, options=options, compression=grpc.Compression.Gzip if gzip else None)
    running = HostileFlight(server.add_insecure_port("127.0.0.1:0"), ending)

    def stream(messages: Messages) -> grpc.RpcMethodHandler:
        def call(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
            running.headers.append({key: str(value) for key, value in context.invocation_metadata()})
            for message in messages(ending):
                if not context.is_active():
                    return
                yield message
            if code is not None:
                context.abort(code, "\x1b[31m" + "x" * 5000)

        return grpc.unary_stream_rpc_method_handler(call)

    def one(request: bytes, context: grpc.ServicerContext) -> bytes:
        messages = list(info(ending))
        if code is not None:
            context.abort(code, "\x1b[31m" + "x" * 5000)
        return messages[0]

    methods = {
        "DoGet": stream(get),
        "DoAction": stream(action),
        "GetFlightInfo": grpc.unary_unary_rpc_method_handler(one),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, methods),))
    server.start()
    try:
        yield running
    finally:
        ending.set()
        server.stop(0).wait()
        pool.shutdown()
