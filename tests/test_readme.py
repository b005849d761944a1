"""What the README files, the Makefile and CI tell people to type works, and no tracked file names a machine."""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from builder import build, inspect, kernels, verify
from builder.doctor import __main__ as doctor
from builder.evaluation import arguments as evaluation_arguments
from builder.micro import train
from builder.plugins import __main__ as plugins
from builder.settings.parser import parser as build_parser
from earlytom import UserError
from earlytom.config import PRESETS
from runtime import ask, cli, clip, extract_decoder
from runtime.measure import arguments as bench_arguments
from runtime.serve import __main__ as serve
from tests import fuzz_video, soak_pipeline, vllm_check
from tests.processes import HANG_SECONDS

ROOT = Path(__file__).parents[1]
NAMES = (
    "README.md",
    "builder/README.md",
    "builder/evaluation/compared.md",
    "earlytom/README.md",
    "earlytom/families/README.md",
    "earlytom/methods/README.md",
    "engines/README.md",
    "runtime/README.md",
)
READMES = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
README = "\n".join(READMES.values())  # what people are told, wherever it stands
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
FOREIGN = {  # flags of others' commands
    "--enable-prompt-embeds": "vLLM's",
    "--build-arg": "docker build's",
    "--shell": "shtab's",
    "--prog": "shtab's",
    "--prefix": "shtab's",
}

Words = list[str]


def blocks(language: str, text: str = README) -> list[str]:
    return [body for found, body in FENCE.findall(text) if found == language]


def commands(text: str = README) -> list[Words]:
    """Every command of the bash blocks, split as the shell would: continued lines joined, comments left out."""
    lines = "\n".join(blocks("bash", text)).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "builder.build": build_parser,
    "builder.doctor": doctor.parser,
    "builder.evaluate": evaluation_arguments.parser,
    "builder.inspect": inspect.parser,
    "builder.kernels": kernels.parser,
    "builder.plugins": plugins.parser,
    "builder.verify": verify.parser,
    "builder.micro.train": train.parser,
    "runtime.ask": ask.parser,
    "runtime.bench": bench_arguments.parser,
    "runtime.clip": clip.parser,
    "runtime.extract_decoder": extract_decoder.parser,
    "runtime.serve": serve.parser,
    "tests.fuzz_video": fuzz_video.parser,
    "tests.soak_pipeline": soak_pipeline.parser,
    "tests.vllm_check": vllm_check.parser,
}


def parse(words: Words) -> argparse.Namespace:
    """The arguments of `python -m MODULE ...` by that module's own parser.

    Raises:
        UserError, SystemExit: it does not take them.
        KeyError: no command of ours.
    """
    at = words.index("-m")
    return PARSERS[words[at + 1]]().parse_args(words[at + 2 :])


def targets(text: str = MAKEFILE) -> set[str]:
    """The targets of a Makefile that are names to type."""
    return {name for line in re.findall(r"^([\w -]+):(?!=)", text, re.MULTILINE) for name in line.split()}


def check(words: Words) -> None:
    """Refuse a command that would not work."""
    if words[0] == "make":
        assert len(words) > 1, words
        assert set(words[1:]) <= targets(), words
    elif words[0] == "pip":
        for extra in re.findall(r"\.\[([^]]+)\]", " ".join(words)):
            assert set(extra.split(",")) <= extras(), words
    elif words[:3] == ["python", "-m", "shtab"]:
        module, _, name = words[words.index(">") - 1].rpartition(".")
        assert getattr(importlib.import_module(module), name) in PARSERS.values(), words
    else:
        assert words[:2] == ["python", "-m"], words
        parse(words)


