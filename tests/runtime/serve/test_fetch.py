"""Fetching: which addresses, and what a server on the other side may try."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import io
import ipaddress
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpcore2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from earlytom.errors import UserError
from runtime.serve.errors import ServeError
from runtime.serve.fetch import FetchRules, Target, fetch, is_public, parse

HERE = "videos.example"
VIDEO = b"moving pictures" * 1000
OK = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"


class Names:
    """A resolver: each look-up takes the next answer, the last one for ever."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers = [list(answer) for answer in answers]
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        return self.answers[min(len(self.asked), len(self.answers)) - 1]


LOOPBACK = ["127.0.0.1"]


@contextlib.contextmanager
def origin(*answers: bytes | Callable[[socket.socket], object], tls: ssl.SSLContext | None = None) -> Iterator[Any]:
    """A server that answers each connection with the next of the answers, the last one for ever; (port, requests)."""
    listening = socket.create_server(("127.0.0.1", 0))
    requests: list[bytes] = []

    def serve() -> None:
        while True:
            try:
                client, _ = listening.accept()
            except OSError:
                return
            answer = answers[min(len(requests), len(answers) - 1)]
            with contextlib.suppress(OSError), client:
                if tls is not None:
                    client = tls.wrap_socket(client, server_side=True)
                requests.append(client.recv(1 << 16))
                if callable(answer):
                    answer(client)
                else:
                    client.sendall(answer)
                client.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield listening.getsockname()[1], requests
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()


def fetched(url: str, resolve: Any = None, tls: ssl.SSLContext | None = None, **rules: Any) -> bytes:
    given = {"allow_domains": (HERE,), "allow_private": True, "seconds": 60.0, "max_bytes": 100_000, **rules}
    into = io.BytesIO()
    asyncio.run(fetch(url, FetchRules(**given), into, resolve=resolve or Names(LOOPBACK), tls=tls))
    return into.getvalue()


def refused(url: str, *args: Any, **rules: Any) -> tuple[str, str]:
    with pytest.raises(ServeError) as caught:
        fetched(url, *args, **rules)
    assert caught.value.status == 400
    return caught.value.code, caught.value.message


# Which addresses


def test_a_plain_video_is_fetched() -> None:
    with origin(OK % len(VIDEO) + VIDEO) as (port, requests):
        assert fetched(f"http://{HERE}:{port}/a/b.mp4?x=1#t=3") == VIDEO
    head = requests[0].decode().split("\r\n")
    assert head[0] == "GET /a/b.mp4?x=1 HTTP/1.1"
    assert f"Host: {HERE}:{port}" in head
    assert "Accept-Encoding: identity" in head


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("http://a.example/x", Target("http", "a.example", 80, "/x")),
        ("HTTPS://A.Example.", Target("https", "a.example", 443, "/")),
        ("https://a.example:8443?q=1", Target("https", "a.example", 8443, "/?q=1")),
        ("http://8.8.8.8/x#y", Target("http", "8.8.8.8", 80, "/x")),
        ("http://[2600::1]:81/x", Target("http", "2600::1", 81, "/x")),
        ("http://xn--mnchen-3ya.example/", Target("http", "xn--mnchen-3ya.example", 80, "/")),
    ],
)
def test_addresses_as_they_should_be(url: str, target: Target) -> None:
    assert parse(url) == target


