"""The command as people run it: a process, the openai client, clients that leave, and a drain."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from earlytom.errors import UserError
from runtime.serve.__main__ import parser, settings_of
from runtime.serve.http.server import bind
from runtime.serve.loading import load_pipeline
from tests.processes import HANG_SECONDS as LONG
from tests.warm import WarmPopen

ROOT = Path(__file__).parents[3]
Q, OTHER = "Which digit is on the circle?", "How many shapes appeared?"
HEAD = {"Authorization": "Bearer k1"}


class Process:
    """A server of its own on a free port."""

    def __init__(
        self, engine: Path, folder: Path, *words: str, popen: type[subprocess.Popen[str]] = subprocess.Popen
    ) -> None:
        keys = folder / "keys.txt"
        keys.write_text("k1\n")
        command = [sys.executable, "-m", "runtime.serve", str(engine), "--port", "0", "--api-key-file", str(keys)]
        self.process = popen(
            [*command, "--device", "cpu", *words],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if found := re.match(r"serving earlytom on (http://127\.0\.0\.1:(\d+))/v1\n", line):
                self.url, self.port = found[1], int(found[2])
                return
        raise AssertionError("".join(self.lines))

    def end(self) -> tuple[int, str]:
        """Its status, and what it still said."""
        said, _ = self.process.communicate(timeout=LONG)
        return self.process.returncode, said

    def busy(self) -> float:
        """Requests that run or wait."""
        text = httpx.get(self.url + "/metrics").text
        return sum(float(one) for one in re.findall(r"^\w+:num_requests_\w+\{[^}]*\} (\S+)$", text, re.MULTILINE))


@pytest.fixture(scope="module")
def server(bundled_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    made = Process(bundled_engine, tmp_path_factory.mktemp("server"))
    yield made
    made.process.kill()
    made.process.wait(LONG)


@pytest.fixture(scope="module")
def url(drawn_clip: Path) -> str:
    return "data:video/mp4;base64," + base64.b64encode(drawn_clip.read_bytes()).decode()


@pytest.fixture(scope="module")
def client(server: Process) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="k1", max_retries=0, timeout=LONG)


def messages(url: str, question: str = Q) -> list[Any]:
    video = {"type": "video_url", "video_url": {"url": url}}
    return [{"role": "user", "content": [video, {"type": "text", "text": question}]}]


def until(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + LONG
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_openai_client_is_answered(client: openai.OpenAI, url: str) -> None:
    assert [model.id for model in client.models.list()] == ["earlytom"]
    whole = client.chat.completions.create(model="earlytom", messages=messages(url))
    pieces = client.chat.completions.create(
        model="earlytom", messages=messages(url), stream=True, stream_options={"include_usage": True}
    )
    text, usage = "", None
    for piece in pieces:
        text += "".join(choice.delta.content or "" for choice in piece.choices)
        usage = piece.usage or usage
    assert text == whole.choices[0].message.content
    assert usage is not None
    assert usage.prompt_tokens_details.cached_tokens > 126


def test_the_openai_client_is_refused_as_it_expects(server: Process, client: openai.OpenAI, url: str) -> None:
    for kind, how in ((openai.NotFoundError, {"model": "gpt"}), (openai.BadRequestError, {"n": 3})):
        with pytest.raises(kind) as caught:
            client.chat.completions.create(**{"model": "earlytom", "messages": messages(url), **how})
        assert "message" in caught.value.body  # type: ignore[attr-defined]
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=server.url + "/v1", api_key="no", max_retries=0).models.list()


def test_the_openai_client_uploads(client: openai.OpenAI, drawn_clip: Path) -> None:
    stored = client.files.create(file=drawn_clip, purpose="user_data")
    part: Any = {"type": "file", "file": {"file_id": stored.id}}
    told: Any = [{"role": "user", "content": [part, {"type": "text", "text": Q}]}]
    assert client.chat.completions.create(model="earlytom", messages=told).choices[0].message.content
    assert client.files.delete(stored.id).deleted


def raw(url: str, stream: bool) -> bytes:
    told = {"model": "earlytom", "messages": messages(url, "Tell me something."), "stream": stream}
    body = json.dumps(told | {"temperature": 2.0, "max_tokens": 512}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer k1\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_frees_its_place(server: Process, client: openai.OpenAI, url: str, stream: bool) -> None:
    for number in range(12):  # more than the line has places
        with socket.create_connection(("127.0.0.1", server.port)) as leaving:
            leaving.sendall(raw(url, stream))
            if stream and number % 2:
                assert leaving.recv(100)
    until(lambda: server.busy() == 0)
    assert client.chat.completions.create(model="earlytom", messages=messages(url)).choices[0].message.content


def test_slow_clients_shut_nobody_out(server: Process, client: openai.OpenAI, url: str) -> None:
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
    try:
        for one in slow:
            one.sendall(raw(url, False)[:-10])  # the length lies, or the rest is late
        assert client.chat.completions.create(model="earlytom", messages=messages(url)).choices[0].message.content
    finally:
        for one in slow:
            one.close()
    until(lambda: server.busy() == 0)


def test_a_decoder_that_is_killed_costs_one_request_at_most(
    server: Process, client: openai.OpenAI, drawn_clip: Path, url: str
) -> None:
    def ask(cut: int) -> int:
        other = drawn_clip.read_bytes() + b"\0" * cut  # another video to the server
        told = "data:video/mp4;base64," + base64.b64encode(other).decode()
        body = {"model": "earlytom", "messages": messages(told)}
        return httpx.post(server.url + "/v1/chat/completions", json=body, headers=HEAD, timeout=LONG).status_code

    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    assert children
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    statuses = [ask(cut) for cut in (1, 2, 3)]
    assert set(statuses) <= {200, 400}
    assert statuses[1:] == [200, 200]


def test_a_signal_drains_the_line_and_ends_with_0(bundled_engine: Path, tmp_path: Path, url: str) -> None:
    server = Process(bundled_engine, tmp_path, popen=WarmPopen)
    answers: list[int] = []

    def ask(number: int) -> None:
        told = [{"role": "system", "content": f"Client {number}."}, *messages(url)]
        body = {"model": "earlytom", "messages": told}
        answers.append(
            httpx.post(server.url + "/v1/chat/completions", json=body, headers=HEAD, timeout=LONG).status_code
        )

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    until(lambda: server.busy() > 0 or bool(answers))
    server.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(LONG)
    status, said = server.end()
    assert (status, said) == (0, "stopped: all that was asked is answered\n")
    assert 200 in answers
    assert set(answers) <= {200, 503}


def test_a_port_that_is_taken_is_refused_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="cannot listen on --host"):
        bind("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(UserError, match="is no address of this machine"):
        bind("no.such.host.invalid", 8000)
    with bind("127.0.0.1", 0) as free:
        assert free.getsockname()[1] > 0


@pytest.mark.usefixtures("one_thread")
def test_memory_that_holds_no_video_is_refused_at_the_start(bundled_engine: Path) -> None:
    words = [str(bundled_engine), "--device", "cpu", "--watch-bytes", "1024"]
    with pytest.raises(UserError, match="--watch-bytes 1024 has no room for a video"):
        load_pipeline(settings_of(parser().parse_args(words)))
