"""As much of CuPy 14 as a `CudaDevice` calls when it shares memory or fails, without a driver."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np


class CUDARuntimeError(RuntimeError):
    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


class OutOfMemoryError(MemoryError):
    pass


class CompileException(Exception):  # noqa: N818 - CuPy's own name; it is no RuntimeError
    pass


class CupyStandIn:
    """`said` lists calls in order; the next one named in `fails` raises."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.fails: dict[str, Exception] = {}
        self.uint8 = np.uint8
        self.current = self._stream("null")
        self.cuda = SimpleNamespace(
            Device=lambda number: _Device(),
            Stream=lambda non_blocking: self._stream("borrowed"),
            Memory=lambda size: self._say("malloc", size),
            MemoryPointer=lambda memory, offset: SimpleNamespace(
                ptr=512, memset_async=lambda value, size, stream: self._say("memset", size)
            ),
            get_current_stream=lambda: self.current,
            memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
            compiler=SimpleNamespace(CompileException=CompileException),
            runtime=SimpleNamespace(CUDARuntimeError=CUDARuntimeError, getDeviceCount=lambda: 1),
        )

    def _stream(self, name: str) -> Any:
        @contextmanager
        def entered() -> Iterator[None]:
            yield

        stream = entered()
        stream.synchronize = lambda: self._say("synchronize", name)  # type: ignore[attr-defined]
        return stream

    def _say(self, what: str, of: object) -> None:
        self.said.append(f"{what} {of}")
        if what in self.fails:
            raise self.fails[what]

    def get_default_memory_pool(self) -> Any:
        return SimpleNamespace(free_all_blocks=lambda: self._say("give back", "pool"), free_bytes=lambda: 0)

    def ndarray(self, shape: tuple[int, ...], dtype: Any, memory: Any) -> Any:
        return SimpleNamespace(shape=shape, data=memory)

    def RawModule(self, **options: Any) -> Any:  # noqa: N802 - CuPy's own name
        return SimpleNamespace(get_function=self._function)

    def _function(self, name: str) -> Any:
        self._say("compile", name)
        return lambda *launch, **options: self._say("launch", name)


class _Device:
    attributes = {"MultiProcessorCount": 1}  # noqa: RUF012
    id = 0

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass
