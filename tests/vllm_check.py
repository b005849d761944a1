"""vLLM decodes what our decoder decodes, and more of it at a time: `make vllm-check`.

    python -m tests.vllm_check ENGINE --vllm VENV/bin/python --at-least 3

Writes the engine's language model, starts vLLM's server on it with the other Python (its pins and ours clash), and asks
about four clips of the bundled model's test set: our decoder, vLLM behind its address (streamed, as all of it is, and
with the video watched), `python -m runtime.serve` in front of it (whole and streamed), and vLLM in the other Python's
process. Every greedy answer has to be our decoder's, token for token where tokens are seen. Then clients ask about
watched videos in closed loops, our decoder and vLLM in turns. The last line is one JSON object; the exit status is 1
when an answer differs, or when vLLM at 8 clients is not `--at-least` times as fast.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from runtime import cli

CLIPS = (3, 7, 11, 19)
CLIENTS = (1, 4, 8, 16)
AIM_AT = 8  # clients
START_SECONDS, STOP_SECONDS = 600.0, 60.0
TOKENS = 32
ROOT = Path(__file__).parents[1]
Asked = list[tuple[str, str]]  # (path of a clip, question)
Found = list[dict[str, Any]]  # text, and tokens where they are known


def parser() -> argparse.ArgumentParser:
    p = cli.Parser(prog="python -m tests.vllm_check", description="Compare vLLM with our decoder.")
    p.add_argument("engine", type=Path, metavar="ENGINE", help="engine of the bundled model, or a folder of them")
    p.add_argument("--vllm", type=Path, metavar="PYTHON", help="the Python that has vLLM")
    p.add_argument("--seconds", type=float, default=8.0, metavar="S", help="of each load (default: 8)")
    p.add_argument("--at-least", type=float, default=0.0, metavar="X", help="times as fast at 8 clients (default: any)")
    p.add_argument("--inside", type=Path, metavar="FILE", help="of this check's own: answer what FILE asks")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The check. Returns 0 if all of it holds."""
    from runtime.engine.folder import newest_engine

    options = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and what was started here ends, too
    if options.inside is not None:
        return answer_inside(options.engine, options.inside)
    engine = options.engine if (options.engine / "manifest.json").exists() else newest_engine(options.engine)
    with tempfile.TemporaryDirectory(prefix="vllm-check-") as made:
        return check(engine.absolute(), options, Path(made))


def check(engine: Path, options: argparse.Namespace, folder: Path) -> int:
    """All of it, in a folder for what is written."""
    from runtime import extract_decoder

    asked = questions(folder)
    extract_decoder.main([str(engine), str(folder / "lm"), "--dtype", "fp32"])
    wanted = answers(engine, "torch", asked)
    found: dict[str, Found] = {}
    with vllm_server(options.vllm, folder / "lm", folder / "vllm.log") as url:
        found["over the wire"] = answers(engine, url, asked)
        found["over the wire, watched"] = answers(engine, url, asked, watch=True)
        with server(engine, url) as base:
            found["through the server, whole"] = served(base, asked, stream=False)
            found["through the server, streamed"] = served(base, asked, stream=True)
        rates = throughput(engine, url, asked, options.seconds)
    found["in process"] = inside(options.vllm, engine, asked, folder)
    equal = {name: sum(map(agrees, got, wanted)) for name, got in found.items()}
    for name, count in equal.items():
        print(f"{name}: {count} of {len(wanted)} answers are our decoder's")
    print(json.dumps({"questions": len(wanted), "equal": equal, "rates": rates}))
    return int(any(count < len(wanted) for count in equal.values()) or rates[AIM_AT]["ratio"] < options.at_least)


def questions(folder: Path) -> Asked:
    """What the clips of the test set are asked."""
    from runtime.drawing.clips import write_test_clip

    found = []
    for number in CLIPS:
        path, asked = write_test_clip(folder / f"clip{number}.mp4", number)
        found += [(str(path), question.text) for question in asked]
    return found


