"""Writes the language model of an engine's checkpoint alone, for a vLLM server: `python -m runtime.extract_decoder`.

The folder holds config.json of the language model, its weights under the names of its own class, the tokenizer with the
chat template, and generation_config.json with the stop tokens alone. Vision tower and projector stay in the engine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from earlytom.errors import UserError
from runtime import cli
from runtime.engine import layout
from runtime.engine.folder import newest_engine
from runtime.engine.manifest import Manifest
from runtime.files import staged

EXAMPLES = """
examples:
  python -m runtime.extract_decoder engines/NAME language-model
  python -m vllm.entrypoints.openai.api_server --model language-model --enable-prompt-embeds --port 8001
  python -m runtime.serve engines/NAME --decoder http://127.0.0.1:8001/v1

Embeddings are written, since a decoder embeds what it generates; where the output layer is tied to them they are
stored once. The exit status is 0 when the folder is there, 2 when it cannot be written, 130 after Ctrl-C.
"""
MANIFEST, WORD = "manifest.json", "extracting"


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0; every failure is raised (see `runtime.cli.run`)."""
    options = parser().parse_args(argv)
    screen = cli.Screen()
    engine, out = options.engine, options.out.absolute()
    if not (engine / MANIFEST).exists() and any(engine.glob(f"*/{MANIFEST}")):
        engine = newest_engine(engine)
    manifest = Manifest.read(engine, verify_files=False)
    if out.exists() and not options.force:
        raise UserError(f"{options.out} exists: give another folder, or --force to replace it")
    if out.exists() and not (out / "config.json").is_file():
        raise UserError(f"{options.out} is no language model, and is not replaced: give another folder")
    from runtime.checkpoint.language_model import write_language_model
    from runtime.checkpoint.precision import stored_dtype
    from runtime.engine.dtypes import DTYPES
    from runtime.engine.origin import checkpoint_of

    checkpoint = checkpoint_of(manifest, options.model)
    dtype = stored_dtype(checkpoint) if options.dtype is None else DTYPES[options.dtype]
    with staged.locked(out, WORD) as place:
        place.mkdir()
        written = write_language_model(checkpoint, place, dtype)
        staged.publish(place, out)
    tied = "tied to the output layer, stored once" if written.tied else "stored beside the output layer"
    name = str(dtype).removeprefix("torch.")
    screen.line(f"{options.out}: {written.architecture}, {written.parameters:,} parameters in {name}")
    screen.line(f"embeddings: {tied}; tokenizer and chat template: the checkpoint's; {len(written.files)} files")
    screen.line(f"load it: python -m vllm.entrypoints.openai.api_server --model {options.out} --enable-prompt-embeds")
    return 0


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    p = cli.Parser(
        prog="python -m runtime.extract_decoder",
        description="Write the language model of an engine's checkpoint as a folder that vLLM loads.",
        epilog=EXAMPLES,
    )
    p.add_argument("engine", type=Path, metavar="ENGINE", help="engine folder, or a folder of them: the newest")
    p.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    p.add_argument(
        "--model", metavar="SOURCE", help="the checkpoint it was built from, where it is now (default: as then)"
    )
    p.add_argument("--dtype", choices=layout.DTYPE_NAMES, help="of the weights (default: as they are stored)")
    p.add_argument("--force", action="store_true", help="replace a language model that is there")
    return p


if __name__ == "__main__":
    cli.stop_by_signal()
    sys.exit(cli.run(main, sys.argv[1:]))
