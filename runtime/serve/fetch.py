"""Fetches a video from a client's URL, protected against requests into the server's own network (SSRF).

    rules = FetchRules(allow_domains=("videos.example.com", "*.cdn.example"))
    await fetch(url, rules, file)

Nothing is fetched unless domains are allowed. The URL is parsed by one strict grammar and never by another parser.
Every IP address of the host must be public, and the checked addresses are the ones connected to, without a second
look-up; TLS still verifies the host name. Redirects go through all of this again. One deadline holds for everything.

HTTP itself is httpcore2's; nothing is decompressed.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urljoin

import httpcore2

from earlytom.errors import UserError
from earlytom.numbers import real, shown, whole
from runtime.serve.errors import ServeError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]

_LONGEST = 8192  # characters of an address
_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_URL = re.compile(r"(?i)(https?)://([^/?#]*)([^#]*)(?:#.*)?")
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?")
_NAME = re.compile(r"(?=.{1,253}\Z)([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")  # some resolvers take a name with such a last label for an address
# Networks that are not public, from the registries of special-purpose addresses (RFC 6890 and its updates), written out
# because Python's own list differs from version to version. Of IPv6 only 2000::/3 is allocated; addresses that embed an
# IPv4 address (mapped, NAT64, 6to4, Teredo) are refused whatever they embed.
_NOT_PUBLIC = tuple(
    map(
        ipaddress.ip_network,
        (
            *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
            *("168.63.129.16/32",),  # a cloud's own, to its machines
            *("192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24"),
            *("192.168.0.0/16", "192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24"),
            *("224.0.0.0/4", "240.0.0.0/4"),
            *("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3ffe::/16", "3fff::/20"),
        ),
    )
)
_GIVEN_OUT = ipaddress.ip_network("2000::/3")
# Private networks that --allow-private admits: without cloud metadata services and without addresses of no single host.
_PRIVATE = tuple(
    map(
        ipaddress.ip_network,
        ("10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "::1/128", "fc00::/7"),
    )
)
_METADATA = tuple(map(ipaddress.ip_network, ("100.100.100.200/32", "fd00:ec2::/32", "fd20:ce::/32")))
_RESOLVERS = ThreadPoolExecutor(8, thread_name_prefix="resolve")  # own threads, as a name server may hang


class Sink(Protocol):
    """The part of a file's interface that `fetch` needs."""

    def write(self, content: bytes, /) -> object: ...


@dataclass(frozen=True)
class FetchRules:
    """What may be fetched.

    allow_domains: host names, or "*.name" for all below a name (without itself). Empty: nothing is fetched.
    allow_private: also allow addresses of this machine and of private networks, and any port; never link-local ones.
    seconds: for one video, from the look-up to its last byte. max_bytes: of the video. redirects: most to follow.

    Raises:
        UserError: a value that makes no sense, by the name of its flag.
    """

    allow_domains: tuple[str, ...] = ()
    allow_private: bool = False
    seconds: float = 20.0
    max_bytes: int = 256 << 20
    redirects: int = 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "allow_domains", tuple(_domain(entry) for entry in self.allow_domains))
        object.__setattr__(self, "seconds", real("--fetch-seconds", self.seconds, 0, low_open=True))
        object.__setattr__(self, "max_bytes", whole("--max-video", self.max_bytes, 1))
        object.__setattr__(self, "redirects", whole("redirects", self.redirects, 0))

    def allows(self, host: str) -> bool:
        """Whether a host, as `parse` returns it, is in the list."""
        return any(
            host == entry or (entry.startswith("*.") and host.endswith(entry[1:])) for entry in self.allow_domains
        )


@dataclass(frozen=True)
class Target:
    """A parsed URL. host: a name in lower case without a trailing dot, or an IP address without brackets."""

    scheme: str
    host: str
    port: int
    path: str  # with the query

    @property
    def origin(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}" + ("" if self.port == _PORTS[self.scheme] else f":{self.port}")


