"""Shares: what is written where so that any k of N places suffice, and what each place says of itself.

A place holds `ROOT`, `share.json` (which share it is, and what all of them hold), and a part of each file of the
store: its chunks, a digest of each unit of them, and a trailer. `share.json` has the sha256 of that footer for every
part of every share, so the shares that agree on it pin each other's bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from holoray.errors import FormatError, UsageError
from holoray.integrity import Digests, parse_root
from holoray.stores.base import GROUPS, LEAD_GROUP, MANIFEST, SHARE, fragment_number
from holoray.stores.reed_solomon import MAX_SHARES
from holoray.stores.stripes import Stripes, unit_ranges

SHARE_FORMAT: Final = 1
MAX_SHARE_BYTES: Final = 2 << 20  # some 900 files on 32 shares; JSON takes up to 40 times of it
_MAGIC: Final = b"HOLOPART"
_TRAILER: Final = struct.Struct("<8sHHHHQ")  # magic, format, share, needed, total, bytes of the blob
_DIGEST: Final = struct.Struct("<Q32s")
_FOLDER: Final = re.compile(r"share-(\d{1,3})")


@dataclass(frozen=True)
class Shares:
    """How a store is spread over `total` shares: layer l is there as long as any `needed[l]` of them are.

    Later layers are like the last one named. Of the first layer that needs more shares than layer 0, the fraction
    `lead` of the fragments is kept as safe as layer 0. The manifest and the mandatory tensors go with layer 0.
    """

    total: int
    needed: tuple[int, ...]
    lead: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "needed", tuple(self.needed))
        if not self.needed or not 1 <= self.total <= MAX_SHARES:
            raise UsageError(f"{self.total} shares are not possible", hint=f"choose 1 to {MAX_SHARES}")
        if not all(1 <= k <= self.total for k in self.needed):
            raise UsageError(f"a layer needs 1 to {self.total} of {self.total} shares, not {self.needed}")
        if list(self.needed) != sorted(self.needed):
            raise UsageError(
                f"{self.needed}: a layer cannot need fewer shares than the one before it",
                hint="each layer is of use only with those before it",
            )
        if not 0.0 <= self.lead < 1.0:
            raise UsageError(f"a lead of {self.lead} is no fraction from 0 to below 1")

    @classmethod
    def usable(cls, total: int, usable_from: int, exact_from: int, layers: float = 2.25) -> Shares:
        """Usable from any `usable_from` shares, exact from any `exact_from`.

        `layers` says what usable means: 2.25 are the two coarsest layers and a quarter of the third, the fewest
        quarters of layers of `planes` with which a sentence encoder keeps an embedding cosine of 0.95 and more.
        """
        whole = int(layers) if layers > 0 else 0
        if not whole:
            raise UsageError(f"{layers} layers are no usable model", hint="at least the first layer is needed")
        return cls(total, (usable_from,) * whole + (exact_from,), layers - whole)

    @property
    def lead_layer(self) -> int | None:
        """The layer that is split, if one is."""
        later = [layer for layer, k in enumerate(self.needed) if k > self.needed[0]]
        return later[0] if later and self.lead else None

    def leads(self, position: int) -> bool:
        """Whether the fragment at a position of the split layer is one of those as safe as layer 0: spread evenly."""
        return int((position + 1) * self.lead) > int(position * self.lead)

    def needed_for(self, name: str) -> int:
        """How many shares give a file of the store."""
        group = 0 if name == MANIFEST else fragment_number(name) % GROUPS
        layer = 0 if group == LEAD_GROUP else max(group - 1, 0)
        return self.needed[min(layer, len(self.needed) - 1)]

    def get_config(self) -> dict[str, Any]:
        """As JSON values, kept in the manifest."""
        return {"total": self.total, "needed": list(self.needed), "lead": self.lead}


def is_coded(name: str) -> bool:
    """Whether a file of a store is cut into chunks; the others are on every share."""
    return name == MANIFEST or fragment_number(name) >= 0


def part_file(name: str) -> str:
    """Name of the part of a coded file in each place."""
    return name.removesuffix(".arrow") + ".share"


def whole_file(name: str) -> str:
    """The file of the store that a file in a place is, or is a part of."""
    return name.removesuffix(".share") + ".arrow" if name.endswith(".share") else name


def share_folder(index: int) -> str:
    return f"share-{index}"


def folder_index(name: str) -> int:
    """The number of a folder `share-3`; -1 for any other."""
    match = _FOLDER.fullmatch(name)
    return int(match[1]) if match else -1


class Footer:
    """The digests of a part, gathered while its chunks are written."""

    def __init__(self) -> None:
        self._digests: list[bytes] = []

    def add(self, chunk: bytes) -> None:
        view = memoryview(chunk)
        for start, stop in unit_ranges(len(chunk)):
            digests = Digests.of(view[start:stop])
            self._digests.append(_DIGEST.pack(digests.xxh3_64, digests.sha256))

    def encoded(self, stripes: Stripes, share: int) -> bytes:
        """What follows the chunks."""
        trailer = _TRAILER.pack(_MAGIC, SHARE_FORMAT, share, stripes.needed, stripes.total, stripes.nbytes)
        return b"".join(self._digests) + trailer


def footer_bytes(stripes: Stripes) -> int:
    return stripes.units * _DIGEST.size + _TRAILER.size


def read_trailer(name: str, trailer: bytes) -> tuple[int, Stripes]:
    """Which share a part is of, and the layout of its file, from its last `TRAILER_BYTES`; raises FormatError."""
    try:
        magic, version, share, needed, total, nbytes = _TRAILER.unpack(trailer)
    except struct.error:
        raise FormatError(f"a part of {name} is too short") from None
    if magic != _MAGIC or version != SHARE_FORMAT or not 1 <= needed <= total <= MAX_SHARES or share >= total:
        raise FormatError(f"a part of {name} ends in no trailer of ours")
    return share, Stripes(name, nbytes, needed, total)


TRAILER_BYTES: Final = _TRAILER.size


def digest_of(footer: bytes, unit: int) -> Digests:
    """The digests of a unit of a part, from its footer."""
    return Digests(*_DIGEST.unpack_from(footer, unit * _DIGEST.size))


@dataclass(frozen=True)
class CodedFile:
    """A file of the store: its layout, and the sha256 of the footer of its part on each share."""

    stripes: Stripes
    footers: tuple[bytes, ...]

    @property
    def part_bytes(self) -> int:
        """Length of its part on each share, footer included."""
        return self.stripes.part_bytes + footer_bytes(self.stripes)


@dataclass(frozen=True)
class ShareTable:
    """What all shares of a set agree on."""

    root: str
    total: int
    files: tuple[CodedFile, ...]

    def encoded(self, index: int) -> bytes:
        """`share.json` of a share."""
        files = [
            {
                "name": f.stripes.name,
                "bytes": f.stripes.nbytes,
                "needed": f.stripes.needed,
                "footers": [digest.hex() for digest in f.footers],
            }
            for f in self.files
        ]
        table = {"format": SHARE_FORMAT, "index": index, "root": self.root, "total": self.total, "files": files}
        return json.dumps(table, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def read_share(encoded: bytes) -> tuple[int, ShareTable]:
    """Which share a `share.json` is of, and what it says of all; raises FormatError for what we would not write."""
    try:
        table = json.loads(encoded)
        index, total = int(table["index"]), int(table["total"])
        if table["format"] != SHARE_FORMAT:
            raise FormatError(f"share format {table['format']!r} is not {SHARE_FORMAT}", hint="upgrade holoray")
        files = tuple(_coded_file(row, total) for row in table["files"])
        found = ShareTable(parse_root(table["root"]), total, files)
        if found.encoded(index) != encoded or not 0 <= index < total <= MAX_SHARES or not _plain(files):
            raise ValueError("not as holoray writes it")
    except FormatError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise FormatError(f"{SHARE} is malformed: {type(error).__name__}: {error}") from None
    return index, found


def _coded_file(row: dict[str, Any], total: int) -> CodedFile:
    footers = tuple(bytes.fromhex(text) for text in row["footers"])
    return CodedFile(Stripes(str(row["name"]), int(row["bytes"]), int(row["needed"]), total), footers)


def _plain(files: Sequence[CodedFile]) -> bool:
    """Whether the files are ones that a store has, each once, and described in full."""
    names: set[str] = set()
    for file in files:
        stripes = file.stripes
        sound = is_coded(stripes.name) and 0 <= stripes.nbytes < 1 << 62 and 1 <= stripes.needed <= stripes.total
        if not sound or [len(f) for f in file.footers] != [hashlib.sha256().digest_size] * stripes.total:
            return False
        names.add(stripes.name)
    return MANIFEST in names and len(names) == len(files)
