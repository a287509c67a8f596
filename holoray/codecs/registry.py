"""Codecs by name: a dict and two functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from holoray.codecs.base import Codec
from holoray.errors import FormatError

_codecs: dict[str, type[Codec]] = {}


def register_codec(codec: type[Codec]) -> type[Codec]:
    """Make a codec known under its `name` (usable as a class decorator)."""
    _codecs[codec.name] = codec
    return codec


def get_codec(name: str, config: Mapping[str, Any]) -> Codec:
    """The codec of that name with that configuration; raises FormatError where either makes no sense."""
    if name not in _codecs:
        raise FormatError(f"unknown codec {name!r}", hint=f"this version knows {', '.join(sorted(_codecs))}")
    return _codecs[name].from_config(config)
