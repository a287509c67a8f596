"""What approximate weights are worth: MiniLM-L6 in bfloat16, and how near to it embeddings and weights come."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file

import minilm
from holoray.tensor import Array

# Sentences that the demo does not have; none of ours is calibrated on any.
UNSEEN: tuple[str, ...] = (
    "The ferry leaves the harbour at half past six in the morning.",
    "What is the boiling point of ethanol at sea level?",
    "Our landlord refuses to repair the broken heating.",
    "The function returns a list of tuples sorted by their second element.",
    "Bees communicate the direction of food by dancing.",
    "The jury awarded damages to the owner of the patent.",
    "He whispered a joke and the whole class burst out laughing.",
    "The dress is beautiful, but it arrived two sizes too small.",
    "Rising sea levels threaten low islands in the Pacific.",
    "Insert the battery with the positive pole facing up.",
    "The goalkeeper saved a penalty in extra time.",
    "An inflamed appendix usually has to be removed at once.",
    "Where do swallows spend the winter?",
    "The emperor ordered a wall to be built along the northern border.",
    "Gradient descent follows the direction of steepest decrease.",
    "We regret to inform you that your application was not successful.",
    "The bakery on the corner sells the best rye bread in town.",
    "Electric cars lose range when it is very cold.",
    "The poem compares old age with the last light of an evening.",
    "Please restart the router and wait for two minutes.",
    "The comet will be visible to the naked eye next month.",
    "A recession is commonly defined as two quarters of falling output.",
    "My dog is afraid of thunder and hides under the bed.",
    "The bridge was closed because cracks were found in its pillars.",
    "She has been learning Portuguese for three years.",
    "Disk quota exceeded while writing to the temporary directory.",
    "The orchestra tunes to the oboe before every concert.",
    "Wash the wool by hand in lukewarm water.",
    "The senator denied that he had met the lobbyists.",
    "Antibiotics do not help against a common cold.",
    "The hikers lost the trail in thick fog.",
    "No.",
)

_BATCH = 16
SHARES: Final = (0.125, 0.25, 0.26, 0.375, 0.5, 0.51, 0.875, 1.0)
"""Of the bf16 bytes. 26 % and 51 % are where 4-bit and 8-bit integers with their scales fit."""
IN_ORDER, SUBSET, RIVAL = "in order", "random subset", "rival"


@dataclass(frozen=True, slots=True)
class Score:
    """How near approximate weights come to the true ones."""

    relative_error: float
    """||W - West|| / ||W|| over all floating weights."""
    weight_cosine: float
    """The cosine between W and West, taken as two long vectors (0 where West is nothing)."""
    embedding_cosine: float
    """The mean cosine between the embeddings of the same sentence."""


@dataclass(frozen=True, slots=True)
class Point:
    """What one coder makes of so many bytes. `eighths`: of a random subset, else 0."""

    coder: str
    kind: str
    bytes: int
    share: float
    """Of the bf16 bytes."""
    score: Score
    eighths: int = 0


class Yardstick:
    """The true model, and the embeddings of sentences: those of the demo and the unseen ones."""

    def __init__(self, sentences: Sequence[str] = (*minilm.SENTENCES, *UNSEEN)) -> None:
        loaded = load_file(minilm.weights_path())
        self.weights: dict[str, Array] = {
            n: w.astype(ml_dtypes.bfloat16) if w.dtype == np.float32 else w for n, w in loaded.items()
        }
        self.nbytes = sum(w.nbytes for w in self.weights.values())
        self.sentences = sorted(sentences, key=len)
        self._wide = {n: _wide(w) for n, w in self.weights.items() if w.dtype == ml_dtypes.bfloat16}
        self._energy = sum(_dot(w, w) for w in self._wide.values())

    @property
    def matrices(self) -> dict[str, Array]:
        """The weights that are worth coding, float32 (each a bfloat16): matrices of 4,096 elements and more."""
        return {n: w for n, w in self._wide.items() if w.ndim == 2 and w.size >= 4096}

    @cached_property
    def rest_nbytes(self) -> int:
        """Bytes of all other tensors as they are: every coder needs them."""
        return self.nbytes - sum(self.weights[n].nbytes for n in self.matrices)

    @cached_property
    def _reference(self) -> minilm.Array:
        return self._embed(self._wide)

    def _embed(self, weights: dict[str, Array]) -> minilm.Array:
        """In batches of about the same length: padding would take a third of the time."""
        batches = [self.sentences[i : i + _BATCH] for i in range(0, len(self.sentences), _BATCH)]
        return np.concatenate([minilm.embed(weights, batch) for batch in batches])

    def score(self, approximate: dict[str, Array]) -> Score:
        """Compare with weights of any floating dtype; what is left out counts as true (mandatory tensors)."""
        wide = {n: _wide(approximate[n]) if n in approximate else w for n, w in self._wide.items()}
        error = sum(_dot(wide[n] - w, wide[n] - w) for n, w in self._wide.items())
        inner = sum(_dot(wide[n], w) for n, w in self._wide.items())
        norm = math.sqrt(sum(_dot(w, w) for w in wide.values()))
        return Score(
            relative_error=math.sqrt(error / self._energy),
            weight_cosine=inner / (norm * math.sqrt(self._energy)) if norm else 0.0,
            embedding_cosine=minilm.mean_cosine(self._embed(wide), self._reference),
        )


def _wide(array: Array) -> Array:
    """float32, bfloat16 by a shift (its cast is ten times slower)."""
    if array.dtype == ml_dtypes.bfloat16:
        return (array.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return array.astype(np.float32, copy=False)


def _dot(a: Array, b: Array) -> float:
    """The inner product, block by block: a long float32 sum would lose digits."""
    x, y = a.reshape(-1), b.reshape(-1)
    step = 1 << 12  # so short that BLAS does not wake a second thread for it
    return math.fsum(float(np.dot(x[i : i + step], y[i : i + step])) for i in range(0, x.size, step))
