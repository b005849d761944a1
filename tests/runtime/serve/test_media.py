"""Videos as requests name them: data URLs, frame lists, addresses, uploaded files."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.serve import media as module
from runtime.serve.errors import ServeError
from runtime.serve.fetch import FetchRules
from runtime.serve.media import FileStore, Media, PrivateFile, TakenVideo, VideoPart
from tests.processes import HANG_SECONDS
from tests.runtime.serve.test_fetch import HERE, LOOPBACK, OK, Names, origin


def data(content: bytes, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64," + base64.b64encode(content).decode()


def taken(part: VideoPart | str, limit: int = 10_000_000, **more: Any) -> TakenVideo:
    part = VideoPart(url=part) if isinstance(part, str) else part
    rules = FetchRules(allow_domains=(HERE,), allow_private=True, max_bytes=limit)
    return asyncio.run(Media(rules, limit, resolve=Names(LOOPBACK), **more).take(part))


def refused(part: VideoPart | str, **more: Any) -> ServeError:
    with pytest.raises(ServeError) as caught:
        taken(part, **more)
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 300
    return caught.value


def open_files(folder: str) -> list[str]:
    """Files of a folder that this process has open."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:  # the one that lists them
            continue
    return [name for name in found if name.startswith(folder)]


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Temporary files are in a folder of the test's own: those of others come and go."""
    usual, own = tempfile.tempdir, str(tmp_path_factory.mktemp("temporary"))
    tempfile.tempdir = own
    try:
        yield
        assert (open_files(own), os.listdir(own)) == ([], [])
    finally:
        tempfile.tempdir = usual


# Data URLs


@pytest.mark.parametrize(
    "start",
    [
        *(
            "data:video/mp4;base64,",
            "data:video/webm;base64,",
            "DATA:Video/MP4;BASE64,",
            "data:video/x-matroska;base64,",
        ),
        *("data:video/quicktime;base64,", 'data:video/mp4;codecs="avc1";base64,', "data:video/mp4;a=b;c=d;base64,"),
        *("data:video/webm;codecs=vp8,opus;base64,", 'data:video/mp4; codecs="avc1, mp4a"; base64,'),
    ],
)
def test_a_data_url_becomes_a_private_file(start: str) -> None:
    content = os.urandom(1000)
    with taken(start + base64.b64encode(content).decode()) as video:
        assert video.path is not None
        assert video.path.read_bytes() == content
        assert (video.bytes, video.frames) == (1000, None)
        assert video.sha256 == hashlib.sha256(content).hexdigest()
        status = video.path.stat()
        assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o600, os.getuid())
        assert status.st_nlink == 0  # no one else finds it, and a crash leaves nothing


@given(st.binary(min_size=1, max_size=3000), st.sampled_from([4, 64, 1 << 20]))
def test_any_content_comes_back(content: bytes, pieces: int) -> None:
    parts: list[bytes] = []
    url = data(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SLICE", pieces)
        module._decode(url, url.index(",") + 1, len(url), parts.append, 3000, "x")
    assert b"".join(parts) == content


@given(st.text(alphabet=st.sampled_from("AQgw+/=-_ \n%é,"), max_size=40), st.sampled_from([4, 8, 1 << 20]))
def test_what_is_decoded_is_what_python_decodes_strictly(text: str, pieces: int) -> None:
    """However it is cut into pieces."""
    parts: list[bytes] = []
    try:
        wanted = base64.b64decode(text, validate=True) if text else None
        wanted = None if text.startswith("=") or "=" in text.rstrip("=") else wanted
    except ValueError:
        wanted = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SLICE", pieces)
        if wanted is None:
            with pytest.raises(ServeError):
                module._decode(text, 0, len(text), parts.append, 3000, "x")
            return
        module._decode(text, 0, len(text), parts.append, 3000, "x")
    assert b"".join(parts) == wanted


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("data:video/mp4;base64,@@@@", "not base64"),
        ("data:video/mp4;base64,AAA", "not base64"),
        ("data:video/mp4;base64,AAAA\n", "not base64"),
        ("data:video/mp4;base64, AAAA", "not base64"),
        ("data:video/mp4;base64,AA==AAAA", "not base64"),
        ("data:video/mp4;base64,AA%3D%3D", "not base64"),
        ("data:video/mp4;base64,ＡＡＡＡ", "not base64"),
        ("data:video/mp4;base64,====", "not base64"),
        ("data:video/mp4;base64,", "empty"),
        ("data:video/mp4,AAAA", "not base64"),
        ("data:video/mp4;base64", "does not begin"),
        ("data:,AAAA", "does not begin"),
        ("data:;base64,AAAA", "does not begin"),
        ("data:mp4;base64,AAAA", "does not begin"),
        ("data:video/mp4 ;base64,AAAA", "does not begin"),
        ("data:video/mp4;" + "x=y;" * 1000 + "base64,AAAA", "does not begin"),
        ("data:image/png;base64,AAAA", "image/png"),
        ("data:text/html;base64,AAAA", "text/html"),
        ("data:application/octet-stream;base64,AAAA", "application/octet-stream"),
    ],
)
def test_bad_data_urls_say_what_is_wrong(url: str, said: str) -> None:
    error = refused(url)
    assert (error.status, error.code, error.param) == (400, "invalid_video", "messages")
    assert said in error.message


