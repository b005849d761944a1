"""Checkpoints on the model hub: one snapshot, few requests, and the cache alone where the hub is out of reach."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from builder import build
from earlytom.errors import UserError
from runtime import ask
from runtime.checkpoint import describe, load_decoder, load_model, load_tokenizer, load_vision
from runtime.engine.manifest import Manifest
from runtime.engine.origin import checkpoint_of
from runtime.errors import EngineError
from tests.runtime.checkpoint.hub_server import Hub, serving, use
from tests.runtime.checkpoint.tiny_checkpoint import (
    answering,
    edit_json,
    old_name,
    one_line,
    write,
    write_weights,
)

pytestmark = pytest.mark.usefixtures("each_export_once")

NAME = "org/some-model"
BUILD = ("--backend", "onnx", "--no-verify", "--fp32", "--frames", "4", "--merge-layers", "0", "--ratio", "0.5")


@pytest.fixture
def folder(tmp_path: Path, original: Any) -> Path:
    """As published: old names, decoder and vision part in shards of their own, no video_preprocessor_config.json."""
    source = answering(write(tmp_path / "first", original, rename=old_name))
    split(source)
    return source


def split(source: Path) -> None:
    """The weights of one file in two shards: the decoder's and the rest."""
    state = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + (not name.startswith('language'))}-of-00002.safetensors" for name in state}
    for file in sorted(set(files.values())):
        save_file({n: t for n, t in state.items() if files[n] == file}, source / file, metadata={"format": "pt"})
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def decoder_changed(source: Path, to: Path) -> Path:
    shutil.copytree(source, to)
    path = to / "model-00001-of-00002.safetensors"
    state = load_file(path)
    state["language_model.lm_head.weight"] += 1
    save_file(state, path, metadata={"format": "pt"})
    return to


