"""Opening several places as one store: they must hold the same root."""

from __future__ import annotations

import logging
import os
import re
import threading
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeGuard
from urllib.parse import quote

from holoray.errors import FormatError, HolorayError, IntegrityError, SourceError, UsageError
from holoray.integrity import parse_root
from holoray.pipelines.fault_policy import FaultPolicy
from holoray.pipelines.sealed_store import SealedStore
from holoray.pipelines.source_pool import SourcePool
from holoray.stores import Store, find_shares, open_store
from holoray.stores.base import SHARE
from holoray.stores.root import read_root
from holoray.stores.uri import redacted

_log = logging.getLogger("holoray")
_GRACE_S: Final = 3.0
_VARIABLE: Final = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_KEYS: Final = {"uri", "priority"}


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """A place to read from. Places of a higher `priority` number are only asked while none of a lower one answers."""

    place: Store | str | os.PathLike[str]
    priority: int = 0


Place = Store | str | os.PathLike[str] | SourceSpec


def open_sources(places: Sequence[Place], policy: FaultPolicy | None = None, expect: str | None = None) -> SourcePool:
    """The places as one store.

    The root is `expect`, or else that of the first place that answers: places with another one are left out with a
    warning as long as some agree, and places that do not answer may come back later. Raises SourceError if none
    answers, IntegrityError if none has the expected root or nobody agrees with the first one.
    """
    specs = [place if isinstance(place, SourceSpec) else SourceSpec(place) for place in places]
    specs.sort(key=lambda spec: spec.priority)
    places_named = [open_store(spec.place) for spec in specs]
    if not places_named:
        raise UsageError("there is no store to open", hint="name at least one place")
    _refuse_twins(places_named)
    stores, roots = _roots_of(places_named)
    root = _agreed(stores, roots, expect)
    answers = list(zip(stores, specs, roots, strict=True))
    kept = [(store, spec.priority) for store, spec, found in answers if found == root or _is_absent(found)]
    pool = SourcePool(kept, policy, root=root)
    for store, _, found in answers:
        if _is_absent(found):
            _log.warning("a source does not answer yet: %s", _said(store, found))
            pool.note_absent(store, found)
        elif found != root:
            _log.warning("a source is left out: %s", _said(store, found))
    return pool


def _is_absent(found: str | HolorayError) -> TypeGuard[SourceError]:
    return isinstance(found, SourceError)


def is_in_process(place: Place) -> bool:
    """Whether no other process can see what is there."""
    return open_store(place.place if isinstance(place, SourceSpec) else place).in_process


def open_places(places: Sequence[Place], expect: str | None = None, policy: FaultPolicy | None = None) -> SealedStore:
    """One place as it is, several (or one with a policy) as a pool."""
    if len(places) == 1 and policy is None and not isinstance(places[0], SourceSpec):
        return SealedStore(places[0], expect)
    pool = open_sources(places, policy, expect)
    try:
        return SealedStore(pool, expect)
    except SourceError:
        if len(places) > 1 and pool.exists(SHARE):
            hint = (
                "name one of them, and the others with --share; in Python, holoray.open_shares makes one store of them"
            )
            raise UsageError(f"{pool.uri} are shares of a store, not copies of it", hint=hint) from None
        raise


def _refuse_twins(stores: Sequence[Store]) -> None:
    seen: set[str] = set()
    for store in stores:
        if store.location in seen and not store.in_process:
            raise UsageError(f"{store.uri} is named twice", hint="each source once")
        seen.add(store.location)


def _roots_of(places: Sequence[Store]) -> tuple[list[Store], list[str | HolorayError]]:
    """The store (or set of shares) at each place, and what it says its root is, or why it does not.

    Once one has answered, the others have a few seconds.
    """
    answers: dict[int, tuple[Store, str | Exception]] = {}
    changed = threading.Condition()

    def ask(number: int) -> None:
        answer: tuple[Store, str | Exception]
        try:
            answer = _with_root(places[number])
        except Exception as error:
            answer = places[number], error
        with changed:
            answers[number] = answer
            changed.notify_all()

    for number in range(len(places)):  # in threads that nobody has to wait for
        threading.Thread(target=ask, args=(number,), name="holoray-open", daemon=True).start()
    with changed:
        changed.wait_for(lambda: len(answers) == len(places) or any(isinstance(a, str) for _, a in answers.values()))
        changed.wait_for(lambda: len(answers) == len(places), _GRACE_S)
        late = SourceError(f"no answer within {_GRACE_S:.0f} s")
        found = [answers.get(number, (place, late)) for number, place in enumerate(places)]
    for _, answer in found:
        if not isinstance(answer, str | SourceError | FormatError):
            raise answer
    roots = [answer for _, answer in found if isinstance(answer, str | HolorayError)]
    return [store for store, _ in found], roots


