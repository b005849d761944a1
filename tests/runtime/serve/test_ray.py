"""Replicas behind one address, by Ray Serve: the server as people run it, and replicas that die.

`make ray-check` runs this where Ray is; elsewhere it is skipped. What a front does with a replica that dies, refuses or
is late is tested without Ray in `test_replicas`.
"""

from __future__ import annotations

import base64
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.processes import HANG_SECONDS as LONG
from tests.runtime.serve.test_server import HEAD, ROOT, Process, messages

ray = pytest.importorskip("ray", reason="needs Ray Serve: make ray-check")
pytestmark = pytest.mark.ray

CHAT = "/v1/chat/completions"
QUESTIONS = ("Which digit is on the circle?", "How many shapes appeared?")


def replicas() -> list[int]:
    """Processes of replicas that this test's servers have."""
    found = subprocess.run(
        ["pgrep", "-f", "ServeReplica:default:Answerer"], capture_output=True, text=True, check=False
    )
    return [int(one) for one in found.stdout.split()]


@pytest.fixture(scope="module")
def urls(drawn_clip: Path) -> list[str]:
    """Four videos, to the server: one and the same with different ends."""
    content = drawn_clip.read_bytes()
    return ["data:video/mp4;base64," + base64.b64encode(content + b"\0" * n).decode() for n in range(4)]


@pytest.fixture(scope="module")
def server(bundled_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    made = Process(bundled_engine, tmp_path_factory.mktemp("ray"), "--ray", "--replicas", "2", "--waiting", "4")
    yield made
    made.process.send_signal(signal.SIGTERM)
    made.process.wait(LONG)


def ask(server: Any, url: str, question: str = QUESTIONS[0], **more: Any) -> httpx.Response:
    told = {"model": "earlytom", "messages": messages(url, question), **more}
    return httpx.post(server.url + CHAT, json=told, headers=HEAD, timeout=LONG)


def text(response: httpx.Response) -> str:
    found: str = response.json()["choices"][0]["message"]["content"]
    return found


def test_further_questions_find_their_video_read(server: Process, urls: list[str]) -> None:
    for url in urls:
        first, *further = (ask(server, url, question).json()["usage"] for question in QUESTIONS * 2)
        assert first["prompt_tokens_details"]["cached_tokens"] == 0
        assert all(one["prompt_tokens_details"]["cached_tokens"] > 100 for one in further)


def test_a_replica_that_is_killed_under_load_costs_no_answer(server: Process, urls: list[str]) -> None:
    wanted = {question: text(ask(server, urls[0], question)) for question in QUESTIONS}
    before = replicas()
    assert len(before) == 2
    stop, killed = threading.Event(), threading.Event()
    counts, wrong = [0, 0], []

    def load(number: int) -> None:
        turn = number
        while not stop.is_set():
            turn += 1
            question = QUESTIONS[turn % 2]
            response = ask(server, urls[turn % 4], question)
            if response.status_code != 200 or text(response) != wanted[question]:
                wrong.append(response.text)
            counts[killed.is_set()] += 1

    threads = [threading.Thread(target=load, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: counts[0] >= 12)
    killed.set()
    os.kill(before[0], signal.SIGKILL)
    until(lambda: counts[1] >= 30 and len(set(replicas()) - set(before)) == 1)
    stop.set()
    for thread in threads:
        thread.join(LONG)
    assert wrong == []


def test_more_than_all_replicas_take_is_refused(server: Process, urls: list[str]) -> None:
    got: list[httpx.Response] = []
    threads = [threading.Thread(target=lambda: got.append(ask(server, urls[0]))) for _ in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    statuses = {one.status_code for one in got}
    assert statuses == {200, 429}
    refused = [one for one in got if one.status_code == 429]
    assert {one.json()["error"]["code"] for one in refused} == {"overloaded"}
    assert all("retry-after" in one.headers for one in refused)


def until(reached: Any) -> None:
    end = time.monotonic() + LONG
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_signal_drains_and_takes_the_replicas_along(bundled_engine: Path, server: Process, urls: list[str]) -> None:
    """Last: it ends the server."""
    answers: list[int] = []
    threads = [threading.Thread(target=lambda: answers.append(ask(server, urls[1]).status_code)) for _ in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: server.busy() > 0 or bool(answers))
    server.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(LONG)
    status, said = server.end()
    assert status == 0
    assert said.endswith("stopped: all that was asked is answered\n")
    assert set(answers) <= {200, 503}
    assert 200 in answers
    until(lambda: not replicas())


def test_the_configuration_of_a_cluster_is_one() -> None:
    """By Ray's own schema; that its names are spelt right, which Ray does not look at, `test_deploy` tells."""
    yaml = pytest.importorskip("yaml")
    from ray.serve.schema import ServeDeploySchema

    from runtime.serve.ray import application

    text = (ROOT / "runtime/serve/deploy/serve_config.yaml").read_text("utf-8")
    (app,) = ServeDeploySchema.model_validate(yaml.safe_load(text)).applications
    assert app.import_path == "runtime.serve.ray:application"
    assert application(app.args) is not None
