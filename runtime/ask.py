"""Asks one or more questions about a video: `python -m runtime.ask VIDEO "QUESTION" ...`.

Streams the answers, then prints the times of all stages.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from earlytom.errors import UserError
from earlytom.numbers import real, whole
from runtime import cli
from runtime.choices import BACKENDS, MAX_NEW_TOKENS, NARROW_DTYPES, POSITIONS
from runtime.decoder.naming import decoder_named
from runtime.decoder.sampling import Sampling
from runtime.engine import layout
from runtime.engine.folder import ENGINES, newest_engine
from runtime.engine.manifest import Manifest
from runtime.errors import VideoError
from runtime.show.figure import check_picture
from runtime.video import Limits

if TYPE_CHECKING:  # modules that load PyTorch are imported after all checks
    from runtime.decoder.eager import InnerMerge
    from runtime.service.requests import Answer, Delta, Timings

INNER_RATIO = 0.5
EXAMPLES = """
examples:
  python -m runtime.ask clip.mp4 "What colour is the ball?"
      with the newest engine under engines/
  python -m runtime.ask clip.mp4 "What colour is the ball?" "Where is it?"
      each further question costs the prefill of its own text
  python -m runtime.ask --engine engines/NAME --model /models/llava-onevision clip.mp4 "What happens?" --json