def parse(url: str) -> Target:
    """Parse a URL.

    Raises:
        ServeError: 400 "video_not_allowed": anything but http(s)://host[:port][/path], in printable ASCII.
    """
    if len(url) > _LONGEST or not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        raise _not_allowed("the video's address has other characters than an address may have, or too many", url)
    match = _URL.fullmatch(url)
    if match is None:
        raise _not_allowed("the video's address is neither http:// nor https://", url)
    if "@" in match[2]:
        raise _not_allowed("the video's address names a user; send the video itself", "")
    authority = _AUTHORITY.fullmatch(match[2])
    if authority is None:
        raise _not_allowed("the video's address has no plain host name; other alphabets are written as xn--", match[2])
    scheme = match[1].lower()
    port = _PORTS[scheme] if authority[2] is None else int(authority[2])
    if not 0 < port < 65536:
        raise _not_allowed("the video's address has an impossible port", match[2])
    path = match[3] if match[3].startswith("/") else "/" + match[3]
    return Target(scheme, _host(authority[1]), port, path)


def is_public(address: Address) -> bool:
    """Whether an IP address is that of a single host on the public internet."""
    if isinstance(address, ipaddress.IPv6Address) and address not in _GIVEN_OUT:
        return False
    return not _within(address, _NOT_PUBLIC)


async def resolve(host: str, port: int) -> list[str]:
    """All IP addresses of a name from the system's resolver. Raises OSError."""
    loop = asyncio.get_running_loop()
    look_up = functools.partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(found[4][0]) for found in await loop.run_in_executor(_RESOLVERS, look_up)))


async def fetch(
    url: str, rules: FetchRules, into: Sink, *, resolve: Resolve = resolve, tls: ssl.SSLContext | None = None
) -> None:
    """Download `url` into a file.

    resolve: returns all IP addresses of a name. tls: the certificates to trust; default: the system's.

    Raises:
        ServeError: 400 "video_not_allowed" where the rules forbid it, 400 "video_fetch_failed" where it does not work.
        OSError: of writing.
    """
    try:
        async with asyncio.timeout(rules.seconds):
            target = parse(url)
            for _ in range(rules.redirects + 1):
                location = await _get(target, rules, into, resolve, tls)
                if location is None:
                    return
                onward = parse(_joined(target, location))
                if (target.scheme, onward.scheme) == ("https", "http"):
                    raise _not_allowed("the video's address redirects from https to http", "")
                target = onward
    except TimeoutError:
        raise _failed(f"the video did not come within {rules.seconds:g} s (--fetch-seconds)") from None
    raise _failed(f"the video's address redirects more than {rules.redirects} times")


async def _get(
    target: Target, rules: FetchRules, into: Sink, resolve: Resolve, tls: ssl.SSLContext | None
) -> str | None:
    """One request: writes the body to the file, or returns the redirect's location."""
    addresses = await _checked(target, rules, resolve)
    url = httpcore2.URL(scheme=target.scheme, host=target.host, port=target.port, target=target.path)
    headers: list[tuple[bytes | str, bytes | str]] = [
        ("Host", target.origin.partition("//")[2]),
        ("Accept", "video/*, */*"),
        ("Accept-Encoding", "identity"),
    ]
    waits = {"timeout": {"connect": rules.seconds / len(addresses)}}  # leaves time for the other addresses
    try:
        async with (
            httpcore2.AsyncConnectionPool(tls or _system_tls(), network_backend=_Dialer(addresses)) as pool,
            pool.stream("GET", url, headers=headers, extensions=waits) as response,
        ):
            received = [(name.lower(), value) for name, value in response.headers]
            locations = [value for name, value in received if name == b"location"]
            if response.status in _REDIRECTS and len(locations) == 1:
                return locations[0].decode("latin-1")
            if response.status != 200:
                raise _failed(f"the video's server answered with status {response.status}")
            _check_headers(dict(received), rules)
            await _save(response, rules, into)
    except httpcore2.NetworkError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ssl.SSLError):
            cause = cause.__cause__ or cause.__context__
        what = "does not prove that it is this server (TLS)" if cause is not None else "cannot be reached, or hung up"
        raise _failed(f"the video's server {shown(target.host)} {what}") from error
    except (httpcore2.ProtocolError, httpcore2.TimeoutException, UnicodeError) as error:
        raise _failed(f"the video's server {shown(target.host)} did not send all of an answer in HTTP/1.1") from error
    return None


async def _save(response: Any, rules: FetchRules, into: Sink) -> None:
    size = 0
    async for part in response.aiter_stream():
        size += len(part)
        if size > rules.max_bytes:
            raise _too_large(rules)
        into.write(part)
    if not size:
        raise _failed("the video's server sent 0 bytes")


