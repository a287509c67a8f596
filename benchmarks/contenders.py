"""Who loads a model, each in its natural way: holoray, safetensors, Run:ai Model Streamer, tensorizer, fastsafetensors.

The rivals are optional (`benchmarks/rivals.txt`); each is imported where it is used.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import urllib3

import holoray
from benchmarks.throttled import KEY

SAFETENSORS: Final = "model.safetensors"
TENSORIZER: Final = "model.tensors"
RAW, PLANES = "raw", "planes"


class Watch:
    """Seconds since it was made until the first tensor was there, and until the end; what was read, how good it is."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.first_s: float | None = None
        self.total_s = 0.0
        self.bytes_read: int | None = None
        self.quality = 1.0

    def first(self) -> None:
        if self.first_s is None:
            self.first_s = time.perf_counter() - self._start

    def stop(self) -> None:
        self.total_s = time.perf_counter() - self._start


@dataclass(frozen=True)
class Contender:
    """`load` brings `file` of a model's directory from a path or URI into fresh memory.

    `remote` is the protocol by which it is served best ("http", "s3", or "" if it reads files only); `package` what
    must be installed; `before` makes ready, untimed, what a process does once.
    """

    name: str
    file: str
    remote: str
    load: Callable[[str, Watch], object]
    package: str = "holoray"
    partial: bool = False

    @property
    def installed(self) -> bool:
        return find_spec(self.package) is not None

    def run(self, where: str) -> Watch:
        """One timed load; what it loaded is released after the watch was stopped."""
        watch = Watch()
        loaded = self.load(where, watch)
        watch.stop()
        del loaded
        return watch


def _holoray(where: str, watch: Watch, **target: Any) -> object:
    sealed = holoray.open(where)
    missing = Counter({t.name: len(t.fragments) for t in sealed.manifest.tensors if t.fragments})

    def on_fragment(tensor: str, index: int, quality: float) -> None:
        missing[tensor] -= 1
        if not missing[tensor]:
            watch.first()

    loader = sealed.loader()
    quality = loader.load(holoray.Target(**target), on_fragment)
    watch.bytes_read, watch.quality = loader.bytes_read, quality.ratio
    return loader.state_dict()


def _safetensors(framework: str, where: str, watch: Watch) -> object:
    """Map and clone; over a network: download (one stream, as `hf` and `curl` do), then map and clone."""
    from safetensors import safe_open

    loaded: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="holoray-bench-") as directory:
        path = where
        if where.startswith("http"):
            path = f"{directory}/{SAFETENSORS}"
            _download(where, path)
        with safe_open(path, framework) as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                loaded[name] = tensor.clone() if framework == "pt" else tensor  # numpy's is a copy already
                watch.first()
    return loaded


def _download(url: str, path: str) -> None:
    with open(path, "wb") as file, urllib3.request("GET", url, preload_content=False) as response:
        for chunk in response.stream(1 << 20):
            file.write(chunk)


def _runai(where: str, watch: Watch) -> object:
    from runai_model_streamer import SafetensorsStreamer

    loaded = {}
    with SafetensorsStreamer() as streamer:
        streamer.stream_file(where)
        for name, tensor in streamer.get_tensors():
            loaded[name] = tensor  # ours: `owned` is the default
            watch.first()
    return loaded


def _tensorizer(where: str, watch: Watch) -> object:
    """The eager load, which hands out nothing before it has everything."""
    from tensorizer import TensorDeserializer

    with TensorDeserializer(where, device="cpu") as tensors:
        loaded = dict(tensors.items())
        watch.first()
        return loaded


def _fastsafetensors(where: str, watch: Watch) -> object:
    from fastsafetensors import SafeTensorsFileLoader

    loader = SafeTensorsFileLoader(None, "cpu", nogds=True)
    loader.add_filenames({0: [where]})
    tensors = loader.copy_files_to_device()
    loaded = {}
    for name in loader.get_keys():
        loaded[name] = tensors.get_tensor(name).clone()  # its buffers end with the loader
        watch.first()
    tensors.close()
    loader.close()
    return loaded


CONTENDERS: Final = (
    Contender("safetensors, torch: map and clone", SAFETENSORS, "http", partial(_safetensors, "pt"), "torch"),
    Contender("safetensors, numpy: map and copy", SAFETENSORS, "http", partial(_safetensors, "np"), "safetensors"),
    Contender("Run:ai Model Streamer", SAFETENSORS, "s3", _runai, "runai_model_streamer"),
    Contender("tensorizer", TENSORIZER, "http", _tensorizer, "tensorizer"),
    Contender("fastsafetensors", SAFETENSORS, "", _fastsafetensors, "fastsafetensors"),
    Contender("holoray raw", RAW, "http", _holoray),
    Contender("holoray planes", PLANES, "http", _holoray),
    Contender("holoray planes, over S3", PLANES, "s3", _holoray),
    Contender("holoray planes to two layers", PLANES, "http", partial(_holoray, fragments=(0, 1)), partial=True),
    Contender("holoray planes to quality .999", PLANES, "http", partial(_holoray, quality=0.999), partial=True),
    Contender("holoray planes to four layers", PLANES, "http", partial(_holoray, fragments=(0, 1, 2, 3)), partial=True),
)


def prepare(directory: Path, model: dict[str, Any]) -> None:
    """One model in every contender's format."""
    from holoray.checkpoint import save_checkpoint

    directory.mkdir(parents=True)
    save_checkpoint(directory / SAFETENSORS, model)
    for codec in (RAW, PLANES):
        holoray.encode(directory / SAFETENSORS, directory / codec, codec=codec)
    if find_spec("tensorizer") is not None:
        from safetensors.torch import load_file
        from tensorizer import TensorSerializer

        serializer = TensorSerializer(str(directory / TENSORIZER))
        serializer.write_state_dict(load_file(directory / SAFETENSORS))
        serializer.close()


def point_s3_at(host: str) -> None:
    """Run:ai's streamer, and boto, take endpoint and credentials from the environment."""
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}",
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": KEY,
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
        "RUNAI_STREAMER_LOG_LEVEL": "ERROR",
    }
