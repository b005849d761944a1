"""Ask a question about a video: `python -m runtime.ask VIDEO "QUESTION"`.

Streams the answer, then shows where the time went.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from earlytom.errors import UserError
from runtime import cli
from runtime.backends import BACKENDS
from runtime.decoder import InnerMerge, Sampling
from runtime.errors import EngineError, VideoError
from runtime.manifest import Manifest
from runtime.pipeline import DECODERS, MAX_NEW_TOKENS, Answer, Pipeline

ENGINES = Path("engines")
EXAMPLES = """
examples:
  python -m runtime.ask clip.mp4 "What colour is the ball?"
      with the newest engine under engines/
  python -m runtime.ask --engine engines/NAME --model /models/llava-onevision clip.mp4 "What happens?" --json

The exit status is 0 after an answer, 2 when something asked for cannot be done, 130 after Ctrl-C.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0; every failure is raised (see `runtime.cli.run`)."""
    options = parser().parse_args(argv)
    screen = cli.Screen(json_only=options.json)
    check_request(options)
    sampling = Sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed)
    folder = options.engine or newest_engine(ENGINES)
    if options.decoder != "torch":
        screen.line("note: a decoder that was not used before is compiled first, which takes minutes")
    with Pipeline.load(
        folder,
        options.model,
        options.backend,
        device=options.device,
        decoder=options.decoder,
        inner=None if options.inner_layer is None else InnerMerge(options.inner_layer, options.inner_ratio),
    ) as pipeline:
        manifest = pipeline.manifest
        screen.line(f"engine: {manifest.name} ({pipeline.vision.name})")
        if not manifest.model.trained:
            screen.line(
                "note: this model's weights are not trained, so the answer is nonsense; counts and times are real"
            )
        answer: Answer | None = None
        for delta in pipeline.stream(
            options.video,
            options.question,
            max_new_tokens=options.max_new_tokens,
            sampling=sampling,
            system=options.system,
        ):
            screen.write(delta.text)
            answer = delta.answer
        assert answer is not None  # the last delta has it
        screen.line()
        show_times(screen, answer, manifest)
        screen.result(record(answer, manifest, pipeline.vision.name))
    return 0


def parser() -> argparse.ArgumentParser:
    """The options, with a help text that teaches."""
    p = cli.Parser(
        prog="python -m runtime.ask",
        description="Ask a question about a video, with an engine that python -m builder.build made.",
        epilog=EXAMPLES,
    )
    p.add_argument("video", type=Path, metavar="VIDEO", help="any video file that FFmpeg reads")
    p.add_argument("question", metavar="QUESTION", help="what to ask")
    p.add_argument("--engine", type=Path, metavar="DIR", help="engine folder (default: the newest under engines/)")
    p.add_argument("--model", metavar="SOURCE", help="the checkpoint it was built from (default: the one it names)")
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
        "--decoder",
        choices=DECODERS,
        default="torch",
        help="torch-tensorrt compiles the language model for the GPU it runs on (default: torch)",
    )
    p.add_argument(
        "--inner-layer",
        type=int,
        metavar="K",
        help="merge visual tokens inside the language model before layer K (the method's: 18; default: off)",
    )
    p.add_argument(
        "--inner-ratio", type=float, default=0.5, metavar="R", help="share that is folded away there (default: 0.5)"
    )
    p.add_argument("--max-new-tokens", type=int, default=MAX_NEW_TOKENS, metavar="N", help=f"default: {MAX_NEW_TOKENS}")
    p.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    p.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="sample from the K likeliest tokens (default: all)"
    )
    p.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest tokens that sum to P"
    )
    p.add_argument("--seed", type=int, metavar="N", help="of the sampling (default: another each time)")
    p.add_argument("--system", metavar="TEXT", help="a system message before the question")
    p.add_argument("--json", action="store_true", help="print nothing but the JSON line at the end")
    return p


def check_request(options: argparse.Namespace) -> None:
    """Refuse now what needs no model to be refused: loading one can take a minute.

    Raises:
        UserError: no such video, no question, no tokens.
    """
    if not options.video.is_file():
        what = "is not a file" if options.video.exists() else "does not exist"
        raise VideoError(f"video {str(options.video)!r} {what}; give the path of a video file")
    if not options.question.strip():
        raise UserError("the question is empty; give a text, as in: python -m runtime.ask VIDEO 'What happens?'")
    if options.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens must be at least 1, got {options.max_new_tokens}")


def newest_engine(root: Path) -> Path:
    """The engine folder under `root` that was built last, of those whose manifest can be read.

    Raises:
        EngineError: there is none.
    """
    folders = [path.parent for path in root.glob("*/manifest.json") if not path.parent.name.startswith(".")]
    if not folders:
        raise EngineError(
            f"no engine under {root}/: build one with python -m builder.build --ratio 0.3 --fp16, or name its folder "
            "with --engine"
        )
    created: dict[Path, str] = {}
    unreadable: list[EngineError] = []
    for folder in sorted(folders):
        try:
            created[folder] = Manifest.read(folder, verify_files=False).created
        except EngineError as error:
            unreadable.append(error)
    if not created:
        raise unreadable[0]
    return max(created, key=created.__getitem__)


def show_times(screen: cli.Screen, answer: Answer, manifest: Manifest) -> None:
    """Where the time went."""
    times = answer.timings
    rows = [
        ("decode video", times.decode),
        ("preprocess", times.preprocess),
        ("vision engine", times.vision),
        ("prefill", times.prefill),
        ("first token (from the call)", times.first_token),
        ("per further token", times.per_token),
        ("total", times.total),
    ]
    screen.table(("stage", "ms"), [(stage, f"{1000 * seconds:.1f}") for stage, seconds in rows])
    share = answer.visual_tokens / manifest.tokens_full
    screen.line(
        f"{answer.visual_tokens} of {manifest.tokens_full} visual tokens ({share:.1%}), "
        f"{len(answer.tokens)} tokens answered ({answer.finish})"
    )


def record(answer: Answer, manifest: Manifest, backend: str) -> dict[str, object]:
    """The JSON line."""
    return {
        "answer": answer.text,
        "finish": answer.finish,
        "tokens": len(answer.tokens),
        "visual_tokens": answer.visual_tokens,
        "visual_tokens_full": manifest.tokens_full,
        "seconds": dataclasses.asdict(answer.timings),
        "engine": manifest.name,
        "backend": backend,
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv[1:]))