@pytest.fixture
def hub(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made = Hub()
    made.push(NAME, folder)
    with serving(made) as address:
        use(monkeypatch, address, tmp_path / "cache")
        yield made


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The builder's command; what it prints but the JSON line is under "text"."""

    def run(*words: str) -> dict[str, Any]:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            build.main([*words, *BUILD, "--out", str(tmp_path / "engines")])
        *lines, last = printed.getvalue().splitlines()
        return json.loads(last) | {"text": "\n".join(lines)}

    return run


def offline(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def unreachable(patch: pytest.MonkeyPatch, cache: Path) -> None:
    use(patch, "http://127.0.0.1:9", cache)  # the discard port, on which nothing listens


# Fetching


def test_a_hub_id_is_one_snapshot_and_only_what_is_needed_is_fetched(hub: Hub, original: Any) -> None:
    found = describe(NAME)
    assert found.name == "org-some-model"
    assert found.source == NAME
    assert found.commit == hub.branches[NAME]["main"]
    assert not any(name.endswith(".safetensors") for name in hub.fetched)
    part = load_vision(found)
    assert torch.equal(part.closing, original.model.image_newline)
    found.digest()
    assert {name for name in hub.fetched if name.endswith(".safetensors")} == {"model-00002-of-00002.safetensors"}
    before = len(hub.asked)
    found.digest()
    assert len(hub.asked) == before
    decoder: Any = load_decoder(found)
    assert torch.equal(decoder.lm_head.weight, original.lm_head.weight)
    assert "model-00001-of-00002.safetensors" in hub.fetched
    assert torch.equal(load_model(found).lm_head.weight, original.lm_head.weight)


def test_everything_is_of_one_commit_though_the_branch_moves(hub: Hub, folder: Path, tmp_path: Path) -> None:
    found = describe(NAME)
    other = decoder_changed(folder, tmp_path / "second")
    (other / "chat_template.jinja").write_text("another")
    hub.push(NAME, other)
    assert "another" not in load_tokenizer(found).chat_template
    assert describe(NAME).commit != found.commit
    assert "another" in load_tokenizer(describe(NAME)).chat_template
    decoder: Any = load_decoder(found)
    newer: Any = load_decoder(NAME)
    assert not torch.equal(decoder.lm_head.weight, newer.lm_head.weight)


@pytest.mark.parametrize("kind", ["branch", "tag", "commit"])
def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: Hub, folder: Path, tmp_path: Path, kind: str) -> None:
    other = shutil.copytree(folder, tmp_path / "second")
    edit_json(other / "preprocessor_config.json", image_mean=[0.1, 0.2, 0.3])
    branch = {"branch": "refs/pr/4", "tag": "v1.0"}.get(kind, "dev")
    commit = hub.push(NAME, other, branch=branch)
    source = f"{NAME}@{commit if kind == 'commit' else branch}"
    assert describe(source).commit == commit
    assert describe(source).preprocessing.mean == (0.1, 0.2, 0.3)
    assert describe(NAME).preprocessing.mean == (0.5, 0.4, 0.3)
    assert describe(source).source == source


def test_a_local_folder_with_an_at_sign_is_a_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "org" / "model@v2"
    place.parent.mkdir()
    shutil.copytree(folder, place)
    monkeypatch.chdir(tmp_path)
    assert describe("org/model@v2").source == str(place)


# Requests


def test_a_build_and_an_ask_from_a_warm_cache_make_few_requests(
    hub: Hub, command: Callable[..., dict[str, Any]], drawn_clip: Path
) -> None:
    folder = Path(command("--model", NAME)["folder"])
    assert {name for name in hub.fetched if name.endswith(".safetensors")} == {"model-00002-of-00002.safetensors"}
    assert Manifest.read(folder).model.commit == hub.branches[NAME]["main"]
    hub.asked.clear()
    command("--model", NAME, "--force")
    assert 1 <= len(hub.asked) <= 20
    question = ["--engine", str(folder), str(drawn_clip), "What happens?", "--max-new-tokens", "2", "--json"]
    with contextlib.redirect_stdout(io.StringIO()):
        ask.main(question)
        hub.asked.clear()
        ask.main(question)
    assert 1 <= len(hub.asked) <= 10


def test_an_engine_answers_with_the_commit_it_was_built_from(
    hub: Hub, command: Callable[..., dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    built = command("--model", NAME)
    manifest = Manifest.read(built["folder"])
    first = hub.branches[NAME]["main"]
    hub.push(NAME, decoder_changed(folder, tmp_path / "second"))
    assert checkpoint_of(manifest).commit == first
    assert checkpoint_of(manifest, NAME).commit == first
    assert checkpoint_of(manifest, str(folder)).commit is None  # a copy of the same content
    with pytest.raises(EngineError, match="has another decoder"):
        checkpoint_of(manifest, f"{NAME}@main")
    again = command("--model", NAME)  # the moved branch is another model
    assert again["folder"] != built["folder"]
    assert Manifest.read(again["folder"]).model.commit == hub.branches[NAME]["main"]


def test_two_repositories_with_the_same_vision_part_have_an_engine_each(
    hub: Hub, command: Callable[..., dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    hub.push("a/ft", folder)
    hub.push("b/ft", decoder_changed(folder, tmp_path / "second"))
    one, two = (command("--model", name) for name in ("a/ft", "b/ft"))
    assert "unchanged" not in two["text"]
    assert Path(one["folder"]).name.startswith("a-ft-")
    assert Path(two["folder"]).name.startswith("b-ft-")
    assert [Manifest.read(each["folder"]).model.source for each in (one, two)] == ["a/ft", "b/ft"]
    assert "unchanged" in command("--model", "a/ft")["text"]


# Out of reach


@pytest.mark.parametrize("how", ["offline", "unreachable", "outage", "gated", "login expired", "rate limit"])
def test_what_is_cached_works_without_the_hub(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, original: Any, how: str
) -> None:
    online = describe(NAME)
    digests = online.digest(), online.answers_digest()
    load_decoder(online)
    load_tokenizer(online)
    if how == "offline":
        offline(monkeypatch)
    elif how == "unreachable":
        unreachable(monkeypatch, tmp_path / "cache")
    else:
        hub.status, hub.code = {
            "outage": (503, ""),
            "gated": (403, "GatedRepo"),
            "login expired": (401, "RepoNotFound"),
            "rate limit": (429, ""),
        }[how]
    hub.asked.clear()
    found = describe(NAME)
    assert found.commit == online.commit
    assert (found.digest(), found.answers_digest()) == digests
    decoder: Any = load_decoder(found)
    assert torch.equal(decoder.lm_head.weight, original.lm_head.weight)
    assert load_tokenizer(found)("<video>").input_ids == [1279]
    assert describe(f"{NAME}@{online.commit}").commit == online.commit
    assert len(hub.asked) <= 2
    assert AutoConfig.from_pretrained(NAME).model_type == "llava_onevision"  # transformers works then, too


def test_what_others_have_cached_works_offline(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, original: Any
) -> None:
    for path in folder.iterdir():
        huggingface_hub.hf_hub_download(NAME, path.name)
    with pytest.raises(EntryNotFoundError):  # which the cache notes
        huggingface_hub.hf_hub_download(NAME, "video_preprocessor_config.json")
    offline(monkeypatch)
    assert torch.equal(load_vision(NAME).closing, original.model.image_newline)
    assert torch.equal(load_model(NAME).lm_head.weight, original.lm_head.weight)


def test_a_shard_that_is_not_cached_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    load_vision(NAME)
    offline(monkeypatch)
    load_vision(NAME)
    with pytest.raises(UserError, match=r"model-00001-of-00002\.safetensors is missing, 1 of the 2 shards") as error:
        load_decoder(NAME)
    assert "only its cache was read" in one_line(error)


def test_a_hub_that_cannot_be_reached_is_refused_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    unreachable(monkeypatch, tmp_path / "cache")
    started = time.monotonic()
    with pytest.raises(UserError, match="cannot be reached") as error:
        describe("org/no-such-model")
    assert time.monotonic() - started < 15  # the client's own calls try for 24 seconds
    assert "no such local folder" in one_line(error)


@pytest.mark.parametrize(
    ("source", "status", "code", "message"),
    [
        ("org/none", 200, "", "no such model on the hub"),
        (f"{NAME}@none", 200, "", "has no revision none"),
        (NAME, 401, "GatedRepo", "access to it is restricted"),
        (NAME, 403, "GatedRepo", "access to it is restricted"),
        (NAME, 503, "", "it answers 503"),
        (NAME, 429, "", "it answers 429"),
        ("org/a--b..c", 200, "", "no such model on the hub"),
    ],
)
def test_a_hub_that_refuses_is_one_line(hub: Hub, source: str, status: int, code: str, message: str) -> None:
    hub.status, hub.code = status, code
    with pytest.raises(UserError, match=message) as error:
        describe(source)
    one_line(error)
    assert len(hub.asked) <= 1


def test_a_repository_without_a_model_is_one_line(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").write_text("nothing")
    hub.push("org/empty", tmp_path / "empty")
    with pytest.raises(UserError, match=r"no config\.json") as error:
        describe("org/empty")
    one_line(error)


def test_one_file_for_all_weights(hub: Hub, tmp_path: Path, original: Any) -> None:
    single = answering(write(tmp_path / "single", original))
    write_weights(single, load_file(single / "model.safetensors"))
    hub.push("org/single", single)
    assert torch.equal(load_vision("org/single").closing, original.model.image_newline)
    assert describe("org/single").answers_digest() == describe(single).answers_digest()


def test_a_hub_that_never_answers_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("runtime.checkpoint.hub._SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        use(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path / "cache")
        started = time.monotonic()
        with pytest.raises(UserError, match=r"cannot be reached \(ReadTimeout\)") as error:
            describe(NAME)
        assert time.monotonic() - started < 15
    one_line(error)
