"""The wheel: whole, and of use outside a checkout. It is built once from the project's own files, in a folder of its
own, and unpacked; what a package manager adds to that are the scripts, which are called as it would write them."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from builder import build
from tests.processes import HANG_SECONDS
from tests.test_readme import tracked_paths

ROOT = Path(__file__).parents[1]
PACKAGES = ("builder", "earlytom", "runtime")
USER_CODE = ROOT / "tests" / "user_code.py"
# Types of other projects' libraries are theirs, and take a minute to read.
STRICT = """
[mypy]
strict = true
follow_imports = silent
[mypy-torch.*,transformers.*,numpy.*,onnx.*,onnxscript.*,onnx_ir.*,onnxruntime.*,polygraphy.*,triton.*,rich.*,av.*]
follow_imports = skip
ignore_missing_imports = true
[mypy-tokenizers.*,safetensors.*]
follow_imports = skip
"""


def project() -> dict[str, object]:
    return dict(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"])


def ours() -> list[Path]:
    """The files that a wheel is made of, from the root."""
    found = [path.relative_to(ROOT) for path in tracked_paths()]
    return [path for path in found if path.parts[0] in PACKAGES or len(path.parts) == 1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("git"):
        pytest.skip("no git, so there is no list of the project's own files")
    pytest.importorskip("setuptools")
    place = tmp_path_factory.mktemp("wheel")
    for path in ours():
        (place / "source" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, place / "source" / path)
    make = "from setuptools.build_meta import build_wheel; build_wheel('..')"
    run(sys.executable, "-c", make, cwd=place / "source")
    (made,) = place.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """A folder that stands for `site-packages`."""
    place = wheel.parent / "site-packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    return place


def run(*words: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A command that must succeed; `path`: where Python finds our packages, and nowhere else."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        env |= {"PYTHONPATH": str(path)}
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=HANG_SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_the_wheel_has_every_file_of_the_packages_and_no_other(wheel: Path) -> None:
    """The bundled model, the page, the recipes for deploying, pictures and type information among them."""
    wanted = {path.as_posix() for path in ours() if path.parts[0] in PACKAGES}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    assert {name for name in names if ".dist-info/" not in name} == wanted
    for name in ("earlytom/micro/model.safetensors", "runtime/serve/page.html", "runtime/serve/deploy/Dockerfile"):
        assert name in wanted  # negative control: the list is one
    assert {f"{package}/py.typed" for package in PACKAGES} <= names


def test_the_scripts_are_the_commands(installed: Path, tmp_path: Path) -> None:
    """Each as a package manager calls it, outside the checkout: its help names it as it was typed."""
    (names,) = installed.glob("*.dist-info/entry_points.txt")
    scripts = configparser.ConfigParser()
    scripts.read(names)
    assert dict(scripts["console_scripts"]) == project()["scripts"]
    assert {"earlytom-build", "earlytom-ask", "earlytom-serve", "earlytom-bench"} <= set(scripts["console_scripts"])
    for name, target in scripts["console_scripts"].items():
        module, function = target.split(":")
        script = tmp_path / name
        script.write_text(f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n", encoding="utf-8")
        shown = run(sys.executable, str(script), "--help", cwd=tmp_path, path=installed).stdout
        assert shown.startswith(f"usage: {name} "), shown


def test_a_script_refuses_as_its_module_does(installed: Path, tmp_path: Path) -> None:
    call = "import sys; sys.argv = ['earlytom-ask', 'nowhere.mp4', 'What?']; import runtime.scripts as s; s.ask()"
    done = subprocess.run(
        [sys.executable, "-c", call],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: video 'nowhere.mp4' does not exist; give the path of a video file\n"


def test_the_bundled_model_is_found_where_it_is_installed(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the engine of the default build has the key that it has in the checkout."""
    words = ["--ratio", "0.3", "--fp16", "--backend", "onnx", "--dry-run", "--json"]
    asked = "import sys; from builder import build; build.main(sys.argv[1:]); import earlytom, runtime, builder; "
    asked += "print(earlytom.__file__, runtime.__file__, builder.__file__)"
    there, where = run(sys.executable, "-c", asked, *words, cwd=tmp_path, path=installed).stdout.splitlines()
    monkeypatch.chdir(tmp_path)
    assert build.main(words) == 0
    assert there == capsys.readouterr().out.strip()
    assert str(ROOT) not in where
    assert where.count(str(installed)) == 3


def check_types(code: str, place: Path, installed: Path) -> subprocess.CompletedProcess[str]:
    (place / "user_code.py").write_text(code, encoding="utf-8")
    (place / "mypy.ini").write_text(STRICT, encoding="utf-8")
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--config-file",
            "mypy.ini",
            "--cache-dir",
            str(installed / ".mypy"),
            "user_code.py",
        ],
        cwd=place,
        env=os.environ | {"MYPYPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )


def test_code_of_users_passes_mypy_strict(installed: Path, tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    done = check_types(USER_CODE.read_text("utf-8"), tmp_path, installed)
    assert done.returncode == 0, done.stdout


def test_a_mistake_of_users_is_noticed(installed: Path, tmp_path: Path) -> None:
    """Negative control: the names have types, and are no Any."""
    pytest.importorskip("mypy")
    wrong = USER_CODE.read_text("utf-8").replace("return answer.text, times.first_token", "return answer, times.text")
    done = check_types(wrong, tmp_path, installed)
    assert done.returncode == 1
    assert '"Timings" has no attribute "text"' in done.stdout
    assert 'got "tuple[Answer, Any]"' in done.stdout


def test_the_newest_change_is_the_version() -> None:
    versions = re.findall(r"^## (\S+) \(\d{4}-\d\d-\d\d\)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert versions[0] == project()["version"]
    assert versions == sorted(versions, key=lambda text: tuple(map(int, text.split("."))), reverse=True)