def extras() -> set[str]:
    return set(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"])


def flags() -> set[str]:
    """Every long option of our commands."""
    return {name for parser in PARSERS.values() for action in parser()._actions for name in action.option_strings}


# Commands


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_of_the_readme_would_work(words: Words) -> None:
    check(words)


def test_the_readme_has_the_commands_that_matter() -> None:
    """Negative control of the test above: it has found them."""
    found = [" ".join(words) for words in commands()]
    assert {"make demo", "make test"} <= set(found)
    for command in ("python -m builder.build --model llava-hf/", "python -m runtime.ask ", "pip install -e .["):
        assert any(line.startswith(command) for line in found), command


@pytest.mark.parametrize(
    "line",
    [
        "make nonsense",
        "python -m builder.build --ratio",
        "python -m builder.build --fp16 \\\n    --nonsense",
        "python -m builder.build --fp16 --bf16",
        "python -m runtime.ask clip.mp4",
        "python -m runtime.serve",
        'pip install -e ".[gpu]"',
        "curl example.org",
    ],
)
def test_a_command_that_would_not_work_is_noticed(line: str) -> None:
    """Negative control."""
    (words,) = commands(f"```bash\n{line}\n```")
    with pytest.raises((AssertionError, UserError, SystemExit, KeyError)):
        check(words)


def dry_run() -> Words:
    (words,) = (words for words in commands(READMES["README.md"]) if "--dry-run" in words)
    return words[3:]


def test_the_dry_run_of_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(build.main, dry_run()) == 0
    printed = capsys.readouterr().out
    assert "nothing was built" in printed
    record = json.loads(printed.splitlines()[-1])
    # The figures of the README's text are those of this command.
    assert f"{record['tokens_full']:,} visual tokens" in README
    assert " -> ".join(map(str, record["frames_per_stage"])) in README
    assert list(tmp_path.iterdir()) == []


def test_every_flag_of_the_readme_exists() -> None:
    named = set(FLAG.findall(README))
    assert FOREIGN.keys() <= named  # none outlives its sentence
    assert named <= flags() | FOREIGN.keys(), named - flags()
    assert len(named) > 5  # negative control: it has found them
    assert "--nonsense" not in flags()


def test_every_preset_of_the_readme_exists() -> None:
    named = re.findall(r"--preset (\w+)|preset\(\"(\w+)\"", README)
    assert named
    assert {first or second for first, second in named} <= set(PRESETS)


# Code


@pytest.mark.parametrize("code", blocks("python"))
def test_the_imports_of_the_code_exist(code: str) -> None:
    tree = ast.parse(code)
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imports or code in continued()
    exec(compile(ast.Module(imports, []), "README.md", "exec"), {})


@pytest.mark.usefixtures("one_thread")
def test_the_runtime_s_code_runs(engine: Path, drawn_clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = (block for block in blocks("python") if "Pipeline.load" in block)
    for word, real in (("engines/NAME", engine), ("clip.mp4", drawn_clip)):
        assert f'"{word}"' in code
        code = code.replace(f'"{word}"', repr(str(real)))
    values: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), values)
    printed = capsys.readouterr().out
    assert re.search(r"^first token after \d+ ms$", printed, re.MULTILINE)
    *_, last = printed.splitlines()
    answer = values["answer"]
    assert printed.endswith(f"{answer.text} {answer.visual_tokens}\n")  # type: ignore[attr-defined]
    assert last.endswith(" 126")


def continued() -> list[str]:
    """Blocks that go on with the pipeline of the first one."""
    return [block for block in blocks("python") if "import" not in block and "pipeline." in block]


