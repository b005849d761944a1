"""vLLM decodes what our decoder decodes, and more of it at a time: `make vllm-check`.

    python -m tests.vllm_check ENGINE --larger ENGINE --vllm VENV/bin/python --at-least 3

Writes the engine's language model, starts vLLM's server on it with the other Python (its pins and ours clash), and asks
about four clips of the bundled model's test set: our decoder, vLLM behind its address (streamed, as all of it is, and
with the video watched), `python -m runtime.serve` in front of it (whole and streamed), and vLLM in the other Python's
process. Every greedy answer has to be our decoder's, token for token where tokens are seen. Then clients ask about
watched videos in closed loops, our decoder and vLLM in turns, each on as many threads: for the answers that the model
gives, which are a word, for answers that nothing but their length ends, and for such answers of a larger model, whose
weights take a step's time as those of a real one do: of the bundled one most of a step is what vLLM does beside them.
The last line is one JSON object; the exit status is 1 when an answer differs, alone or under load, or when vLLM at 8
clients is not `--at-least` times as fast for the larger model's answers (for the long ones where there is none).
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from runtime import cli

CLIPS = (3, 7, 11, 19)
CLIENTS = (1, 4, 8, 16)
AIM_AT = 8  # clients
START_SECONDS, STOP_SECONDS = 600.0, 60.0
TOKENS, LARGER_TOKENS = 32, 16
SHORT, LONG, LARGER = "a word", f"{TOKENS} tokens", f"{LARGER_TOKENS} tokens of the larger model"  # answers
ROOT = Path(__file__).parents[1]
Asked = list[tuple[str, str]]  # (path of a clip, question)
Found = list[dict[str, Any]]  # text, and tokens where they are known
Rates = dict[int, dict[str, float]]  # by clients: "ours", "vllm" (answers a second), "ratio", "wrong" (answers)


def parser() -> argparse.ArgumentParser:
    p = cli.Parser(prog="python -m tests.vllm_check", description="Compare vLLM with our decoder.")
    p.add_argument("engine", type=Path, metavar="ENGINE", help="engine of the bundled model, or a folder of them")
    p.add_argument("--larger", type=Path, metavar="ENGINE", help="of a larger model (default: none)")
    p.add_argument("--vllm", type=Path, metavar="PYTHON", help="the Python that has vLLM")
    p.add_argument("--seconds", type=float, default=8.0, metavar="S", help="of each load (default: 8)")
    p.add_argument("--threads", type=int, default=1, metavar="N", help="that each decoder computes with (default: 1)")
    p.add_argument(
        "--at-least",
        type=float,
        default=0.0,
        metavar="X",
        help=f"times as fast at {AIM_AT} clients, for the larger model if there is one (default: any)",
    )
    p.add_argument("--inside", type=Path, metavar="FILE", help="of this check's own: answer what FILE asks")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The check. Returns 0 if all of it holds."""
    from runtime.engine.folder import newest_engine

    options = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and what was started here ends, too
    if options.inside is not None:
        return answer_inside(options.engine, options.inside)
    named = [one for one in (options.engine, options.larger) if one is not None]
    engines = [(one if (one / "manifest.json").exists() else newest_engine(one)).absolute() for one in named]
    with tempfile.TemporaryDirectory(prefix="vllm-check-") as made:
        return check(engines, options, Path(made))