def _check_headers(headers: dict[bytes, bytes], rules: FetchRules) -> None:
    if headers.get(b"content-encoding", b"identity").strip().lower() not in (b"", b"identity"):
        raise _failed("the video's server sent it compressed (Content-Encoding), which is not undone")
    length = headers.get(b"content-length", b"")
    if length.isdigit() and (len(length) > 18 or int(length) > rules.max_bytes):
        raise _too_large(rules)


async def _checked(target: Target, rules: FetchRules, resolve: Resolve) -> list[str]:
    """The IP addresses to connect to: the host's, if the host and all of them are allowed."""
    if not rules.allows(target.host):
        what = "that host is not one this server fetches from" if rules.allow_domains else "this server fetches none"
        raise _not_allowed(f"{what} (--allow-domain); send the video itself, as data:video/mp4;base64,...", target.host)
    if target.port not in _PORTS.values() and not rules.allow_private:
        raise _not_allowed(f"port {target.port} is neither 80 nor 443", target.host)
    try:
        literal = _literal(target.host)
        found = [str(literal)] if literal is not None else await resolve(target.host, target.port)
    except (OSError, UnicodeError) as error:
        raise _failed(f"the host {shown(target.host)} is not known") from error
    addresses = [ipaddress.ip_address(address) for address in found]
    if not addresses:
        raise _failed(f"the host {shown(target.host)} has no address")
    for address in addresses:
        private = rules.allow_private and _within(address, _PRIVATE) and not _within(address, _METADATA)
        if not (is_public(address) or private):
            raise _not_allowed("the host has an address that is not public (--allow-private)", target.host)
    return [str(address) for address in addresses]


class _Dialer(httpcore2.AsyncNetworkBackend):
    """Connects to the checked addresses only, whatever host name it is given."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = addresses
        self._backend = httpcore2.AnyIOBackend()

    async def connect_tcp(self, host: str, port: int, *args: Any, **options: Any) -> httpcore2.AsyncNetworkStream:
        for address in self._addresses[:-1]:
            try:
                return await self._backend.connect_tcp(address, port, *args, **options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                continue
        return await self._backend.connect_tcp(self._addresses[-1], port, *args, **options)


@functools.cache
def _system_tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _joined(target: Target, location: str) -> str:
    """The URL of a redirect's location; `parse` refuses it later if it does not fit the strict grammar."""
    if not location.isascii() or not location.isprintable() or len(location) > _LONGEST:
        raise _not_allowed("the video's address redirects to what is no address", "")
    try:
        return urljoin(target.origin + target.path, location)
    except ValueError as error:
        raise _not_allowed("the video's address redirects to what is no address", location) from error


def _host(text: str) -> str:
    """A host in canonical form; raises ServeError if it is none."""
    host = text.lower()
    try:
        if host.startswith("["):
            return str(ipaddress.IPv6Address(host[1:-1]))
        last = host.removesuffix(".").rpartition(".")[2]
        if _NUMBER.fullmatch(last):
            return str(ipaddress.IPv4Address(host))  # only four decimal numbers without leading zeros
    except ValueError as error:
        raise _not_allowed("the video's address has an odd number for a host", text) from error
    host = host.removesuffix(".")
    if not _NAME.fullmatch(host):
        raise _not_allowed("the video's address has no plain host name; other alphabets are written as xn--", text)
    return host


def _literal(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _domain(entry: Any) -> str:
    """An entry of the allowed domains, in canonical form."""
    name = entry.removeprefix("*.") if isinstance(entry, str) else ""
    try:
        authority = _AUTHORITY.fullmatch(f"[{name}]" if ":" in name else name)
        host = _host(authority[1]) if authority is not None and authority[2] is None else ""
    except ServeError:
        host = ""
    if not host or (name != entry and _literal(host) is not None):
        raise UserError(
            f"--allow-domain {shown(entry)} is no domain; give one such as videos.example.com, or *.example.com for "
            "all below it"
        )
    return host if name == entry else f"*.{host}"


def _within(address: Address, networks: Sequence[Any]) -> bool:
    return any(address.version == network.version and address in network for network in networks)


def _not_allowed(what: str, url: str) -> ServeError:
    return ServeError(400, "video_not_allowed", f"{what}: {shown(url)}" if url else what, param="messages")


def _failed(what: str) -> ServeError:
    return ServeError(400, "video_fetch_failed", what, param="messages")


def _too_large(rules: FetchRules) -> ServeError:
    return _failed(f"the video has more than {rules.max_bytes} bytes (--max-video)")
