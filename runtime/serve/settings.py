"""The server's settings: every flag of `python -m runtime.serve`, checked.

Strings and numbers only, so that a command line refuses invalid ones before slow imports. The flags are generated from
the fields; `Flag` adds what a field itself does not have.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from earlytom.errors import UserError
from earlytom.numbers import real, whole
from runtime.choices import BACKENDS, NARROW_DTYPES, POSITIONS, flag
from runtime.decoder.naming import address_of, by_vllm, decoder_named
from runtime.engine import layout

_UNITS = {"": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_MOST_TOKENS = 1 << 20
_MOST_REPLICAS = 1024
_MOST_DECODERS = 64


@dataclass(frozen=True)
class Flag:
    """How a setting is given on the command line.

    Attributes:
        help: the help text.
        metavar: name of its value; None for a switch.
        kind: converts the value's text; bool for a switch that has a --no- form, too.
        choices: the allowed values.
        several: whether it may be repeated.
    """

    help: str
    metavar: str | None = None
    kind: Any = str
    choices: tuple[str, ...] | None = None
    several: bool = False


def size(text: str) -> int:
    """Bytes of "64MiB", "1 GB" or "4096".

    Raises:
        UserError: it is no size.
    """
    found = re.fullmatch(r"(\d{1,15})\s*([KMG]I?B)?", text.strip(), re.IGNORECASE)
    if found is None:
        raise UserError(f"{text!r} is no size: give bytes, or a number with KiB, MiB or GiB, as in 64MiB")
    return int(found[1]) * _UNITS[(found[2] or "").upper()]


def _flag(default: Any, help: str, metavar: str | None = None, kind: Any = str, **more: Any) -> Any:
    return dataclasses.field(default=default, metadata={"flag": Flag(help, metavar, kind, **more)})


@dataclass(frozen=True)
class Settings:
    """A server's settings; sizes are bytes, times seconds.

    Raises:
        UserError: a value that makes no sense, by its flag.
    """

    engine: Path
    model: str | None = _flag(None, "the checkpoint it was built from, where it is now (default: as then)", "SOURCE")
    backend: str = _flag(
        "auto", "auto: the compiled engine where torch can use a GPU, else onnxruntime", choices=BACKENDS
    )
    device: str | None = _flag(None, "where the decoder runs (default: the GPU if any)", choices=("cpu", "cuda"))
    dtype: str | None = _flag(None, "of the decoder (default: see runtime.ask)", choices=layout.DTYPE_NAMES)
    decoder_dtype: str | None = _flag(
        None, "the decoder's weights in int8, on a CPU (default: as --dtype says)", choices=NARROW_DTYPES
    )
    decoder: str = _flag(
        "torch",
        "torch-tensorrt compiles the language model; http://HOST:PORT/v1 is a vLLM server that decodes, vllm the same "
        "in this process",
        "DECODER",
        decoder_named,
    )
    decoder_key_file: str | None = _flag(None, "a file with the key that the vLLM server asks for", "FILE")
    bias: bool | None = _flag(
        None,
        "let a visual token weigh as much as all that it stands for (default: as the engine's method has it)",
        kind=bool,
    )
    positions: str | None = _flag(
        None,
        "of visual tokens: where they were in the video, or one after the other (default: likewise)",
        choices=POSITIONS,
    )
    host: str = _flag("127.0.0.1", "address to listen on; 0.0.0.0 is every address of the machine", "ADDRESS")
    port: int = _flag(8000, "port to listen on; 0 takes a free one", "N", int)
    name: str = _flag("earlytom", "what clients call the model", "NAME")
    api_key_file: str | None = _flag(None, "a file of keys, one a line; without it nobody is asked for one", "FILE")
    allow_domain: tuple[str, ...] = _flag(
        (), "a host that video addresses may name, or *.suffix; again for more (default: none)", "HOST", several=True
    )
    allow_private: bool = _flag(False, "let allowed hosts have addresses that are not public")
    max_body: int = _flag(64 << 20, "largest body of a request", "BYTES", size)
    max_video: int = _flag(256 << 20, "largest video, uploaded or fetched", "BYTES", size)
    max_pixels: int = _flag(4096 * 2304, "refuse a video of more pixels a frame than this", "N", int)
    max_frames: int = _flag(200_000, "refuse a video of more frames than this", "N", int)
    max_seconds: float = _flag(7200.0, "refuse a video of more seconds than this", "S", float)
    fetch_seconds: float = _flag(20.0, "a video has to be fetched within this", "S", float)
    body_seconds: float = _flag(10.0, "headers, and a body, have to come within this", "S", float)
    decode_seconds: float = _flag(30.0, "a video has to be decoded within this: others wait for it", "S", float)
    video_decoders: int = _flag(1, "videos that are decoded at a time, each by a process of some 350 MB", "N", int)
    waiting: int = _flag(8, "requests that may wait behind those that are answered; more get 429", "N", int)
    deadline: float = _flag(60.0, "an answer has to end within this, else 504", "S", float)
    max_tokens: int = _flag(
        512, "the most tokens of an answer, and what is taken where a request asks for none", "N", int
    )
    watch_bytes: int = _flag(2 << 30, "memory on the decoder's device for videos that were read", "BYTES", size)
    videos: int = _flag(64, "videos that are remembered, each with its sampled frames", "N", int)
    cors: tuple[str, ...] = _flag(
        (), "an origin whose pages may call the server, or *; again for more (default: none)", "ORIGIN", several=True
    )
    ray: bool = _flag(False, "answer with replicas of the engine, by Ray Serve; this process is their front")
    replicas: int = _flag(1, "with --ray: how many, each with an engine and a decoder", "N", int)
    max_replicas: int | None = _flag(
        None, "with --ray: as many while there is more to do (default: --replicas)", "N", int
    )
    metrics_prefix: str = _flag("earlytom:", "of the metrics' names; vllm: lets its dashboards read them", "TEXT")
    otlp: str | None = _flag(None, "a collector of OpenTelemetry that spans are sent to (default: none)", "URL")
    page: bool = _flag(True, "no page at /")

    def __post_init__(self) -> None:
        for name in ("max_body", "max_video", "max_pixels", "max_frames", "videos"):
            whole(option(name), getattr(self, name), 1)
        decoder_named(self.decoder)
        if self.decoder_key_file is not None and (not by_vllm(self.decoder) or address_of(self.decoder) is None):
            raise UserError("--decoder-key-file is about a vLLM server: give its address with --decoder")
        whole("--max-tokens", self.max_tokens, 1, _MOST_TOKENS)
        whole("--waiting", self.waiting, 0)
        whole("--video-decoders", self.video_decoders, 1, _MOST_DECODERS)
        whole("--watch-bytes", self.watch_bytes, 0)
        whole("--port", self.port, 0, 65535)
        whole("--replicas", self.replicas, 1, _MOST_REPLICAS)
        if self.max_replicas is not None:
            whole("--max-replicas", self.max_replicas, self.replicas, _MOST_REPLICAS)
        if not self.ray and (self.replicas > 1 or self.max_replicas is not None):
            raise UserError("--replicas and --max-replicas are Ray's: give --ray, too")
        for name in ("max_seconds", "fetch_seconds", "body_seconds", "decode_seconds", "deadline"):
            real(option(name), getattr(self, name), 0, low_open=True)
        if not self.name.strip() or not self.name.isprintable() or "/" in self.name:
            raise UserError(f"--name {self.name!r}: give a word that clients can type, without a slash")
        if re.fullmatch(r"[a-zA-Z_:][a-zA-Z0-9_:]*", self.metrics_prefix) is None:
            raise UserError(f"--metrics-prefix {self.metrics_prefix!r}: give letters, digits, _ and :, as in vllm:")
        if self.otlp is not None and re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", self.otlp) is None:
            raise UserError(f"--otlp {self.otlp!r}: give the address of a collector, as http://127.0.0.1:4318")
        for host in self.allow_domain:
            if re.fullmatch(r"(\*\.)?[a-zA-Z0-9]([a-zA-Z0-9.-]*[a-zA-Z0-9])?", host) is None:
                raise UserError(f"--allow-domain {host!r}: give a host name, or *.suffix for all hosts under one")
        if self.allow_private and not self.allow_domain:
            raise UserError("--allow-private is about hosts that are allowed: name them with --allow-domain HOST")


def settings_from(told: Mapping[str, Any]) -> Settings:
    """Settings from names and values, as in a file; texts are converted as on the command line.

    Raises:
        UserError: an unknown name, an invalid value, or no engine.
    """
    known = flags()
    values: dict[str, Any] = {}
    for name, value in told.items():
        if name != "engine" and name not in known:
            raise UserError(f"there is no setting {name!r}; known are engine, {', '.join(known)}")
        spec = None if name == "engine" else known[name][1]
        if spec is not None and spec.several:
            value = tuple(value)
        elif spec is not None and isinstance(value, str) and spec.kind not in (str, bool):
            value = spec.kind(value)
        values[name] = Path(value) if name == "engine" else value
    if "engine" not in values:
        raise UserError("there is no setting engine: give the folder of one")
    return Settings(**values)


def told_of(settings: Settings) -> dict[str, Any]:
    """Settings by name, in plain types; `settings_from` takes them."""
    return dataclasses.asdict(settings) | {"engine": str(settings.engine)}


def option(name: str) -> str:
    """The flag of a setting."""
    return "--no-page" if name == "page" else flag(name)


def flags() -> dict[str, tuple[Any, Flag]]:
    """Default and flag of every setting that has one, by name."""
    return {one.name: (one.default, one.metadata["flag"]) for one in dataclasses.fields(Settings) if one.metadata}