ODD = [
    *("", "/etc/passwd", "file:///etc/passwd", "ftp://a.example/x", "gopher://a.example/", "concat:/a|/b", "http:a"),
    *("http:/a.example/", "http:///a", "http://", "https://:80/", "http://?x", "http://#a", "//a.example/x"),
    *("http://a:b@a.example/", "http://@a.example/", "http://a.example@127.0.0.1/", "http://a.example%40b/"),
    *("http://a.example:0/", "http://a.example:99999/", "http://a.example:8O/", "http://a.example:/", "http://a:1:2/"),
    *("http://0x7f.1/", "http://0x7f000001/", "http://2130706433/", "http://0177.0.0.1/", "http://127.1/"),
    *("http://127.0.0.1./", "http://127.0.0.01/", "http://127.0.0.0x1/", "http://0/", "http://1.2.3.4.5/"),
    *("http://[::1%25eth0]/", "http://[::1/", "http://::1/", "http://[127.0.0.1]/", "http://[::1]x/"),
    *("http://[::ffff:127.0.0.1:80]/", "http://[v1.x]/", "http://[]/"),
    *("http://%31%32%37.0.0.1/", "http://a%2eexample/", "http://a.example%00.b/", "http://a..example/", "http://./"),
    *("http://.a.example/", "http://a.example../", "http://-a.example/", "http://a-.example/", "http://a,b/"),
    *(
        "http://münchen.example/",
        "http://①②⑦.⓪.⓪.①/",
        "http://１２７.0.0.1/",
        "http://127。0。0。1/",
        "http://ｌocalhost/",
    ),
    *("http://a.example\\@127.0.0.1/", "http:\\\\a.example/", "http://a.example /", " http://a.example/"),
    *(
        "http://a.example/\r\nX: y",
        "http://a.example/\n",
        "ht\ttp://a.example/",
        "http://a.example/\x00",
        "http://\u200ba/",
    ),
    *("http://" + "a" * 64 + ".example/", "http://" + "a." * 127 + "example/", "http://a.example/" + "x" * 9000),
    *("data:video/mp4;base64,AAAA", "javascript:1", "blob:http://a/", "jar:http://a!/", "http+unix://a/"),
]


@pytest.mark.parametrize("url", ODD, ids=[ascii(url)[:40] for url in ODD])
def test_odd_addresses_are_refused(url: str) -> None:
    with pytest.raises(ServeError) as caught:
        parse(url)
    assert (caught.value.status, caught.value.code) == (400, "video_not_allowed")
    assert len(caught.value.message) < 300


@given(st.text() | st.from_regex(r"https?://[a-z0-9.:\[\]@%\\/?#-]*", fullmatch=True))
def test_any_text_is_a_target_or_a_refusal(url: str) -> None:
    try:
        target = parse(url)
    except ServeError:
        return
    assert parse(target.origin + target.path) == target  # one form, which reads as itself
    assert not set(target.host) & set("@%[]/\\? ")


@given(st.integers(0, 2**32 - 1))
def test_every_spelling_of_an_address_but_one_is_refused(number: int) -> None:
    plain = str(ipaddress.IPv4Address(number))
    a, b, c, d = plain.split(".")
    assert parse(f"http://{plain}/").host == plain
    for spelt in (f"{number}", f"{number:#x}", f"0{a}.{b}.{c}.{d}", f"{a}.{b}.{int(c) * 256 + int(d)}", f"{plain}."):
        if spelt != plain:
            with pytest.raises(ServeError):
                parse(f"http://{spelt}/")


PUBLIC = ("8.8.8.8", "1.1.1.1", "100.128.0.1", "172.15.0.1", "172.32.0.1", "169.253.1.1", "223.255.255.254", "2600::1")
NOT_PUBLIC = (
    *("127.0.0.1", "127.9.9.9", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1"),
    *("169.254.169.254", "100.64.0.1", "100.127.255.255", "100.100.100.200", "192.0.0.1", "192.0.0.192", "192.0.2.1"),
    *("198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255"),
    *("168.63.129.16", "192.88.99.1", "::", "::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "::8.8.8.8"),
    *("64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::1", "2002:7f00:1::", "2002:808:808::1", "2001::1"),
    *("2001:0:7f00:1::", "2001:db8::1", "2001:10::1", "2001:2::1", "3fff::1", "5f00::1", "100::1", "fe80::1"),
    *("fe80::1%eth0", "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1", "ff0e::1", "4000::1", "::ffff:0:7f00:1"),
)


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_no_name_may_have_an_address_that_is_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))
    for addresses in ([address], ["8.8.8.8", address], [address, "2600::1"]):
        code, message = refused(f"http://{HERE}/x", Names(addresses), allow_private=False)
        assert (code, "--allow-private" in message) == ("video_not_allowed", True)
        assert address not in message  # who asks is not told how the network inside is numbered


@given(st.ip_addresses(v=4))
def test_whatever_python_takes_for_special_is_not_public(address: ipaddress.IPv4Address) -> None:
    if is_public(address):
        assert address.is_global
        assert not address.is_multicast
        assert not address.is_reserved
    mapped = ipaddress.IPv6Address(b"\0" * 10 + b"\xff\xff" + address.packed)
    assert not is_public(mapped)


