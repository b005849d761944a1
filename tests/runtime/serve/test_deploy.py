"""The deployment files, by the validators of those who read them, and against what the server is.

Nothing here builds or runs an image. The validators are no dependencies of the project: a test that needs one is
skipped where it is not found, beside this Python or on the path.
"""

from __future__ import annotations

import importlib
import ipaddress
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from runtime.errors import VideoError
from runtime.serve.fetch import is_public
from runtime.serve.settings import flags, settings_from

DEPLOY = Path(str(files("runtime.serve").joinpath("deploy")))
yaml = pytest.importorskip("yaml", reason="reads YAML")


def checked(tool: str, *words: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    found = shutil.which(tool, path=str(Path(sys.executable).parent)) or shutil.which(tool)
    if found is None:
        pytest.skip(f"checks with {tool}, which is not installed")
    return subprocess.run([found, *words], input=text, capture_output=True, text=True, check=False)


def documents(name: str) -> dict[str, Any]:
    """By kind."""
    return {one["kind"]: one for one in yaml.safe_load_all(DEPLOY.joinpath(name).read_text("utf-8"))}


def server() -> Any:
    return documents("kubernetes.yaml")["Deployment"]["spec"]["template"]["spec"]


def compose() -> Any:
    return yaml.safe_load(DEPLOY.joinpath("compose.yaml").read_text("utf-8"))


# By their validators


def test_the_dockerfile_by_hadolint() -> None:
    done = checked("hadolint", "--no-color", str(DEPLOY / "Dockerfile"))
    assert done.returncode == 0, done.stdout


def test_hadolint_finds_a_made_up_defect() -> None:
    """Negative control."""
    text = DEPLOY.joinpath("Dockerfile").read_text("utf-8").replace("python:3.11-slim-bookworm", "python")
    assert checked("hadolint", "--no-color", "-", text=text).returncode != 0


def test_compose_by_its_schema(tmp_path: Path) -> None:
    words = ("--builtin-schema", "vendor.compose-spec")
    done = checked("check-jsonschema", *words, str(DEPLOY / "compose.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr
    broken = tmp_path / "broken.yaml"
    broken.write_text(
        DEPLOY.joinpath("compose.yaml").read_text("utf-8").replace("read_only: true\n", "readonly: true\n")
    )
    assert checked("check-jsonschema", *words, str(broken)).returncode != 0


def test_kubernetes_by_its_schema(tmp_path: Path) -> None:
    done = checked("kubernetes-validate", "--strict", str(DEPLOY / "kubernetes.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr
    broken = tmp_path / "broken.yaml"
    text = DEPLOY.joinpath("kubernetes.yaml").read_text("utf-8").replace("readinessProbe:", "readyProbe:")
    broken.write_text(text)
    assert checked("kubernetes-validate", "--strict", str(broken)).returncode != 0


# Against what the server is


def test_nothing_runs_as_root_or_writes_but_to_its_own() -> None:
    dockerfile = DEPLOY.joinpath("Dockerfile").read_text("utf-8")
    assert "\nUSER 10001:10001\n" in dockerfile
    assert dockerfile.rindex("USER") > dockerfile.rindex("RUN")
    (container,), pod = server()["containers"], server()["securityContext"]
    own = container["securityContext"]
    assert (pod["runAsNonRoot"], pod["runAsUser"], pod["seccompProfile"]) == (True, 10001, {"type": "RuntimeDefault"})
    assert (own["readOnlyRootFilesystem"], own["allowPrivilegeEscalation"]) == (True, False)
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert server()["automountServiceAccountToken"] is False
    assert {one["mountPath"] for one in container["volumeMounts"] if not one.get("readOnly")} == {"/tmp"}
    for service in compose()["services"].values():
        assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert compose()["services"]["server"]["tmpfs"][0].startswith("/tmp:")


def test_probes_ask_what_they_are_for() -> None:
    (container,) = server()["containers"]
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert container["livenessProbe"]["httpGet"]["path"] == container["startupProbe"]["httpGet"]["path"] == "/health"
    assert [port["name"] for port in container["ports"]] == ["http"]


def test_answers_in_progress_have_the_time_to_end() -> None:
    (container,) = server()["containers"]
    deadline = float(container["args"][container["args"].index("--deadline") + 1])
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pause > container["readinessProbe"]["periodSeconds"] * container["readinessProbe"].get("failureThreshold", 3)
    assert server()["terminationGracePeriodSeconds"] > pause + deadline
    service = compose()["services"]["server"]
    assert float(service["stop_grace_period"].removesuffix("s")) > float(service["command"][-1]) == deadline


def test_what_is_used_of_memory_is_within_its_limit() -> None:
    (container,) = server()["containers"]
    (tmp,) = (one["emptyDir"] for one in server()["volumes"] if one["name"] == "tmp")
    gigabytes = [
        int(size.removesuffix("Gi")) for size in (tmp["sizeLimit"], container["resources"]["limits"]["memory"])
    ]
    assert gigabytes[0] * 4 < gigabytes[1]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_the_network_lets_nothing_private_out() -> None:
    policy = documents("kubernetes.yaml")["NetworkPolicy"]["spec"]
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    (open_block,) = (to["ipBlock"] for rule in policy["egress"] for to in rule["to"] if "ipBlock" in to)
    closed = [ipaddress.ip_network(one) for one in open_block["except"]]
    for address in ("10.1.2.3", "172.20.0.1", "192.168.0.9", "169.254.169.254", "100.100.100.200", "127.0.0.1"):
        assert any(ipaddress.ip_address(address) in network for network in closed), address
    for network in closed:  # and nothing is closed that the server would fetch from
        assert not is_public(network[0])
        assert not is_public(network[-1])
    ports = {port["port"] for rule in policy["egress"] for port in rule["ports"]}
    assert ports == {53, 80, 443}


def test_selectors_meet_their_labels() -> None:
    found = documents("kubernetes.yaml")
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert found["Service"]["spec"]["selector"] == labels
    for selector in (
        found["Deployment"]["spec"]["selector"],
        found["PodDisruptionBudget"]["spec"]["selector"],
        found["NetworkPolicy"]["spec"]["podSelector"],
    ):
        assert selector == {"matchLabels": labels}


def test_prometheus_scrapes_the_server() -> None:
    (job,) = yaml.safe_load(DEPLOY.joinpath("prometheus.yml").read_text("utf-8"))["scrape_configs"]
    assert job["metrics_path"] == "/metrics"
    (target,) = job["static_configs"][0]["targets"]
    assert target == "server:8000"
    assert target.partition(":")[0] in compose()["services"]
    annotations = documents("kubernetes.yaml")["Deployment"]["spec"]["template"]["metadata"]["annotations"]
    assert annotations == {
        "prometheus.io/scrape": "true",
        "prometheus.io/port": "8000",
        "prometheus.io/path": "/metrics",
    }


def test_flags_are_those_of_the_server() -> None:
    settings = pytest.importorskip("runtime.serve.settings", reason="compares with the server's flags")
    known = {settings.option(name) for name in settings.flags()}
    (container,) = server()["containers"]
    dockerfile = DEPLOY.joinpath("Dockerfile").read_text("utf-8")
    entry = json.loads(dockerfile[dockerfile.rindex("ENTRYPOINT") + len("ENTRYPOINT") :])
    for words in (entry[3:], container["args"], compose()["services"]["server"]["command"]):
        used = {word for word in words if word.startswith("--")}
        assert used
        assert used <= known


def test_all_of_it_is_in_the_package() -> None:
    assert {file.name for file in DEPLOY.iterdir()} >= {
        "Dockerfile",
        "compose.yaml",
        "kubernetes.yaml",
        "prometheus.yml",
        "rayservice.yaml",
        "serve_config.yaml",
    }


# A cluster by Ray


# What a configuration of Ray Serve may say, as far as it is said here: Ray's schema takes misspelt names.
RAY_NAMES = {"proxy_location", "http_options", "applications"}
HTTP_NAMES = {"host", "port", "request_timeout_s", "keep_alive_timeout_s"}
APPLICATION_NAMES = {"name", "route_prefix", "import_path", "args"}


def serve_config() -> Any:
    return yaml.safe_load(DEPLOY.joinpath("serve_config.yaml").read_text("utf-8"))


def misspelt(config: Any) -> set[str]:
    """Names that nobody would read."""
    (app,) = config["applications"]
    found = (set(config) - RAY_NAMES) | (set(config["http_options"]) - HTTP_NAMES) | (set(app) - APPLICATION_NAMES)
    return found | (set(app["args"]) - {"engine", "fronts", *flags()})


def test_ray_s_configuration_is_spelt_right_and_its_settings_are_the_server_s() -> None:
    config = serve_config()
    assert misspelt(config) == set()
    (app,) = config["applications"]
    given = {name: value for name, value in app["args"].items() if name != "fronts"}
    settings = settings_from(given | {"ray": True})
    assert config["http_options"]["request_timeout_s"] > settings.deadline
    assert settings.max_replicas is not None
    assert settings.max_replicas > settings.replicas
    module, _, name = app["import_path"].partition(":")
    source = DEPLOY.parent.joinpath(*module.split(".")[2:]).with_suffix(".py").read_text("utf-8")
    assert f"\ndef {name}(" in source


def test_a_misspelt_name_is_found() -> None:
    """Negative control."""
    for change in ({"aplications": []}, {"http_options": {"hosts": "x"}}):
        assert misspelt(serve_config() | change)
    config = serve_config()
    config["applications"][0]["args"]["max_replica"] = 3
    assert misspelt(config) == {"max_replica"}


def test_kuberay_s_file_has_the_same_configuration_and_what_it_mounts() -> None:
    service = documents("rayservice.yaml")["RayService"]["spec"]
    assert yaml.safe_load(service["serveConfigV2"]) == serve_config()
    (app,) = serve_config()["applications"]
    cluster = service["rayClusterConfig"]
    (workers,) = cluster["workerGroupSpecs"]
    for group in (cluster["headGroupSpec"], workers):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        mounts = {one["mountPath"] for one in container["volumeMounts"]}
        for name in ("engine", "model", "api_key_file"):
            assert any(app["args"][name].startswith(mount) for mount in mounts), name
        assert {one["name"] for one in container["volumeMounts"]} == {one["name"] for one in pod["volumes"]}
    assert workers["template"]["spec"]["terminationGracePeriodSeconds"] > app["args"]["deadline"]
    assert workers["maxReplicas"] >= app["args"]["max_replicas"]


# Triton's recipe


TRITON = DEPLOY / "triton" / "earlytom"


def test_tritons_configuration_is_one() -> None:
    config_file = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="parses it as tritonclient does")
    from google.protobuf import text_format

    config = text_format.Parse(TRITON.joinpath("config.pbtxt").read_text("utf-8"), config_file.ModelConfig())
    assert (config.name, config.backend, config.model_transaction_policy.decoupled) == (TRITON.name, "python", True)
    assert [one.name for one in config.input] == ["VIDEO", "QUESTION", "MAX_TOKENS"]
    assert [one.optional for one in config.input] == [False, False, True]
    with pytest.raises(text_format.ParseError):  # negative control
        text_format.Parse('backends: "python"', config_file.ModelConfig())


class Backend:
    """What Triton hands to a model written in Python, as far as this one uses it."""

    TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    TritonError = str

    @dataclass
    class Tensor:
        name: str
        content: Any

        def as_numpy(self) -> Any:
            return self.content

    @dataclass
    class InferenceResponse:
        tensors: list[Any]
        error: str | None = None

    @staticmethod
    def get_input_tensor_by_name(request: Any, name: str) -> Any:
        return request.inputs.get(name)


class Asked:
    """A request of Triton's, and what was sent in answer."""

    def __init__(self, **inputs: Any) -> None:
        self.inputs = {name: Backend.Tensor(name, np.array([one], object)) for name, one in inputs.items()}
        self.texts: list[bytes] = []
        self.errors: list[str] = []
        self.final = 0

    def get_response_sender(self) -> Asked:
        return self

    def send(self, response: Any = None, flags: int = 0) -> None:
        self.final += flags
        if response is not None:
            self.texts += [one.content.flat[0] for one in response.tensors]
            self.errors += [response.error] if response.error else []


class Talker:
    """A pipeline that says what it was asked."""

    closed = False

    def stream(self, video: bytes, question: str, **how: Any) -> Any:
        if question == "broken":
            raise RuntimeError("secret")
        if not video:
            raise VideoError("the video is empty")
        for word in (question, "", str(how["deadline"]), str(how.get("max_new_tokens"))):
            yield SimpleNamespace(text=word)

    def close(self) -> None:
        self.closed = True


def test_tritons_model_streams_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    import runtime.pipeline

    talker = Talker()
    monkeypatch.setattr(runtime.pipeline.Pipeline, "load", lambda *where: talker)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", Backend)
    model = importlib.import_module("runtime.serve.deploy.triton.earlytom.1.model").TritonPythonModel()
    parameters = {name: {"string_value": "60"} for name in ("engine", "model", "deadline")}
    model.initialize({"model_config": json.dumps({"parameters": parameters})})
    good, short = Asked(VIDEO=b"x", QUESTION="é?".encode()), Asked(VIDEO=b"x", QUESTION=b"a", MAX_TOKENS=3)
    bad = [Asked(VIDEO=b"", QUESTION=b"a"), Asked(VIDEO=b"x", QUESTION=b"\xff"), Asked(VIDEO=b"x", QUESTION=b"broken")]
    model.execute([good, short, *bad])
    model.finalize()
    assert talker.closed
    assert good.texts == ["é?".encode(), b"60.0", b"None"]
    assert short.texts[-1] == b"3"
    assert all(one.final == 1 for one in (good, short, *bad))
    assert [len(one.errors) for one in (good, short, *bad)] == [0, 0, 1, 1, 1]
    assert bad[0].errors == ["the video is empty"]
    assert "secret" not in bad[2].errors[0]