def check(engines: Sequence[Path], options: argparse.Namespace, folder: Path) -> int:
    """All of it, of an engine and perhaps one of a larger model, in a folder for what is written."""
    import torch

    torch.set_num_threads(options.threads)
    engine, *larger = engines
    asked = questions(folder)
    wanted, long = answers(engine, "torch", asked), answers(engine, "torch", asked, endless=True)
    found: dict[str, Found] = {}
    with vllm_server(options.vllm, engine, folder / "bundled", options.threads) as url:
        found["over the wire"] = answers(engine, url, asked)
        found["over the wire, watched"] = answers(engine, url, asked, watch=True)
        with server(engine, url) as base:
            found["through the server, whole"] = served(base, asked, stream=False)
            found["through the server, streamed"] = served(base, asked, stream=True)
        endless = answers(engine, url, asked, endless=True)
        rates = {
            kind: throughput(kind, engine, url, list(zip(asked, right, strict=True)), options)
            for kind, right in ((SHORT, wanted), (LONG, long))
        }
    if larger:
        rates[LARGER] = larger_throughput(larger[0], asked, options, folder / "larger")
    found["in process"] = inside(options.vllm, engine, asked, folder, options.threads)
    equal = {name: sum(map(agrees, got, wanted)) for name, got in found.items()}
    equal[f"over the wire, {LONG}"] = sum(map(agrees, endless, long))
    for name, count in equal.items():
        print(f"{name}: {count} of {len(asked)} answers are our decoder's")
    missed = failures(len(asked), equal, rates, options.at_least)
    for line in missed:
        print(f"missed: {line}")
    told = {"questions": len(asked), "threads": options.threads, "equal": equal, "rates": rates}
    print(json.dumps(told | {"at_least": options.at_least, "missed": missed}))
    return int(bool(missed))


def failures(count: int, equal: dict[str, int], rates: dict[str, Rates], at_least: float) -> list[str]:
    """What does not hold, a line each: of `count` answers each way, and of the loads by their kind."""
    lines = [f"{name}: {count - same} of {count} answers differ" for name, same in equal.items() if same < count]
    for kind, found in rates.items():
        wrong = {clients: one["wrong"] for clients, one in found.items() if one["wrong"]}
        lines += [f"answers of {kind}, {clients} clients: {n:.0f} answers differ" for clients, n in wrong.items()]
    kind = LARGER if LARGER in rates else LONG
    times = rates[kind][AIM_AT]["ratio"]
    if times < at_least:
        lines.append(f"answers of {kind}, {AIM_AT} clients: {times:.2f} times as fast, and not {at_least:g}")
    return lines


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


def opened(engine: Path, decoder: str, *, endless: bool = False) -> Any:
    """A pipeline; nothing but their length ends the answers of an endless one."""
    from runtime.parts import WantedParts, load_parts
    from runtime.pipeline import Pipeline
    from runtime.service.answering import Answering

    parts = load_parts(WantedParts.checked(engine, device="cpu", decoder=decoder))
    text, most = parts.text, max(CLIENTS)
    stops = () if endless else text.stops
    core = Answering(parts.manifest, parts.vision, text.decoder, text.closing, text.tokenizer, stops)
    return Pipeline(core, waiting=most)


def answers(
    engine: Path, decoder: str, asked: Asked, *, watch: bool = False, endless: bool = False, tokens: int = TOKENS
) -> Found:
    """The pipeline's own, streamed."""
    found = []
    with opened(engine, decoder, endless=endless) as pipeline:
        watched = {clip: pipeline.watch(clip) for clip, _ in asked} if watch else {}
        for clip, question in asked:
            how = {"max_new_tokens": tokens}
            stream = watched[clip].stream(question, **how) if watch else pipeline.stream(clip, question, **how)
            *deltas, last = stream
            text = "".join(delta.text for delta in (*deltas, last))
            found.append({"text": text, "tokens": list(last.answer.tokens)})
    return found


# vLLM