@given(st.ip_addresses(v=6))
def test_of_ipv6_only_what_is_given_out_is_public(address: ipaddress.IPv6Address) -> None:
    if is_public(address):
        assert address.is_global
        assert address.packed[0] >> 5 == 1
        assert address.ipv4_mapped is address.sixtofour is address.teredo is None


@pytest.mark.parametrize(
    "address",
    [
        "169.254.169.254",
        "fe80::1",
        "100.100.100.200",
        "fd00:ec2::254",
        "0.0.0.0",
        "224.0.0.1",
        "::ffff:127.0.0.1",
        "::",
    ],
)
def test_private_networks_do_not_include_metadata_and_multicast(address: str) -> None:
    assert refused(f"http://{HERE}/x", Names([address]), allow_private=True)[0] == "video_not_allowed"


# Which names


@pytest.mark.parametrize(
    ("domains", "host", "allowed"),
    [
        (("a.example",), "a.example", True),
        (("A.Example.",), "a.example", True),
        (("a.example",), "b.a.example", False),
        (("a.example",), "xa.example", False),
        (("*.a.example",), "b.a.example", True),
        (("*.a.example",), "c.b.a.example", True),
        (("*.a.example",), "a.example", False),
        (("*.a.example",), "xa.example", False),
        (("*.a.example",), "a.example.evil", False),
        (("8.8.8.8",), "8.8.8.8", True),
        (("2600:0::1",), "2600::1", True),
        ((), "a.example", False),
    ],
)
def test_domains(domains: tuple[str, ...], host: str, allowed: bool) -> None:
    assert FetchRules(allow_domains=domains).allows(host) is allowed


def test_without_domains_nothing_is_looked_up() -> None:
    names = Names(LOOPBACK)
    code, message = refused(f"http://{HERE}/x", names, allow_domains=())
    assert (code, "fetches none" in message, names.asked) == ("video_not_allowed", True, [])
    assert refused("http://127.0.0.1/x", names, allow_domains=())[0] == "video_not_allowed"


@pytest.mark.parametrize("entry", ["", "*", "*.", "http://a.example", "a.example/x", "a.example:80", "*a.example"])
@pytest.mark.parametrize("more", ["", " "])
def test_what_is_no_domain_is_refused_at_the_start(entry: str, more: str) -> None:
    with pytest.raises(UserError, match="--allow-domain"):
        FetchRules(allow_domains=(entry + more,))


@pytest.mark.parametrize(
    "entry", ["*.127.0.0.1", "127.1", "a.*.example", None, "münchen.example", "*.*.example", "[::1]x"]
)
def test_nor_is_any_of_these(entry: Any) -> None:
    with pytest.raises(UserError, match="--allow-domain"):
        FetchRules(allow_domains=(entry,))


@pytest.mark.parametrize("rule", [{"seconds": 0}, {"max_bytes": 0}, {"redirects": -1}, {"seconds": float("nan")}])
def test_rules_are_numbers(rule: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        FetchRules(**rule)


@pytest.mark.parametrize("port", [22, 8080, 6379, 1])
def test_other_ports_are_for_private_networks(port: int) -> None:
    names = Names(["8.8.8.8"])
    code, message = refused(f"http://{HERE}:{port}/x", names, allow_private=False)
    assert (code, str(port) in message, names.asked) == ("video_not_allowed", True, [])


# Which address is dialled


@pytest.fixture
def dialled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Whom a connection was wanted to; nothing is connected."""
    wanted: list[tuple[str, int]] = []

    async def connect_tcp(self: Any, host: str, port: int, *args: Any, **options: Any) -> Any:
        wanted.append((host, port))
        raise httpcore2.ConnectError

    monkeypatch.setattr(httpcore2.AnyIOBackend, "connect_tcp", connect_tcp)
    return wanted


def test_the_address_that_was_checked_is_dialled(dialled: list[tuple[str, int]]) -> None:
    """The name has a public address when it is checked and a private one ever after."""
    names = Names(["8.8.8.8", "2600::1"], LOOPBACK)
    assert refused(f"http://{HERE}/x", names, allow_private=False)[0] == "video_fetch_failed"
    assert dialled == [("8.8.8.8", 80), ("2600::1", 80)]
    assert names.asked == [HERE]


def test_nothing_is_looked_up_while_dialling(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up: list[Any] = []
    with origin(OK % 1 + b"x") as (port, _):
        real = socket.getaddrinfo
        monkeypatch.setattr(
            socket, "getaddrinfo", lambda *args, **more: looked_up.append(args[0]) or real(*args, **more)
        )
        assert fetched(f"http://{HERE}:{port}/") == b"x"
    assert HERE not in looked_up


def test_an_address_that_is_down_leaves_time_for_another() -> None:
    with origin(OK % 1 + b"x") as (port, _):
        assert fetched(f"http://{HERE}:{port}/", Names(["127.0.0.2", "127.0.0.1"])) == b"x"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Contexts of a server whose certificate is for `HERE`, and of a client that trusts it."""
    if shutil.which("openssl") is None:
        pytest.skip("makes a certificate with the openssl command, which is not installed")
    folder: Path = tmp_path_factory.mktemp("tls")
    words = f"req -x509 -newkey rsa:2048 -nodes -days 2 -keyout key -out cert -subj /CN={HERE} -addext".split()
    subprocess.run(["openssl", *words, f"subjectAltName=DNS:{HERE}"], cwd=folder, check=True, capture_output=True)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "cert", folder / "key")
    return server, ssl.create_default_context(cafile=str(folder / "cert"))