The exit status is 0 after an answer, 2 when something asked for cannot be done, 130 after Ctrl-C.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0; every failure is raised (see `runtime.cli.run`)."""
    # Questions may be on both sides of options; but only `parse_args` reads what follows a "--".
    options = parser().parse_args(argv) if "--" in (argv or ()) else parser().parse_intermixed_args(argv)
    screen = cli.Screen(json_only=options.json)
    check_request(options)
    limits = limits_of(options)
    sampling = Sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed)
    if sampling.temperature == 0 and (sampling.top_k, sampling.top_p) != (0, 1):
        raise UserError("--top-k and --top-p are for sampling, and --temperature 0 samples nothing: raise it")
    folder = options.engine or newest_engine(ENGINES)
    Manifest.read(folder, verify_files=False)
    from runtime.engine.dtypes import DTYPES
    from runtime.pipeline import Pipeline

    if options.decoder == "torch-tensorrt":
        screen.line("note: a decoder that was not used before is compiled first, which takes minutes")
    with screen.working("loading the engine and the decoder"):
        loaded = Pipeline.load(
            folder,
            options.model,
            options.backend,
            device=options.device,
            dtype=None if options.dtype is None else DTYPES[options.dtype],
            decoder=options.decoder,
            inner=inner_merge(options),
            bias=options.bias,
            positions=options.positions,
            decoder_dtype=options.decoder_dtype,
            limits=limits,
            warm_up=False,  # it would only delay the single request
        )
    with loaded as pipeline:
        manifest = pipeline.manifest
        screen.line(f"engine: {manifest.name} ({pipeline.vision.name})")
        for note in pipeline.notes:
            screen.line(f"note: {note}")
        if not manifest.model.trained:
            screen.line(
                "note: this model's weights are not trained, so the answer is nonsense; counts and times are real"
            )
        how: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "sampling": sampling}
        how["kept"] = options.picture is not None
        video: dict[str, Any] = {"system": options.system, "frames": options.frames}
        if len(options.questions) == 1:
            answers = [say(screen, pipeline.stream(options.video, options.questions[0], **how, **video))]
        else:
            answers, started = [], time.perf_counter()
            with pipeline.watch(options.video, **video) as watched:
                screen.line(f"encoded and read the video in {1000 * (time.perf_counter() - started):.1f} ms")
                for question in options.questions:
                    screen.line(f"> {question}")
                    answers.append(say(screen, watched.stream(question, **how)))
        show_times(screen, answers)
        if options.picture is not None:
            from runtime.service.pictures import picture

            screen.line(f"picture: {picture(answers, options.questions, options.picture, options.video)}")
        screen.result(record(options.questions, answers, manifest, pipeline.vision.name))
    return 0


def say(screen: cli.Screen, deltas: Iterable[Delta]) -> Answer:
    """Print an answer while it is streamed."""
    answer: Answer | None = None
    for delta in deltas:
        screen.write(delta.text)
        answer = delta.answer
    assert answer is not None  # the last delta has it
    screen.line()
    return answer


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    p = cli.Parser(
        prog="python -m runtime.ask",
        description="Ask a question about a video, with an engine that python -m builder.build made.",
        epilog=EXAMPLES,
    )
    p.add_argument("video", metavar="VIDEO", help="any video file that FFmpeg reads")
    p.add_argument(
        "questions", nargs="+", metavar="QUESTION", help="what to ask; for several the video is encoded and read once"
    )
    p.add_argument("--engine", type=Path, metavar="DIR", help="engine folder (default: the newest under engines/)")
    p.add_argument(
        "--model",
        metavar="SOURCE",
        help="the checkpoint it was built from, where it is now (default: as then)",
    )
    p.add_argument(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="auto: the compiled engine where torch can use a GPU, else onnxruntime; torch is the reference",
    )
    p.add_argument(
        "--device", choices=("cpu", "cuda"), help="where the decoder runs (default: the GPU if there is one)"
    )
    p.add_argument(
        "--dtype",
        choices=layout.DTYPE_NAMES,
        help="of the decoder (default: the engine's on a GPU; on a CPU fp32, or what the checkpoint is stored in where "
        "fp32 does not fit into memory)",
    )
    p.add_argument(
        "--decoder-dtype",
        choices=NARROW_DTYPES,
        help="weights of the decoder in int8, half of bf16's memory, on a CPU; it computes in bf16 then (default: as "
        "--dtype says)",
    )
    p.add_argument(
        "--decoder",
        type=decoder_named,
        default="torch",
        metavar="DECODER",
        help="torch-tensorrt compiles the language model for the GPU it runs on; http://HOST:PORT/v1 is a vLLM server "
        "that decodes, vllm the same in this process (default: torch)",
    )
    p.add_argument(
        "--inner-layer",
        type=int,
        metavar="K",
        help="merge visual tokens inside the language model before layer K (the method's: 18; default: off)",
    )
    p.add_argument(
        "--inner-ratio",
        type=float,
        metavar="R",
        help=f"share that is folded away there (default: {INNER_RATIO})",
    )
    p.add_argument(
        "--bias",
        action=argparse.BooleanOptionalAction,
        help="let a visual token weigh as much as all that it stands for (default: as the engine's method has it)",
    )
    p.add_argument(
        "--positions",
        choices=POSITIONS,
        help="original: visual tokens stand where they were in the video; consecutive: one after the other (default: "
        "as the engine's method has it)",
    )
    p.add_argument(
        "--frames",
        type=int,
        metavar="F",
        help="which of the engine's frame counts, if it has several (default: as many as suit the video)",
    )
    p.add_argument("--max-new-tokens", type=int, default=MAX_NEW_TOKENS, metavar="N", help=f"default: {MAX_NEW_TOKENS}")
    p.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    p.add_argument(
        "--top-k",
        type=int,
        default=0,
        metavar="K",
        help="with a --temperature: sample from the K likeliest tokens (default: all)",
    )
    p.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="with a --temperature: sample from the likeliest tokens that sum to P (default: all)",
    )
    p.add_argument("--seed", type=int, metavar="N", help="of the sampling (default: another each time)")
    p.add_argument("--system", metavar="TEXT", help="a system message before the question")
    p.add_argument(
        "--picture",
        metavar="FILE",
        help="draw what was kept of the video, the answer and the times: FILE.png, or FILE.mp4",
    )
    add_limits(p)
    p.add_argument("--json", action="store_true", help="print nothing but the JSON line at the end")
    return p


def add_limits(p: argparse.ArgumentParser) -> None:
    """Add a flag for each field of `Limits`."""
    for field in dataclasses.fields(Limits):
        what = field.name.removeprefix("max_")
        p.add_argument(
            _flag(field.name),
            type=float if field.name == "max_seconds" else int,
            default=field.default,
            metavar="N",
            help=f"refuse a video of more {what} than this (default: {field.default:.0f})",
        )


def limits_of(options: argparse.Namespace) -> Limits:
    """The limits that these flags set. Raises UserError for an invalid one."""
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(Limits)}
    for name, value in values.items():
        if isinstance(value, float):
            real(_flag(name), value, 0, low_open=True)
        else:
            whole(_flag(name), value, 1)
    return Limits(**values)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_request(options: argparse.Namespace) -> None:
    """Refuse requests that are invalid for any model, before one is loaded, which can take a minute."""
    if not Path(options.video).is_file():
        if "://" in options.video:
            raise VideoError(f"video {options.video!r} is an address; download it and give the path of the file")
        what = "is not a file" if options.video and Path(options.video).exists() else "does not exist"
        raise VideoError(f"video {options.video!r} {what}; give the path of a video file")
    if not all(question.strip() for question in options.questions):
        raise UserError("the question is empty; give a text, as in: python -m runtime.ask VIDEO 'What happens?'")
    for name, value in (("--max-new-tokens", options.max_new_tokens), ("--frames", options.frames)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    if options.picture is not None:
        check_picture(options.picture, "--picture")
    if options.inner_ratio is not None and options.inner_layer is None:
        raise UserError(f"--inner-ratio {options.inner_ratio} needs --inner-layer, the layer to merge before")


def inner_merge(options: argparse.Namespace) -> InnerMerge | None:
    """The merging that --inner-layer and --inner-ratio set; None: no merging."""
    if options.inner_layer is None:
        return None
    from runtime.decoder.eager import InnerMerge

    return InnerMerge(options.inner_layer, INNER_RATIO if options.inner_ratio is None else options.inner_ratio)


def show_times(screen: cli.Screen, answers: Sequence[Answer]) -> None:
    """Print the times of the stages, in a column for each answer."""
    stages: dict[str, Callable[[Timings], float]] = {
        "waiting": lambda times: times.waiting,
        "decode video": lambda times: times.decode,
        "preprocess": lambda times: times.preprocess,
        "vision engine": lambda times: times.vision,
        "prefill": lambda times: times.prefill,
        "first token (from the call)": lambda times: times.first_token,
        "per further token": lambda times: times.per_token,
        "total": lambda times: times.total,
    }
    rows = [(name, *(f"{1000 * of(answer.timings):.1f}" for answer in answers)) for name, of in stages.items()]
    further = [len(answer.tokens) > 1 for answer in answers]  # otherwise that time is undefined
    at = list(stages).index("per further token")
    rows[at] = (rows[at][0], *(cell if there else "-" for cell, there in zip(rows[at][1:], further, strict=True)))
    screen.table(("stage", *["ms"] * len(answers)), rows)
    full = answers[0].visual_tokens_full
    share = answers[0].visual_tokens / full
    counts = ", ".join(f"{len(answer.tokens)} ({answer.finish})" for answer in answers)
    screen.line(f"{answers[0].visual_tokens} of {full} visual tokens ({share:.1%}); tokens answered: {counts}")


def record(questions: Sequence[str], answers: Sequence[Answer], manifest: Manifest, backend: str) -> dict[str, object]:
    """The JSON line; several answers are a list."""
    import torch

    each = [
        {
            "answer": answer.text,
            "finish": answer.finish,
            "tokens": len(answer.tokens),
            "seconds": dataclasses.asdict(answer.timings),
        }
        for answer in answers
    ]
    several = [{"question": question} | one for question, one in zip(questions, each, strict=True)]
    return {
        **(each[0] if len(each) == 1 else {"answers": several}),
        "visual_tokens": answers[0].visual_tokens,
        "visual_tokens_full": answers[0].visual_tokens_full,
        "engine": manifest.name,
        "backend": backend,
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    cli.stop_by_signal()
    sys.exit(cli.run(main, sys.argv[1:]))