def agrees(one: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """The same text, and the same tokens where tokens are known."""
    return one["text"] == wanted["text"] and one.get("tokens", wanted["tokens"]) == wanted["tokens"]


def answers(engine: Path, decoder: str, asked: Asked, *, watch: bool = False) -> Found:
    """The pipeline's own, streamed."""
    from runtime.pipeline import Pipeline

    found = []
    with Pipeline.load(engine, device="cpu", decoder=decoder) as pipeline:
        watched = {clip: pipeline.watch(clip) for clip, _ in asked} if watch else {}
        for clip, question in asked:
            how = {"max_new_tokens": TOKENS}
            stream = watched[clip].stream(question, **how) if watch else pipeline.stream(clip, question, **how)
            *deltas, last = stream
            text = "".join(delta.text for delta in (*deltas, last))
            found.append({"text": text, "tokens": [delta.token for delta in deltas]})
    return found


# vLLM


@contextlib.contextmanager
def vllm_server(python: Path, model: Path, log: Path) -> Iterator[str]:
    """The address of vLLM's server, while it runs."""
    port = free_port()
    words = [
        *("-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "language-model"),
        *("--port", port, "--dtype", "float32", "--max-model-len", 1024, "--enable-prompt-embeds"),
    ]
    with log.open("wb") as out:
        process = subprocess.Popen(
            list(map(str, [python, *words])), stdout=out, stderr=out, env=environment(), start_new_session=True
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        stop(process)


def environment() -> dict[str, str]:
    """Of vLLM's processes: little memory for keys and values, both cores, and our sources."""
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": str(os.cpu_count()), "PYTHONPATH": str(ROOT)}
    return os.environ | own | {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


def inside(python: Path, engine: Path, asked: Asked, folder: Path) -> Found:
    """Answers with vLLM in the other Python's process."""
    (folder / "asked.json").write_text(json.dumps(asked))
    words = [python, "-m", "tests.vllm_check", engine, "--inside", folder / "asked.json"]
    done = subprocess.run(
        list(map(str, words)),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"vLLM in process ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def answer_inside(engine: Path, file: Path) -> int:
    """What `inside` starts."""
    print(json.dumps(answers(engine, "vllm", [tuple(one) for one in json.loads(file.read_text())])))
    return 0


# Our server before it


@contextlib.contextmanager
def server(engine: Path, url: str) -> Iterator[str]:
    """The address of `python -m runtime.serve` that decodes at `url`."""
    words = [sys.executable, "-m", "runtime.serve", str(engine), "--device", "cpu", "--port", "0", "--decoder", url]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if found := re.match(r"serving earlytom on (\S+)$", line):
                yield found[1]
                return
        raise SystemExit("the server did not start:\n" + "".join(said))
    finally:
        stop(process)


def served(base: str, asked: Asked, *, stream: bool) -> Found:
    """What a client of the server reads."""
    found = []
    for clip, question in asked:
        url = "data:video/mp4;base64," + base64.b64encode(Path(clip).read_bytes()).decode()
        content = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": question}]
        body = {"model": "earlytom", "stream": stream, "messages": [{"role": "user", "content": content}]}
        request = urllib.request.Request(
            f"{base}/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=STOP_SECONDS) as response:
            got = response.read().decode()
        if not stream:
            found.append({"text": json.loads(got)["choices"][0]["message"]["content"]})
            continue
        events = [json.loads(line[len("data: ") :]) for line in got.splitlines() if line.startswith("data: {")]
        found.append({"text": "".join(one["choices"][0]["delta"].get("content", "") for one in events)})
    return found


# Throughput


def throughput(engine: Path, url: str, asked: Asked, seconds: float) -> dict[int, dict[str, float]]:
    """Answers a second about watched videos, by clients: ours, vLLM's, and how many times ours that is."""
    from runtime.pipeline import Pipeline

    most = max(CLIENTS)
    with (
        Pipeline.load(engine, device="cpu", waiting=most) as ours,
        Pipeline.load(engine, device="cpu", waiting=most, decoder=url) as theirs,
    ):
        for pipeline in (ours, theirs):
            load(pipeline, asked, 1, seconds / 4)  # a first time is slower
        rates = {}
        for clients in CLIENTS:
            rates[clients] = found = compared(ours, theirs, asked, clients, seconds)
            print(
                f"{clients} clients: ours {found['ours']:.1f}/s, vLLM {found['vllm']:.1f}/s, {found['ratio']:.2f} times"
            )
        return rates


def compared(ours: Any, theirs: Any, asked: Asked, clients: int, seconds: float) -> dict[str, float]:
    """Both in turns, twice."""
    rates = [[load(one, asked, clients, seconds / 2) for one in (ours, theirs)] for _ in range(2)]
    own, other = (sum(each) / len(each) for each in zip(*rates, strict=True))
    return {"ours": own, "vllm": other, "ratio": other / own}


def load(pipeline: Any, asked: Asked, clients: int, seconds: float) -> float:
    """Answers a second of clients that ask one question after the other."""
    watched = {clip: pipeline.watch(clip) for clip, _ in asked}
    turns, counts = itertools.cycle(asked), [0] * clients
    lock, end = threading.Lock(), time.monotonic() + seconds

    def ask(number: int) -> None:
        while time.monotonic() < end:
            with lock:
                clip, question = next(turns)
            watched[clip].ask(question, max_new_tokens=TOKENS)
            counts[number] += 1

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.monotonic() - began
    for one in watched.values():
        one.close()
    return sum(counts) / took


# Processes


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.5)
    raise SystemExit(f"vLLM did not start:\n{log.read_text(errors='replace')[-3000:]}")


def stop(process: subprocess.Popen[Any]) -> None:
    """End a process that was started here, as gently as it lets itself be ended."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv[1:]))