@pytest.mark.usefixtures("one_thread")
def test_the_code_that_goes_on_with_a_pipeline_runs(
    build_engine: Callable[..., Path], drawn_clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from runtime.pipeline import Pipeline
    from runtime.video import load_clip

    assert len(continued()) == 3
    frames = load_clip(drawn_clip, 30, (72, 72)).frames
    with Pipeline.load(
        build_engine(*["--frames", "8", "--chunk", "2", "--ratio", "0.3", "--fp32", "--no-verify"])
    ) as pipeline:
        answers = [pipeline.ask(video, "What happens?").text for video in (drawn_clip, frames)]
        for code in continued():
            code = code.replace('"clip.mp4"', repr(str(drawn_clip))).replace("deadline=2.0", "deadline=100.0")
            code = code.replace("total=900", "total=30")
            exec(compile(code, "README.md", "exec"), {"pipeline": pipeline, "source": frames})
            printed = capsys.readouterr().out
            assert printed
            assert "submit" not in code or printed == answers[0]
            assert "watch" not in code or printed.startswith(answers[0])
            assert "open_stream" not in code or float(printed.split()[-1]) > 0


@pytest.mark.usefixtures("one_thread")
def test_the_method_s_code_runs() -> None:
    """With the bundled model and settings for its depth, in the place of a real one and a released preset."""
    import torch

    from earlytom import EarlyTomConfig
    from runtime.checkpoint import load_model

    (code,) = (block for block in blocks("python") if "apply_earlytom" in block)
    preset = 'EarlyTomConfig.preset("videomme", 0.20)'
    assert preset in code
    model = load_model()
    ids = torch.full((1, 2 * 25 + 1), model.config.video_token_id)
    inputs = {"input_ids": ids, "pixel_values_videos": torch.rand(1, 2, 3, 72, 72), "max_new_tokens": 1}
    values = {"model": model, "inputs": inputs, "config": EarlyTomConfig(merge_layers=(2, 4))}
    exec(compile(code.replace(preset, "config"), "README.md", "exec"), values)
    assert "generate" not in vars(model)  # as before


# Files


def links(text: str) -> set[tuple[str, str]]:
    """Links to files, and to headings in them, as (path, heading)."""
    found = re.findall(r"\[[^]]*\]\(([^)\s]+)\)", text)
    return {(link.partition("#")[0], link.partition("#")[2]) for link in found if not re.match(r"https?://", link)}


def headings(text: str) -> set[str]:
    """What a link to a heading is called."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    for link, anchor in links(READMES[name]):
        target = (ROOT / name).parent / link if link else ROOT / name
        assert target.exists(), link
        assert not anchor or anchor in headings(target.read_text(encoding="utf-8")), f"{link}#{anchor}"


def test_links_are_found() -> None:
    """Negative control."""
    assert {("engines/README.md", ""), ("LICENSE", "")} <= links(READMES["README.md"])
    assert links("[a](b.md#c) [d](https://example.org) [e](#f)") == {("b.md", "c"), ("", "f")}
    assert headings("# A `b` c\n## D, e-f\n") == {"a-b-c", "d-e-f"}


def test_the_layout_is_complete() -> None:
    layout = READMES["README.md"].split("## Layout")[1]
    for folder in ("earlytom", "runtime", "builder", "engines", "tests"):
        assert f"`{folder}/`" in layout
        assert (ROOT / folder).is_dir()


def test_nothing_is_left_to_be_filled_in() -> None:
    assert re.findall(r"^[A-Z]{4,}$|\bTODO\b|\bTBD\b|\bXXX\b|\bFIXME\b", README, re.MULTILINE) == []


# Makefile and CI


def dry_make(target: str) -> list[Words]:
    """What `make TARGET` would run."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    done = subprocess.run(
        ["make", "--always-make", "--dry-run", "--no-print-directory", target],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={
            name: value for name, value in os.environ.items() if name not in ("VENV", "PYTHON", "MAKEFLAGS", "MFLAGS")
        },
        timeout=HANG_SECONDS,
    )
    return [shlex.split(line) for line in done.stdout.replace("\\\n", "").splitlines()]


def test_make_demo_builds_draws_and_asks() -> None:
    ours = [words for words in dry_make("demo") if "-m" in words and words[words.index("-m") + 1] in PARSERS]
    assert [words[words.index("-m") + 1] for words in ours] == ["builder.build", "runtime.clip", "runtime.ask"]
    built, drawn, asked = map(parse, ours)
    assert " ".join(ours[0]).endswith("python -m builder.build --ratio 0.3 --fp16")
    assert (built.ratio, built.dtype, built.model) == (0.3, "fp16", None)
    assert drawn.out == asked.video
    assert asked.engine is None  # the newest