@contextlib.contextmanager
def vllm_server(python: Path, engine: Path, folder: Path, threads: int) -> Iterator[str]:
    """The address of vLLM's server on the engine's language model, while it runs; `folder` is made for that model."""
    from runtime import extract_decoder

    model, log, port = folder / "lm", folder / "vllm.log", free_port()
    folder.mkdir()
    extract_decoder.main([str(engine), str(model), "--dtype", "fp32"])
    words = [
        *("-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "language-model"),
        *("--port", port, "--dtype", "float32", "--max-model-len", 1024, "--enable-prompt-embeds"),
    ]
    with log.open("wb") as out:
        process = subprocess.Popen(
            list(map(str, [python, *words])), stdout=out, stderr=out, env=environment(threads), start_new_session=True
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        stop(process)


def environment(threads: int) -> dict[str, str]:
    """Of vLLM's processes: little memory for keys and values, as many threads as ours, and our sources."""
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    own["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # bound, it takes a thread for each core
    return os.environ | own | {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


def inside(python: Path, engine: Path, asked: Asked, folder: Path, threads: int) -> Found:
    """Answers with vLLM in the other Python's process."""
    (folder / "asked.json").write_text(json.dumps(asked))
    words = [python, "-m", "tests.vllm_check", engine, "--inside", folder / "asked.json"]
    done = subprocess.run(
        list(map(str, words)),
        cwd=ROOT,
        env=environment(threads),
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

Right = list[tuple[tuple[str, str], dict[str, Any]]]  # what is asked, and what the answer is


def throughput(kind: str, engine: Path, url: str, right: Right, options: argparse.Namespace) -> Rates:
    """Answers a second about watched videos, ours and vLLM's, printed as a table."""
    print(f"\nanswers of {kind} a second, each decoder on {options.threads} of the threads of {os.cpu_count()} cores")
    print(f"{'clients':>8}{'ours':>10}{'vLLM':>10}{'times':>10}{'wrong':>10}", flush=True)
    endless, tokens, rates = kind != SHORT, LARGER_TOKENS if kind == LARGER else TOKENS, {}
    with opened(engine, "torch", endless=endless) as ours, opened(engine, url, endless=endless) as theirs:
        for pipeline in (ours, theirs):
            load(pipeline, right, 1, options.seconds / 4, tokens)  # a first time is slower
        for clients in CLIENTS:
            rates[clients] = found = compared(ours, theirs, right, clients, options.seconds, tokens)
            own, other, ratio = found["ours"], found["vllm"], found["ratio"]
            print(f"{clients:>8}{own:>10.1f}{other:>10.1f}{ratio:>10.2f}{found['wrong']:>10.0f}", flush=True)
    return rates


def larger_throughput(engine: Path, asked: Asked, options: argparse.Namespace, folder: Path) -> Rates:
    """The same of the larger model, whose answers nothing but their length ends."""
    asked = asked[::2]  # its answers take seconds
    right = answers(engine, "torch", asked, endless=True, tokens=LARGER_TOKENS)
    with vllm_server(options.vllm, engine, folder, options.threads) as url:
        return throughput(LARGER, engine, url, list(zip(asked, right, strict=True)), options)


def compared(ours: Any, theirs: Any, right: Right, clients: int, seconds: float, tokens: int) -> dict[str, float]:
    """Both in turns, twice."""
    found = [[load(one, right, clients, seconds / 2, tokens) for one in (ours, theirs)] for _ in range(2)]
    own, other = (sum(rate for rate, _ in each) / len(each) for each in zip(*found, strict=True))
    wrong = sum(wrong for each in found for _, wrong in each)
    return {"ours": own, "vllm": other, "ratio": other / own, "wrong": wrong}


def load(pipeline: Any, right: Right, clients: int, seconds: float, tokens: int) -> tuple[float, int]:
    """Of clients that ask one question after the other: answers a second, and how many are not what they should be."""
    watched = {clip: pipeline.watch(clip) for clip in {clip for (clip, _), _ in right}}
    turns, counts, wrong = itertools.cycle(right), [0] * clients, [0] * clients
    lock, end = threading.Lock(), time.monotonic() + seconds

    def ask(number: int) -> None:
        while time.monotonic() < end:
            with lock:
                (clip, question), wanted = next(turns)
            answer = watched[clip].ask(question, max_new_tokens=tokens)
            wrong[number] += list(answer.tokens) != wanted["tokens"]
            counts[number] += 1

    began = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(ask, range(clients)))  # an answer that fails ends the check
    took = time.monotonic() - began
    for one in watched.values():
        one.close()
    return sum(counts) / took, sum(wrong)


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
