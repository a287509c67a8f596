"""The demo: a real model becomes exact before your eyes, and a killed worker changes nothing.

Takes the MiniLM-L6 sentence encoder, stores it as bfloat16, warms it up on a local Ray with two workers, embeds
sentences with every generation, and compares the result with the checkpoint bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file

import holoray
import minilm
from holoray.kernels.registry import warm

Weights = Mapping[str, npt.NDArray[Any]]
QUALITIES = (0.9, 0.99, 0.999, 0.9995, 0.9999, 1.0)


def main() -> None:
    """Encode, warm up, prove, kill, prove again."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--store", type=Path, help="keep the store here (default: a temporary directory)")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    # Ray, when it is imported, reads what it shall not print: that a worker died is what we tell ourselves.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed")
    console = Console(width=None if os.isatty(1) else 110, highlight=False)
    with tempfile.TemporaryDirectory(prefix="holoray-demo-") as temporary:
        store = arguments.store or Path(temporary) / "store"
        truth = _truth()
        _compile(console)
        _encode(console, store, truth)
        calm = _warm_up(console, store, truth, arguments.workers, kill=False)
        stormy = _warm_up(console, store, truth, arguments.workers, kill=True)
    same = calm == stormy
    console.print(f"\nThe two results are {'identical' if same else 'DIFFERENT'}: sha256 {calm[:16]}…")
    if not same:
        raise SystemExit(1)


def _truth() -> dict[str, npt.NDArray[Any]]:
    """The checkpoint as the reference library reads it, cast to bfloat16 by ml_dtypes."""
    weights = load_file(minilm.weights_path())
    return {n: w.astype(ml_dtypes.bfloat16) if w.dtype == np.float32 else w for n, w in weights.items()}


def _compile(console: Console) -> None:
    """The kernels are compiled when first used and cached on disk: not part of what is shown."""
    start = time.perf_counter()
    warm()
    if time.perf_counter() - start > 3:
        console.print(f"compiled the kernels, once and for all, in {time.perf_counter() - start:.0f} s")


def _encode(console: Console, store: Path, truth: Weights) -> None:
    console.rule("[bold]encode")
    if not (store / "ROOT").exists():
        report = holoray.encode(minilm.weights_path(), store, dtype="bf16")
        console.print(
            f"{report.tensors} tensors, {report.bytes_in / 1e6:.1f} MB of bf16 weights -> "
            f"{report.bytes_stored / 1e6:.1f} MB ({report.bytes_stored / report.bytes_in:.1%}), {report.seconds:.1f} s"
        )
    console.print(f"root {holoray.open(store).root}")


def _warm_up(console: Console, store: Path, truth: Weights, workers: int, *, kill: bool) -> str:
    """One warm-up with a row a generation; returns the digest of all weights. `kill`: one worker dies on the way."""
    console.rule(f"[bold]warm-up with {workers} workers" + (", one of them killed on the way" if kill else ""))
    reference = minilm.embed(truth)
    bf16_bytes = sum(w.nbytes for w in truth.values())
    table = Table("generation", "read", "of bf16", "seconds", "quality", "SNR", "embedding cosine", box=None)
    notes: list[str] = []

    def on_generation(model: holoray.WarmModel, generation: Any) -> None:
        if kill and generation.generation == 1:
            victim = model.crew()[0]
            os.kill(victim["pid"], signal.SIGKILL)
            notes.append(f"after generation 1, worker {victim['worker']} (pid {victim['pid']}) was killed with SIGKILL")
        cosine = minilm.mean_cosine(minilm.embed(model.state_dict()), reference)
        table.add_row(
            str(generation.generation),
            f"{generation.bytes_read / 1e6:.2f} MB",
            f"{generation.bytes_read / bf16_bytes:.1%}",
            f"{generation.seconds:.2f}",
            f"{generation.quality:.6f}",
            "exact" if np.isinf(generation.snr_db) else f"{generation.snr_db:.1f} dB",
            f"{cosine:.5f}",
        )

    start = time.perf_counter()
    with holoray.warm_up(store, workers=workers, qualities=QUALITIES, on_generation=on_generation) as model:
        model.wait(1.0)
        seconds = time.perf_counter() - start
        digest, equal = _compare(model.state_dict(), truth)
    console.print(table)
    console.print(
        "seconds since the call: the first row is mostly the start of Ray, the others include embedding the sentences"
    )
    for note in notes:
        console.print(note)
    console.print(f"{equal} of {len(truth)} tensors have the SHA-256 of the bf16 checkpoint ({seconds:.1f} s in all)")
    if equal != len(truth):
        raise SystemExit("the weights are not exact")
    return digest


def _compare(weights: Weights, truth: Weights) -> tuple[str, int]:
    """A digest of all weights, and how many tensors equal the truth bit for bit."""
    whole, equal = hashlib.sha256(), 0
    for name, expected in truth.items():
        digest = hashlib.sha256(weights[name].tobytes()).digest()
        whole.update(digest)
        equal += digest == hashlib.sha256(expected.tobytes()).digest()
    return whole.hexdigest(), equal


if __name__ == "__main__":
    main()