def test_make_serve_builds_and_serves() -> None:
    ours = [words for words in dry_make("serve") if "-m" in words and words[words.index("-m") + 1] in PARSERS]
    assert [words[words.index("-m") + 1] for words in ours] == ["builder.build", "runtime.serve"]
    built, served = map(parse, ours)
    assert (built.ratio, built.dtype, built.model) == (0.3, "fp16", None)
    assert served.engine == built.out


def test_make_test_checks_style_types_and_tests() -> None:
    lines = [" ".join(words) for words in dry_make("test")]
    for what in ("ruff check .", "ruff format --check .", "mypy", "-m pytest"):
        assert any(what in line for line in lines), what


@pytest.mark.parametrize("target", ["demo", "serve", "test"])
def test_make_sets_everything_up(target: str) -> None:
    lines = [" ".join(words) for words in dry_make(target)]
    (install,) = (line for line in lines if "--editable" in line)
    assert set(re.search(r"\.\[([\w,-]+)\]", install)[1].split(",")) <= extras()  # type: ignore[index]
    constraints = re.search(r"--constraint (\S+)", install)
    assert constraints is not None
    assert (ROOT / constraints[1]).is_file()
    assert any(re.search(r"-m venv \.venv$", line) for line in lines[: lines.index(install)])


def test_ci_runs_the_readme_s_two_commands() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    made = re.findall(r"^make (\w+)$", script.read_text(encoding="utf-8"), re.MULTILINE)
    assert made == ["demo", "test"]
    assert ["make", "demo"] in commands()
    assert ["make", "test"] in commands()
    assert set(made) <= targets()


# No machine in any file

MACHINE = re.compile(
    r"(?<![\w.~-])/(?:work|opt|root|home/\w+)/"  # a path that exists on one machine only
    r"|--(?:extra-)?index-url|\bindex-url\s*="  # where one machine finds its packages
    r"|https?://[^\s/]*/(?:[\w./+-]*/)?\+?simple\b"
    r"|\b(?:PIP|UV)_(?:EXTRA_)?INDEX"
)


def tracked_paths() -> list[Path]:
    """The files under version control and those about to be."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=HANG_SECONDS) if shutil.which("git") else None
    if done is None or done.returncode:
        pytest.skip("no git, or no checkout that it trusts, so there is no list of the project's own files")
    paths = [ROOT / os.fsdecode(name) for name in done.stdout.split(b"\0") if name]
    return [path for path in paths if path.is_file()]


def tracked() -> list[Path]:
    """Those of them that are text."""
    return [path for path in tracked_paths() if b"\0" not in path.read_bytes()]


def test_no_file_names_a_machine() -> None:
    found = []
    for path in tracked():
        if path == Path(__file__):
            continue  # it spells them out
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if MACHINE.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert found == []


def test_the_files_are_found() -> None:
    """Negative control of the test above."""
    names = {str(path.relative_to(ROOT)) for path in tracked()}
    assert {"README.md", "Makefile", "runtime/pipeline.py", ".ci/run"} <= names
    assert not any(name.startswith(".venv") for name in names)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("see /work/shared/design", True),
        ('path = "/opt/models/x"', True),
        ("/root/.cache", True),
        ("/home/somebody/clips", True),
        ("pip install --extra-index-url https://example.org/a", True),
        ("pip install --index-url=x", True),
        ("index-url = https://example.org", True),
        ("https://packages.example.org/root/pypi/+simple/", True),
        ("https://example.org/simple", True),
        ("PIP_INDEX_URL=x", True),
        ("~/work/clips", False),
        ("a framework/root/x", False),
        ("https://example.org/work/x", False),
        ("/models/llava-onevision", False),
        ("a simple index", False),
    ],
)
def test_a_machine_is_recognised(line: str, found: bool) -> None:
    """Negative control."""
    assert bool(MACHINE.search(line)) == found