def test_a_video_has_a_limit() -> None:
    taken(data(b"x" * 1000), limit=1000).close()
    for size in (1001, 1003, 5000):
        assert refused(data(b"x" * size), limit=1000).status == 413
        assert refused(data(b"x" * size, "video/jpeg") + ",AAAA", limit=1000).status == 413


def test_other_work_goes_on_while_a_large_one_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The event loop runs while the decoding waits for what only the event loop does."""
    went_on = threading.Event()
    real = PrivateFile.write

    def write(self: PrivateFile, content: bytes) -> None:
        assert went_on.wait(HANG_SECONDS)
        real(self, content)

    monkeypatch.setattr(PrivateFile, "write", write)

    async def both() -> TakenVideo:
        taking = asyncio.create_task(Media(FetchRules()).take(VideoPart(url=data(b"x" * 1000))))
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(0.01, went_on.set)
        return await taking

    asyncio.run(both()).close()


def test_a_full_disk_is_no_fault_of_the_video(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __init__(self, file: Any) -> None:
            self.fileno, self.close = file.fileno, file.close

        def write(self, content: Any) -> int:
            raise OSError(28, "No space left on device")

    real = tempfile.TemporaryFile
    monkeypatch.setattr(module.tempfile, "TemporaryFile", lambda **how: Full(real(**how)))
    error = refused(data(b"x"))
    assert (error.status, error.code, error.retry_after) == (503, "overloaded", 5)


def test_where_open_files_have_no_paths_they_have_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "_OPEN_FILES", tmp_path / "none")
    with taken(data(b"abc")) as video:
        assert video.path is not None
        assert video.path.read_bytes() == b"abc"
        assert stat.S_IMODE(video.path.stat().st_mode) == 0o600
    assert not video.path.exists()


# Frame lists


@pytest.mark.parametrize("kind", ["video/jpeg", "video/png", "Video/JPEG"])
def test_a_frame_list(kind: str) -> None:
    url = data(b"one", kind) + "," + base64.b64encode(b"second").decode()
    with taken(url) as video:
        assert (video.frames, video.bytes, video.path) == ([b"one", b"second"], 9, None)


def test_no_two_lists_have_one_digest() -> None:
    """However the same bytes are cut, and not that of a file of the same bytes."""
    lists = ([b"abc", b"def"], [b"ab", b"cdef"], [b"abc", b"d", b"ef"], [b"abcd", b"ef"])
    digests = {
        taken("data:video/jpeg;base64," + ",".join(base64.b64encode(one).decode() for one in frames)).sha256
        for frames in lists
    }
    with taken(data(b"abcdef")) as file:
        assert len(digests | {file.sha256}) == len(lists) + 1


@pytest.mark.parametrize(
    ("rest", "said"),
    [
        ("", "frame 0 in the data URL is empty"),
        (",", "frame 0 in the data URL is empty"),
        ("AAAA", "1 frame"),
        ("AAAA,", "frame 1 in the data URL is empty"),
        (",AAAA", "frame 0 in the data URL is empty"),
        ("AAAA,,AAAA", "frame 1 in the data URL is empty"),
        ("AAAA,@@@@", "frame 1 in the data URL is not base64"),
        ("AAAA, AAAA", "frame 1 in the data URL is not base64"),
        ("AAAA;AAAA", "frame 0 in the data URL is not base64"),
        ("AAAA," * 5000 + "AAAA", "more than 4096 frames"),
    ],
)
def test_bad_frame_lists_say_which_frame(rest: str, said: str) -> None:
    error = refused("data:video/jpeg;base64," + rest)
    assert (error.status, error.code) == (400, "invalid_video")
    assert said in error.message


# Addresses


def test_an_address_is_fetched() -> None:
    with origin(OK % 5 + b"hello") as (port, _), taken(f"http://{HERE}:{port}/") as video:
        assert video.path is not None
        assert video.path.read_bytes() == b"hello"
        assert (video.bytes, video.sha256) == (5, hashlib.sha256(b"hello").hexdigest())


@pytest.mark.parametrize(
    "url", ["", "/etc/passwd", "file:///etc/passwd", "http://localhost/", "dat:video/mp4;base64,AA"]
)
def test_other_addresses_are_not(url: str) -> None:
    assert refused(url).code == "video_not_allowed"


def test_what_cannot_be_fetched_leaves_no_file() -> None:
    with origin(OK % 50 + b"hello") as (port, _):
        assert refused(f"http://{HERE}:{port}/").code == "video_fetch_failed"


# Uploaded files


class Upload:
    """What a web framework hands over."""

    def __init__(self, *blocks: bytes) -> None:
        self.blocks = list(blocks)

    async def read(self, size: int) -> bytes:
        return self.blocks.pop(0) if self.blocks else b""


def put(store: FileStore, content: bytes, key: str = "") -> str:
    return asyncio.run(store.put(Upload(content).read, name="a.mp4", key=key)).id


@pytest.fixture
def store() -> Iterator[FileStore]:
    with_two = FileStore(2000, 6, owners=2, max_file=900)
    yield with_two
    with_two.close()


def test_a_file_is_uploaded_and_asked_for(store: FileStore) -> None:
    stored = asyncio.run(store.put(Upload(b"moving ", b"pictures").read, name="a\nb.mp4"))
    described = stored.as_dict()
    assert described["id"].startswith("file-")
    assert (described["bytes"], described["filename"], described["object"]) == (15, "a b.mp4", "file")
    with taken(VideoPart(file=stored.id), files=store) as video:
        assert video.path is not None
        assert video.path.read_bytes() == b"moving pictures"
        assert video.sha256 == hashlib.sha256(b"moving pictures").hexdigest()
    with taken(VideoPart(file=stored.id), files=store) as again, taken(VideoPart(file=stored.id), files=store) as third:
        store.delete(stored.id)
        assert again.path is not None
        assert third.path is not None
        assert again.path.read_bytes() == third.path.read_bytes() == b"moving pictures"  # those who ask keep it
    assert refused(VideoPart(file=stored.id), files=store).code == "file_not_found"


def test_a_key_has_its_own_files_only(store: FileStore) -> None:
    mine = put(store, b"abc", "one")
    assert [one.id for one in store.of("one")] == [mine]
    assert not store.of("two")
    for ask in (store.get, store.take, store.delete):
        with pytest.raises(ServeError) as caught:
            ask(mine, "two")
        with pytest.raises(ServeError) as unknown:
            ask("file-none", "two")
        assert (caught.value.status, unknown.value.status) == (404, 404)
        assert caught.value.message.replace(mine, "file-none") == unknown.value.message  # which tells nothing
    store.take(mine, "one").close()


def test_a_full_share_lets_go_of_ones_own_oldest(store: FileStore) -> None:
    other = put(store, b"x" * 900, "two")
    first, second = put(store, b"x" * 400, "one"), put(store, b"y" * 400, "one")
    store.take(first, "one").close()  # the second is now the one not used for the longest
    third = put(store, b"z" * 300, "one")
    assert [one.id for one in store.of("one")] == [third, first]  # the newest first
    for _ in range(5):
        put(store, b"w", "one")
    assert len(store.of("one")) == 3
    assert [one.id for one in store.of("two")] == [other]
    with pytest.raises(ServeError) as caught:
        store.get(second, "one")
    assert caught.value.status == 404


@pytest.mark.parametrize(("content", "status"), [(b"", 400), (b"x" * 901, 413)])
def test_files_that_are_not_taken(store: FileStore, content: bytes, status: int) -> None:
    kept = put(store, b"x" * 900, "one")
    with pytest.raises(ServeError) as caught:
        put(store, content, "one")
    assert caught.value.status == status
    assert [one.id for one in store.of("one")] == [kept]


def test_an_upload_that_breaks_leaves_nothing(store: FileStore) -> None:
    async def breaks(size: int) -> bytes:
        raise ServeError(408, "request_timeout", "late")

    with pytest.raises(ServeError, match="late"):
        asyncio.run(store.put(breaks, name="a"))
    assert not store.of()


def test_without_a_store_there_are_no_files() -> None:
    assert refused(VideoPart(file="file-1")).status == 404


def test_ids_are_not_guessed(store: FileStore) -> None:
    assert len({put(store, b"x") for _ in range(50)}) == 50
    assert refused(VideoPart(file="../../etc/passwd\n" * 50), files=store).status == 404