def test_tls_proves_the_name(certificates: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    server, client = certificates
    with origin(OK % 1 + b"x", tls=server) as (port, _):
        assert fetched(f"https://{HERE}:{port}/", tls=client) == b"x"
        code, message = refused(f"https://other.example:{port}/", tls=client, allow_domains=("other.example",))
        assert (code, "TLS" in message) == ("video_fetch_failed", True)
        assert refused(f"https://{HERE}:{port}/")[0] == "video_fetch_failed"  # the system knows no such certificate


# Redirects


def redirect(to: str, status: int = 302) -> bytes:
    return f"HTTP/1.1 {status} Found\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n".encode()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(status: int) -> None:
    with origin(redirect("/other?a=b", status), redirect("x"), OK % 1 + b"x") as (port, requests):
        assert fetched(f"http://{HERE}:{port}/a/b") == b"x"
    assert [line.split()[1] for line in requests] == [b"/a/b", b"/other?a=b", b"/x"]


def test_three_redirects_and_no_more() -> None:
    hops = [redirect("/again")] * 3
    with origin(*hops, OK % 1 + b"x") as (port, _):
        assert fetched(f"http://{HERE}:{port}/") == b"x"
    with origin(redirect("/again")) as (port, requests):
        assert "redirects more than 3" in refused(f"http://{HERE}:{port}/")[1]
    assert len(requests) == 4


@pytest.mark.parametrize(
    "to",
    [
        *("http://127.0.0.1/", "http://169.254.169.254/latest/meta-data/", "http://[::1]/", "//127.0.0.1/"),
        *("http://other.example/", "file:///etc/passwd", "ftp://videos.example/", "http://a:b@videos.example/"),
        *(
            "http://videos.example\\@127.0.0.1/",
            "http://2130706433/",
            "gopher://x",
            "http://videos.example:x/",
            "http://[",
        ),
    ],
)
def test_each_hop_is_checked(to: str) -> None:
    with origin(redirect(to)) as (port, requests):
        assert refused(f"http://{HERE}:{port}/")[0] == "video_not_allowed"
    assert len(requests) == 1


def test_a_hop_may_have_lost_its_public_address(
    dialled: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name of the second hop is looked up anew, and is private now."""
    from runtime.serve import fetch as module

    names = Names(["8.8.8.8"], LOOPBACK)

    async def first_hop(target: Any, rules: Any, resolve: Any, *_: Any) -> str | None:
        await module._checked(target, rules, resolve)
        return "/again"

    monkeypatch.setattr(module, "_get", lambda target, rules, into, resolve, tls: first_hop(target, rules, resolve))
    assert refused(f"http://{HERE}/x", names, allow_private=False)[0] == "video_not_allowed"
    assert (names.asked, dialled) == ([HERE, HERE], [])


def test_https_does_not_become_http(certificates: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    server, client = certificates
    with origin(redirect(f"http://{HERE}/"), tls=server) as (port, _):
        assert refused(f"https://{HERE}:{port}/", tls=client)[0] == "video_not_allowed"


# What a server may try


def endless(client: socket.socket) -> None:
    client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        client.sendall(b"x" * 10_000)


def endless_headers(client: socket.socket) -> None:
    client.sendall(b"HTTP/1.1 200 OK\r\n")
    while True:
        client.sendall(b"X: y\r\n" * 1000)


def endless_informing(client: socket.socket) -> None:
    while True:
        client.sendall(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 10)
        threading.Event().wait(0.01)


def endless_chunks(client: socket.socket) -> None:
    client.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        client.sendall(b"2710\r\n" + b"x" * 10_000 + b"\r\n")


def dribbling(client: socket.socket) -> None:
    client.sendall(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        client.sendall(b"y")
        threading.Event().wait(0.05)


def dribbling_body(client: socket.socket) -> None:
    client.sendall(OK % 1000)
    while True:
        client.sendall(b"x")
        threading.Event().wait(0.05)


def silent(client: socket.socket) -> None:
    client.settimeout(60)
    client.recv(1)


@pytest.mark.parametrize("answer", [endless, endless_chunks, OK % 100_001, OK % 10**17, OK % 200_000 + b"x" * 200_000])
def test_more_bytes_than_allowed(answer: Any) -> None:
    with origin(answer) as (port, _):
        code, message = refused(f"http://{HERE}:{port}/")
    assert (code, "100000 bytes" in message) == ("video_fetch_failed", True)


@pytest.mark.parametrize("answer", [dribbling, dribbling_body, silent, endless_informing])
def test_one_deadline_over_everything(answer: Any) -> None:
    with origin(answer) as (port, _):
        code, message = refused(f"http://{HERE}:{port}/", seconds=0.5)
    assert (code, "--fetch-seconds" in message) == ("video_fetch_failed", True)


def test_the_deadline_holds_for_names_too() -> None:
    async def never(host: str, port: int) -> list[str]:
        await asyncio.sleep(600)
        return LOOPBACK

    assert "--fetch-seconds" in refused(f"http://{HERE}/", never, seconds=0.2)[1]


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"hello\r\n\r\n",
        OK % 100 + b"x" * 50,  # less than it says
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n" + gzip.compress(VIDEO),
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nX" + b"x" * 300_000,
        endless_headers,
        OK % 0,
        OK % 10**30,
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno",
        b"HTTP/1.1 206 Partial Content\r\nContent-Length: 2\r\n\r\nno",
        b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: /a\r\nLocation: /b\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\nxxxx",
        redirect("/\xe4"),
    ],
)
def test_answers_that_are_none(answer: Any) -> None:
    with origin(answer) as (port, _):
        code, message = refused(f"http://{HERE}:{port}/")
    assert code in ("video_fetch_failed", "video_not_allowed")
    assert "\n" not in message


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate, gzip", "GZIP"])
def test_nothing_is_unpacked(encoding: str) -> None:
    packed = gzip.compress(b"\0" * 10_000_000)
    answer = OK.replace(b"\r\n\r\n", f"\r\nContent-Encoding: {encoding}\r\n\r\n".encode()) % len(packed) + packed
    with origin(answer) as (port, _):
        assert "compressed" in refused(f"http://{HERE}:{port}/")[1]


def test_what_comes_after_the_length_is_left() -> None:
    with origin(OK % 5 + b"hello, and more") as (port, _):
        assert fetched(f"http://{HERE}:{port}/") == b"hello"


def test_nobody_there() -> None:
    with origin(b"") as (port, _):
        pass
    assert refused(f"http://{HERE}:{port}/")[0] == "video_fetch_failed"


def test_a_name_that_is_not_known() -> None:
    async def unknown(host: str, port: int) -> list[str]:
        raise socket.gaierror(-2, "Name or service not known")

    assert refused(f"http://{HERE}/", unknown)[0] == "video_fetch_failed"
    assert refused(f"http://{HERE}/", Names([]))[0] == "video_fetch_failed"


def test_the_systems_own_names() -> None:
    """Negative control of the whole: with the real resolver the loopback's name is refused as not public."""
    from runtime.serve.fetch import resolve

    code, message = refused("http://localhost/", resolve, allow_domains=("localhost",), allow_private=False)
    assert (code, "not public" in message) == ("video_not_allowed", True)
