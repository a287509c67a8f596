"""Fragments in the place of others, files of other versions, and digests of other kinds: nothing of it is accepted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import pyarrow as pa
import pytest
from manifest_mutations import read_rows, reseal, write_rows
from small_store import PATTERNS, Blobs, blobs, fragment_files, load, pristine, store_of, weights

import holoray
from holoray.errors import FormatError, HolorayError, IntegrityError, UsageError
from holoray.fragment import Fragment, FragmentEntry
from holoray.integrity import fault
from holoray.manifest import SCHEMA
from holoray.stores import MANIFEST, ROOT, fragment_file


@cache
def other_blobs() -> Blobs:
    """Another model of the same tensors, encoded the same way: a later version, say."""
    store = holoray.MemoryStore()
    model = {name: array[..., ::-1] if array.ndim else array + 1 for name, array in weights().items()}
    holoray.encode(model, store, pattern=PATTERNS, fragments=4, essential=0.02, rank=5, threads=1)
    return dict(store.blobs)


@dataclass(frozen=True)
class Piece:
    """A fragment as it lies in a store."""

    tensor: str
    entry: FragmentEntry
    payload: bytes


def pieces(files: Blobs) -> list[Piece]:
    manifest = holoray.open(store_of(files)).manifest
    return [
        Piece(t.name, f, files[fragment_file(f.file)][f.offset : f.offset + f.stored_bytes])
        for t in manifest.tensors
        for f in t.fragments
    ]


def spliced(files: Blobs, at: Piece, payload: bytes) -> Blobs:
    """The files with another payload in the place of a fragment, cut or padded to its length."""
    name, start = fragment_file(at.entry.file), at.entry.offset
    payload = payload[: at.entry.stored_bytes].ljust(at.entry.stored_bytes, b"\0")
    data = files[name]
    return files | {name: data[:start] + payload + data[start + len(payload) :]}


@pytest.mark.fault("spliced")
@pytest.mark.parametrize("donor", [blobs, other_blobs], ids=["within a model", "between models"])
def test_no_digest_takes_the_payload_of_another_fragment(donor: object) -> None:
    """All pairs; a payload is only taken where it is the same bytes."""
    assert callable(donor)
    hosts, guests = pieces(blobs()), pieces(donor())
    assert len(hosts) > 15
    taken = [
        (host.tensor, host.entry.index, guest.tensor, guest.entry.index)
        for host in hosts
        for guest in guests
        if fault(host.entry, guest.payload, strict=False) is None and guest.payload != host.payload
    ]
    assert taken == []


def splices() -> Iterator[tuple[Piece, bytes]]:
    """Each fragment with the next one of its model and with its own twin of the other model, in its place."""
    hosts, others = pieces(blobs()), pieces(other_blobs())
    for position, host in enumerate(hosts):
        for guest in (hosts[(position + 1) % len(hosts)], others[position]):
            fitted = guest.payload[: host.entry.stored_bytes].ljust(host.entry.stored_bytes, b"\0")
            if fitted != host.payload:
                yield host, fitted


@pytest.mark.fault("spliced")
def test_a_load_names_the_fragment_that_was_replaced() -> None:
    count = 0
    for host, payload in splices():
        with pytest.raises(IntegrityError) as caught:
            load(store_of(spliced(blobs(), host, payload)))
        assert (caught.value.tensor, caught.value.fragment) == (host.tensor, host.entry.index)
        count += 1
    assert count > 25


@pytest.mark.fault("spliced")
def test_a_decoder_takes_its_own_fragments_only() -> None:
    array = weights()["layer.spectral"]
    entry, own = holoray.encode_tensor(array, codec="spectral", fragments=4, name="a")
    _, other = holoray.encode_tensor(array + 1, codec="spectral", fragments=4, name="a")
    for index in range(4):
        for payload in [own[i].payload for i in range(4) if i != index] + [f.payload for f in other]:
            decoder = holoray.TensorDecoder(entry)
            with pytest.raises(IntegrityError):
                decoder.add(Fragment("a", index, payload))
            assert not decoder.can_reconstruct


@pytest.mark.fault("replayed")
def test_parts_of_two_versions_never_mix() -> None:
    """Every choice of files of an old and a new version is one of the two or an error."""
    old, new = blobs(), other_blobs()
    assert old.keys() == new.keys()
    wholes = {tuple(sorted(pristine().items())), tuple(sorted(load(store_of(new)).items()))}
    assert len(wholes) == 2
    names = [name for name in old if old[name] != new[name]]
    assert len(names) >= 4
    whole = 0
    for choice in range(1 << len(names)):
        files = old | {name: new[name] for i, name in enumerate(names) if choice >> i & 1}
        try:
            loaded = load(store_of(files))
        except HolorayError:
            continue
        assert tuple(sorted(loaded.items())) in wholes
        whole += 1
    assert whole == 2


@pytest.mark.fault("replayed")
def test_an_old_version_as_a_whole_is_refused_by_the_expected_root() -> None:
    new = holoray.open(store_of(other_blobs())).root
    assert load(store_of(blobs())) == pristine()  # by itself it is a store like any other
    with pytest.raises(IntegrityError, match="not the expected one"):
        holoray.open(store_of(blobs()), expect=new)


ROOTS = {
    "md5": b"md5:d41d8cd98f00b204e9800998ecf8427e\n",
    "sha1": b"sha1:da39a3ee5e6b4b0d3255bfef95601890afd80709\n",
    "xxh3": b"xxh3_64:2d06800538d394c2\n",
    "none": b"none:\n",
    "no digest": b"sha256:\n",
    "no algorithm": b"%s\n",
    "half a digest": b"sha256:%.32s\n",
    "an empty file": b"",
    "no end of line": b"sha256:%s",
    "another end": b"sha256:%s\0",
    "two lines": b"sha256:%s\nsha256:%s\n",
    "upper case": b"SHA256:%s\n",
    "a space": b"sha256: %s\n",
    "two algorithms": b"md5,sha256:%s\n",
    "sha512": b"sha512:%s%s\n",
    "no ASCII": "sha256:%s\u0661\n".encode(),
    "NUL": b"sha256:%s\0\n",
}


@pytest.mark.fault("downgraded")
@pytest.mark.parametrize("root", ROOTS)
def test_a_root_of_another_kind_is_refused(root: str) -> None:
    true = hashlib.sha256(blobs()[MANIFEST]).hexdigest().encode()
    text = ROOTS[root]
    forged = text % ((true,) * text.count(b"%"))
    with pytest.raises(FormatError, match="ROOT"):
        holoray.open(store_of(blobs() | {ROOT: forged}))


@pytest.mark.fault("downgraded")
@pytest.mark.parametrize("algorithm", ["md5:", "sha1:", "sha512:", "xxh3_64:", "none:", "sha256:sha256:", ":", ""])
def test_nothing_but_sha256_can_be_expected(algorithm: str) -> None:
    for digest in (hashlib.sha256(blobs()[MANIFEST]).hexdigest(), "g" * 64):
        with pytest.raises(UsageError, match="no root"):
            holoray.open(store_of(blobs()), expect=algorithm + digest)
    with pytest.raises(UsageError, match="no root"):
        holoray.open(store_of(blobs()), expect="sha256:" + "g" * 64)


@pytest.mark.fault("downgraded")
@pytest.mark.parametrize("column", ["sha256", "xxh3_64"])
def test_a_manifest_without_digests_is_refused(column: str) -> None:
    """The column gone, and the column empty: there is no fragment that nobody checks."""
    header, rows = read_rows(blobs()[MANIFEST])
    fields = [field for field in SCHEMA.field("fragments").type.value_type if field.name != column]
    item = pa.field("item", pa.struct(fields), nullable=False)
    position = SCHEMA.get_field_index("fragments")
    schema = SCHEMA.set(position, pa.field("fragments", pa.list_(item), nullable=False)).with_metadata(
        {b"holoray": b"{}"}
    )
    bare = [row | {"fragments": [{k: f[k] for k in f if k != column} for f in row["fragments"]]} for row in rows]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist(bare, schema=schema))
    with pytest.raises(FormatError, match="schema"):
        holoray.open(store_of(reseal(blobs() | {MANIFEST: sink.getvalue().to_pybytes()})))
    for row in rows:
        for fragment in row["fragments"]:
            fragment[column] = bytes(32) if column == "sha256" else 0
    store = store_of(reseal(blobs() | {MANIFEST: write_rows(header, rows)}))
    assert all(bad.fragment is not None for bad in holoray.open(store).verify())
    with pytest.raises(IntegrityError):
        holoray.open(store, expect=holoray.open(store).root).load()


@pytest.mark.fault("downgraded")
@pytest.mark.parametrize("version", [0, 2, -1, "1", 1.5, None, [1]])
def test_other_formats_are_refused(version: object) -> None:
    header, rows = read_rows(blobs()[MANIFEST])
    header["format"] = version
    with pytest.raises(FormatError, match="format"):
        holoray.open(store_of(reseal(blobs() | {MANIFEST: write_rows(header, rows)})))


def test_the_two_versions_are_of_one_shape() -> None:
    """Or the splices above would only prove that lengths are compared."""
    same = [a for a, b in zip(pieces(blobs()), pieces(other_blobs()), strict=True) if len(a.payload) == len(b.payload)]
    assert len(same) > 10
    assert len(fragment_files()) > 3
