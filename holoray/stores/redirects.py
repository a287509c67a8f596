"""Where a redirect may lead: on the web, and never to a place that only we can reach."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Final
from urllib.parse import SplitResult, urljoin

from holoray.stores.uri import public, split

STATUSES: Final = (301, 302, 303, 307, 308)
_PORTS: Final = {"http": 80, "https": 443}
_NAT64: Final = IPv6Network("64:ff9b::/96")  # RFC 6052


class Scope(IntEnum):
    """Who can reach an address, from everybody to this very link."""

    PUBLIC = 0
    PRIVATE = 1
    LOOPBACK = 2
    LINK = 3
    """Link-local (where clouds keep their secrets), and what is no host's address."""


@dataclass(frozen=True, slots=True)
class Hop:
    """A URL on the way to an answer; `address` is where to connect, if that must not be asked again."""

    url: str
    address: str | None = None

    @property
    def origin(self) -> tuple[str, str, int]:
        parts = split(self.url)
        return parts.scheme, parts.hostname or "", _port(parts)


@dataclass(frozen=True, slots=True)
class Objection:
    """Why a redirect is not followed."""

    why: str


def follow(hop: Hop, location: str, peer: str) -> Hop | Objection:
    """Where `location`, as the server at the address `peer` answered it to `hop`, leads.

    The host is looked up here, and only here. Another one's addresses must be no closer to us than `peer`: a server on
    the web must not make us ask our own network. What its own name means is not asked again: by now, that may be
    something else.
    """
    try:
        target = Hop(urljoin(hop.url, location))
        scheme, host, port = target.origin
    except ValueError:
        return Objection("it redirects to what is no URI")
    if scheme not in _PORTS or not host:
        return Objection(f"it redirects to {scheme}, which is not the web")
    if (hop.origin[0], scheme) == ("https", "http"):
        return Objection("it redirects from https to http")
    if target.origin == hop.origin:
        return Hop(target.url, hop.address)
    try:
        addresses = _addresses(host, port)
    except (OSError, UnicodeError):
        return Objection("it redirects to a host that is not known")
    here = scope(peer)
    if max(map(scope, addresses)) > here:
        return Objection(f"it redirects from a {here.name.lower()} address to a closer one, {public(target.url)[:200]}")
    return Hop(target.url, addresses[0])


def scope(address: str) -> Scope:
    """Of an IP address in text, as `getaddrinfo` gives it."""
    ip = _within(ip_address(address.partition("%")[0]))
    if ip.is_loopback:
        return Scope.LOOPBACK
    if ip.is_link_local or ip.is_unspecified or ip.is_multicast:
        return Scope.LINK
    return Scope.PUBLIC if ip.is_global else Scope.PRIVATE


def _within(ip: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """The IPv4 address that an IPv6 address stands for (mapped, compatible, NAT64 or 6to4), or the address itself."""
    if isinstance(ip, IPv4Address):
        return ip
    compatible = IPv4Address(int(ip)) if 1 < int(ip) < 1 << 32 else None
    translated = IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None
    return ip.ipv4_mapped or compatible or translated or ip.sixtofour or ip


def _addresses(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


def _port(parts: SplitResult) -> int:
    return parts.port if parts.port is not None else _PORTS.get(parts.scheme, 0)
