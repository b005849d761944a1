"""The files for continuous integration: what their readers take, and commands that there are.

The validator is no dependency of the project: its tests are skipped where it is not found.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from builder.doctor import __main__ as doctor
from builder.settings.parser import parser as build_parser
from earlytom.errors import UserError
from tests.processes import HANG_SECONDS

yaml = pytest.importorskip("yaml", reason="reads YAML")
CI = Path(str(files("builder").joinpath("ci")))
SCHEMAS = {"github.yml": "vendor.github-workflows", "gitlab.yml": "vendor.gitlab-ci"}
README = (CI.parent / "README.md").read_text("utf-8")


def loaded(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CI / name).read_text("utf-8"))
    return found


def commands(name: str) -> list[str]:
    """Every line that is run, in order."""
    job = loaded(name).get("engine") or loaded(name)["jobs"]["engine"]
    if "steps" in job:
        return [step["run"] for step in job["steps"] if "run" in step]
    return [*job["before_script"], *job["script"]]


def validated(path: Path, schema: str) -> subprocess.CompletedProcess[str]:
    tool = shutil.which("check-jsonschema", path=str(Path(sys.executable).parent)) or shutil.which("check-jsonschema")
    if tool is None:
        pytest.skip("checks with check-jsonschema, which is not installed")
    words = [tool, "--builtin-schema", schema, str(path)]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=HANG_SECONDS)


@pytest.mark.parametrize("name", SCHEMAS)
def test_its_reader_takes_it(name: str) -> None:
    done = validated(CI / name, SCHEMAS[name])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "word", "wrong"), [("github.yml", "runs-on:", "runs-at:"), ("gitlab.yml", "artifacts:", "artifact:")]
)
def test_a_file_that_its_reader_would_refuse_is_noticed(name: str, word: str, wrong: str, tmp_path: Path) -> None:
    """Negative control."""
    text = (CI / name).read_text("utf-8")
    assert word in text
    (tmp_path / name).write_text(text.replace(word, wrong), encoding="utf-8")
    assert validated(tmp_path / name, SCHEMAS[name]).returncode != 0


@pytest.mark.parametrize("name", SCHEMAS)
def test_its_steps_are_those_of_the_recipe(name: str) -> None:
    """Install, look, build with the gate, compare; each would work."""
    installed, looked, built, compared = map(shlex.split, commands(name))
    assert installed == ["pip", "install", "${EARLYTOM:-.}"]
    assert looked[:3] == ["python", "-m", "builder.doctor"]
    doctor.parser().parse_args(looked[3:])
    assert built[:3] == ["python", "-m", "builder.build"]
    options = build_parser().parse_args(built[3:])
    assert (options.verify, str(options.out)) == (True, "built")
    assert compared == ["sh", "reference/compare.sh", "built/*/vision.onnx"]
    recipe = re.findall(r"^- run: (.*)$", README, re.MULTILINE)
    assert shlex.join(compared).replace("'", "") in recipe
    assert any(set(shlex.split(line)) <= set(built) for line in recipe)


def test_a_step_with_a_flag_that_there_is_not_is_noticed() -> None:
    """Negative control."""
    with pytest.raises(UserError, match="nonsense"):
        build_parser().parse_args(["--nonsense"])


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_report_is_kept_of_a_build_that_fails(name: str) -> None:
    job = loaded(name).get("engine") or loaded(name)["jobs"]["engine"]
    if "steps" in job:
        (kept,) = (step for step in job["steps"] if "upload-artifact" in step.get("uses", ""))
        assert (kept["if"], kept["with"]["path"]) == ("always()", "built/*/report.*")
    else:
        assert job["artifacts"]["when"] == "always"