def _with_root(place: Store) -> tuple[Store, str]:
    try:
        return place, read_root(place)
    except SourceError:  # looking for shares first would cost every other place a round trip
        shares = find_shares(place)
        if shares is None:
            raise
        return shares, read_root(shares)


def _agreed(stores: Sequence[Store], roots: Sequence[str | HolorayError], expect: str | None) -> str:
    found = [root for root in roots if isinstance(root, str)]
    lines = "; ".join(_said(store, root) for store, root in zip(stores, roots, strict=True))
    if not found:
        errors = [root for root in roots if isinstance(root, HolorayError)]
        if len(errors) == 1:
            raise errors[0]
        raise SourceError(f"no healthy source: {lines}", hint="are the paths right?", source=stores[0].uri)
    if expect is not None:
        root = parse_root(expect, what="--expect")
        if root not in found:
            hint = "this is another model or another version than you asked for"
            raise IntegrityError(f"no source has the expected root {root}: {lines}", hint=hint, source=stores[0].uri)
        return root
    first = found[0]
    if len(found) > 1 and found.count(first) == 1:
        hint = "say which one is meant with --expect sha256:…, or leave the others out"
        raise IntegrityError(f"the sources hold different stores: {lines}", hint=hint, source=stores[0].uri)
    return first


def _said(store: Store, root: str | HolorayError) -> str:
    return f"{store.uri} {'has root ' + root if isinstance(root, str) else '(' + root.message + ')'}"


# -- sources.toml ----------------------------------------------------------------------------------------------


def read_sources(path: str | os.PathLike[str], environment: Mapping[str, str] | None = None) -> list[SourceSpec]:
    """The sources that a TOML file lists.

        [[source]]
        uri = "https://models.example/one?token=${MODEL_TOKEN}"   # variables of the environment, quoted for a URI
        priority = 1                                              # optional; 0 is asked first

    Paths are relative to the file. Raises SourceError if it cannot be read, FormatError if it is malformed, UsageError
    for a variable that is not set.
    """
    file = Path(path)
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"cannot read {file}: {error.strerror}", hint="is the path right?") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{file} is no TOML: {error}", hint=_EXAMPLE) from None
    listed = tables.pop("source", None)
    if tables:
        raise FormatError(f"{file}: unknown key {next(iter(tables))!r}", hint=_EXAMPLE)
    if not isinstance(listed, list) or not listed:
        raise FormatError(f"{file} lists no sources", hint=_EXAMPLE)
    return [_spec(file, number, table, environment or os.environ) for number, table in enumerate(listed, 1)]


_EXAMPLE: Final = 'it holds tables like: [[source]] uri = "s3://bucket/model" priority = 0'


def _spec(file: Path, number: int, table: Any, environment: Mapping[str, str]) -> SourceSpec:
    where = f"{file}: source {number}"
    if not isinstance(table, dict):
        raise FormatError(f"{where} is no table", hint=_EXAMPLE)
    unknown = table.keys() - _KEYS
    if unknown:
        raise FormatError(f"{where} has an unknown key {min(unknown)!r}", hint="known are uri and priority")
    uri, priority = table.get("uri"), table.get("priority", 0)
    if not isinstance(uri, str) or not uri:
        raise FormatError(f"{where} has no uri", hint=_EXAMPLE)
    if not isinstance(priority, int) or isinstance(priority, bool) or priority < 0:
        raise FormatError(f"{where}: priority must be a number from 0, not {priority!r}", hint="0 is asked first")

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name not in environment:
            hint = f"export {name}, or take it out of the file"
            raise UsageError(f"{where} ({redacted(uri)}) needs the environment variable {name}", hint=hint)
        return quote(environment[name], safe="")

    if "://" in uri:
        return SourceSpec(_VARIABLE.sub(value, uri), priority)
    return SourceSpec(file.parent / uri, priority)
