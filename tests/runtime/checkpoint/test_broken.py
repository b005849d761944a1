"""Checkpoints that cannot be used: what is wrong is one line, said before anything is built, allocated or loaded."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from builder.source import check_answers
from earlytom import micro
from earlytom.errors import UserError
from earlytom.micro.random_model import random_model
from runtime.checkpoint import describe, load_decoder, load_tokenizer, load_vision
from runtime.checkpoint.files import TOKENIZER_BYTES
from tests.runtime.checkpoint.tiny_checkpoint import answering, edit_json, one_line, tiny_config, write, write_weights

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 8056224\n"
HEAD, EMBEDDINGS = "lm_head.weight", "model.language_model.embed_tokens.weight"
QUERY = "model.language_model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound checkpoint; read only."""
    model = random_model(tiny_config(), torch.float32, seed=5)
    return answering(write(tmp_path_factory.mktemp("sound") / "tiny", model))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "tiny")


def state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def in_shards(folder: Path, shards: int = 4) -> Path:
    write_weights(folder, state(folder), shards)
    return folder


def index(folder: Path) -> Path:
    return folder / "model.safetensors.index.json"


def refused(folder: Path, message: str) -> str:
    """What a build says before it starts."""
    with pytest.raises(UserError, match=message) as error:
        check_answers(describe(folder))
    return one_line(error)


def test_a_sound_checkpoint_is_not_refused(folder: Path) -> None:
    check_answers(describe(folder))
    check_answers(describe(in_shards(folder)))


# Tokenizer and template, before a build


def test_what_is_needed_to_answer_is_looked_at_before_a_build(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'][1]['text'] }}")
    refused(folder, "places <video> 0 times")
    (folder / "chat_template.jinja").write_text("<video>{% for m in messages %}<video>{% endfor %}")
    refused(folder, "places <video> 2 times")
    (folder / "chat_template.jinja").write_text("{% for")
    refused(folder, "the chat template cannot render")
    many = "{% for a in range(99999) %}"
    (folder / "chat_template.jinja").write_text(f"<video>{2 * many}{2 * '{% endfor %}'}")
    refused(folder, r"it takes more than 1000000 steps.*use a template for video")
    (folder / "chat_template.jinja").unlink()
    refused(folder, "no chat template")
    (folder / "chat_template.json").write_text('{"chat_template": 5}')
    refused(folder, r"chat_template in chat_template\.json is no text")
    edit_json(folder / "config.json", video_token_index=1270)
    (folder / "chat_template.json").write_text('{"chat_template": "x"}')
    refused(folder, r"has the id 1279 for <video>, and config\.json says 1270")
    (folder / "tokenizer.json").unlink()
    refused(folder, r"neither tokenizer\.json nor vocab\.json")


def test_a_tokenizer_of_a_larger_model_is_told(folder: Path) -> None:
    """Its ids would look up rows of the embeddings that there are not."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["more"] = 1400
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(folder, r"ids up to 1400, and vocab_size in config\.json is 1300")


def test_the_builders_command_says_so_and_builds_nothing(folder: Path) -> None:
    from builder import build

    (folder / "chat_template.jinja").unlink()
    out = folder.parent / "engines"
    with pytest.raises(UserError, match="no chat template"):
        build.main(["--model", str(folder), "--backend", "onnx", "--out", str(out)])
    assert not out.exists()


def test_code_of_a_checkpoint_is_not_run(folder: Path) -> None:
    (folder / "code.py").write_text("raise SystemExit('ran')")
    edit_json(
        folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.T", "code.T"]}, tokenizer_class="Nothing"
    )
    only_one_line(lambda: load_tokenizer(folder))


# Adapters, quantised weights, other formats and families


def test_an_adapter_is_told_to_be_merged(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "llava-hf/base"}')
    assert "llava-hf/base" not in refused(folder, "lies beside the weights.*merge_and_unload")
    (folder / "config.json").unlink()
    assert "'llava-hf/base'" in refused(folder, "it is an adapter.*merge_and_unload")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_the_weights_of_an_adapter_alone_tell_too(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"")
    refused(folder, "merge_and_unload")


@pytest.mark.parametrize("where", [None, "text_config", "vision_config"])
def test_quantised_settings_are_refused_wherever_they_are(folder: Path, where: str | None) -> None:
    config = json.loads((folder / "config.json").read_text())
    (config if where is None else config[where])["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "quantised")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2])
def test_quantised_tensors_of_the_decoder_are_refused(folder: Path, dtype: torch.dtype) -> None:
    write_weights(folder, state(folder) | {QUERY: torch.zeros(32, 32).to(dtype)})
    refused(folder, "quantised")


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    "end", ["qweight", "qzeros", "scales", "g_idx", "weight_scale", "weight_scale_inv", "weight_packed", "SCB",
            "input_scale", "weight.absmax", "weight.quant_state.bitsandbytes__nf4", "k_scale"]
)  # fmt: skip
def test_names_of_quantised_tensors_are_known(folder: Path, end: str, shards: int) -> None:
    module = QUERY.removesuffix(".weight")
    write_weights(folder, state(folder) | {f"{module}.{end}": torch.zeros(2)}, shards)
    refused(folder, "quantised")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.gguf", "pytorch_model-00001-of-00002.bin"])
def test_weights_in_another_format_are_told_to_be_converted(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    refused(folder, f"{name}, expected safetensors; convert them")


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_5_moe", "idefics3", "llava", "internvl_chat", 5, None, ["x"]])
def test_another_family_is_told_what_is_supported(folder: Path, family: Any) -> None:
    edit_json(folder / "config.json", model_type=family)
    refused(folder, "is not supported; supported is 'llava_onevision'")


# Files that are not what they are called


@pytest.mark.parametrize(
    "name",
    ["config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
     "model.safetensors", "generation_config.json"],
)  # fmt: skip
def test_pointers_of_git_lfs_are_known(folder: Path, name: str) -> None:
    (folder / name).write_text(POINTER)
    assert name in refused(folder, "git lfs pull")


def test_a_shard_or_index_may_be_a_pointer_too(folder: Path) -> None:
    in_shards(folder)
    (folder / "model-00002-of-00004.safetensors").write_text(POINTER)
    refused(folder, r"model-00002-of-00004\.safetensors is a pointer")
    index(folder).write_text(POINTER)
    refused(folder, r"index\.json is a pointer")


@pytest.mark.parametrize("names", [1, 2, 3])
def test_missing_shards_are_named_and_counted(folder: Path, names: int) -> None:
    in_shards(folder)
    for number in range(names):
        (folder / f"model-0000{number + 1}-of-00004.safetensors").unlink()
    refused(folder, rf"model-00001-of-00004\.safetensors.* missing, {names} of the 4 shards")


def test_shards_of_two_models_are_refused(folder: Path) -> None:
    in_shards(folder)
    save_file({"other": torch.zeros(3)}, folder / "model-00003-of-00004.safetensors")
    refused(folder, r"model-00003-of-00004\.safetensors has no .* its shards are not of one model")


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\xff" * 64, struct.pack("<Q", 1 << 40), b"\x02\0\0\0\0\0\0\0{}"])
def test_empty_and_torn_weights_are_refused(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, r"truncated or broken|missing tensors")


@pytest.mark.parametrize("cut", [1, 1000, 100_000])
def test_cut_weights_are_refused(folder: Path, cut: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-cut])
    refused(folder, "truncated or broken")


HOSTILE = ("../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "c:\\x.safetensors", "x\0.safetensors")
ODD_NAMES = ("x\ny.safetensors", "x" * 300 + ".safetensors")


@pytest.mark.parametrize("file", [*HOSTILE, *ODD_NAMES, "model.bin", "", 5, None])
def test_an_index_names_files_beside_it(folder: Path, file: Any) -> None:
    in_shards(folder)
    content = json.loads(index(folder).read_text())
    content["weight_map"][QUERY] = file
    index(folder).write_text(json.dumps(content))
    refused(folder, "expected the name of a .safetensors file beside it")


@pytest.mark.parametrize("rows", [1296, 1310])
@pytest.mark.parametrize("name", [HEAD, EMBEDDINGS])
def test_resized_embeddings_are_told_from_broken_ones(folder: Path, rows: int, name: str) -> None:
    write_weights(folder, state(folder) | {name: torch.zeros(rows, 32)})
    text = refused(folder, f"has {rows} rows and vocab_size in config.json is 1300")
    assert f"set vocab_size of text_config to {rows}" in text


# Settings of no sense


def edited(folder: Path, section: str | None, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (config if section is None else config[section]).update(changes)
    (folder / "config.json").write_text(json.dumps(config))


NONSENSE = [0, -1, 10**9, 10**400, 1.5, "big", True, None, float("nan"), float("inf"), [], [16], {}]
SIZES = [("vision_config", name) for name in (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size",
    "num_channels")] + [("text_config", name) for name in (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
    "max_position_embeddings")]  # fmt: skip


@pytest.mark.parametrize("value", NONSENSE, ids=lambda value: repr(value)[:8])
@pytest.mark.parametrize(("section", "name"), SIZES)
def test_sizes_of_no_sense_are_one_line(folder: Path, section: str, name: str, value: Any) -> None:
    edited(folder, section, **{name: value})
    assert len(refused(folder, name)) < 400


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("vision_config", {"hidden_act": "nothing"}, "activation"),
        ("text_config", {"hidden_act": ["silu"]}, "hidden_act"),
        (None, {"projector_hidden_act": 5}, "projector_hidden_act"),
        ("vision_config", {"num_attention_heads": 3}, "3 heads, which do not divide 16"),
        ("text_config", {"num_attention_heads": 5}, "5 heads"),
        ("text_config", {"num_key_value_heads": 3}, "3 key/value heads"),
        ("vision_config", {"patch_size": 25}, "patches of 25 in images of 24"),
        ("vision_config", {"num_channels": 1}, "num_channels"),
        ("vision_config", {"layer_norm_eps": 0}, "layer_norm_eps"),
        ("text_config", {"rms_norm_eps": "1e-6"}, "rms_norm_eps|valid configuration"),
        ("text_config", {"eos_token_id": 10**7}, "eos_token_id"),
        ("text_config", {"model_type": "nothing"}, "valid configuration"),
        ("text_config", {"rope_parameters": {"rope_type": "nothing"}}, "config.json"),
        (None, {"vision_config": None}, "vision_config"),
        (None, {"text_config": [1]}, "text_config"),
        (None, {"video_token_index": -1}, "video_token_id"),
        (None, {"video_token_index": 10**9}, "video_token_id"),
        (None, {"vision_feature_layer": True}, "vision_feature_layer"),
        (None, {"vision_feature_layer": 10**9}, "vision_feature_layer"),
        (None, {"earlytom_trained": "yes"}, "earlytom_trained"),
        (None, {"multimodal_projector_bias": 10**400}, "config.json|tensors"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(
    folder: Path, section: str | None, changes: dict[str, Any], message: str
) -> None:
    edited(folder, section, **changes)
    refused(folder, message)


@pytest.mark.parametrize("section", ["vision_config", "text_config"])
def test_a_missing_section_is_one_line(folder: Path, section: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config[section]
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, f"has no {section}")


def test_a_folder_that_may_not_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.chmod(0)
    if os.access(folder, os.R_OK):  # root may read everything
        monkeypatch.setattr(os, "access", lambda *_: False)
    refused(folder, "permission denied; change the folder's permissions")


def test_json_is_read_with_care(folder: Path) -> None:
    path = folder / "config.json"
    good = path.read_text()
    path.write_text(good.replace("{", '{"model_type": "llava_onevision", "model_type": "x",', 1))
    refused(folder, "names 'model_type' twice")
    path.write_text("[" * 200_000)
    refused(folder, r"config\.json")
    path.write_text('{"a":' * 50_000 + "1" + "}" * 50_000)
    refused(folder, r"config\.json")
    path.write_bytes(b"\xff\xfe" + good.encode())
    refused(folder, r"config\.json")
    with open(path, "wb") as file:
        file.truncate(120 << 20)  # sparse
    refused(folder, "larger than 4 MiB")
    path.write_text(good)
    with open(folder / "tokenizer.json", "ab") as file:
        file.truncate(TOKENIZER_BYTES + 1)
    refused(folder, "larger than 64 MiB")


def test_long_values_are_cut_in_messages(folder: Path) -> None:
    edited(folder, None, model_type="x" * 100_000)
    assert len(refused(folder, "not supported")) < 500
    edited(folder, None, model_type="llava_onevision")
    write_weights(folder, state(folder) | {"model." + "y" * 100_000: torch.zeros(2)})
    assert len(refused(folder, "unexpected")) < 600


def test_too_little_memory_is_one_line(whole: Path) -> None:
    """In a process that may not map the file; what the decoder would take in fp32 is not the question then."""
    script = (
        "import resource, sys, torch; from runtime import cli; from runtime.checkpoint import load_decoder, describe\n"
        "found = describe(sys.argv[1]); found.shapes; import transformers.models.qwen2.modeling_qwen2\n"
        "pages = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (pages + (1 << 18), -1))\n"
        "sys.exit(cli.run(load_decoder, found))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(whole)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert "do not fit into the memory that is free" in done.stderr
    assert len(done.stderr.splitlines()) == 1


# Anything else: only one line, whatever is changed

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
FUZZ = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in a JSON object something stands."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, inner in items for found in ((*at, key), *paths(inner, (*at, key)))]


def mutated(content: Any, data: st.DataObject) -> Any:
    content = json.loads(json.dumps(content))
    for _ in range(data.draw(st.integers(1, 2))):
        *way, last = data.draw(st.sampled_from(paths(content)))
        inside = content
        for key in way:
            inside = inside[key]
        if data.draw(st.booleans()):
            inside[last] = data.draw(JSON)
        else:
            del inside[last]
        if not paths(content):
            break
    return content


def only_one_line(work: Callable[[], object]) -> None:
    text = ""
    try:
        work()
    except UserError as error:
        text = str(error)
    assert len(text) < 1000
    assert "\n" not in text


def use(folder: Path) -> None:
    found = describe(folder)
    check_answers(found)
    found.digest()
    found.answers_digest()
    load_vision(found)
    load_decoder(found)


@pytest.mark.parametrize(
    "name", ["config.json", "preprocessor_config.json", "generation_config.json", "tokenizer_config.json"]
)
@FUZZ
@given(data=st.data())
def test_changed_settings_are_one_line_or_work(whole: Path, tmp_path: Path, name: str, data: st.DataObject) -> None:
    folder = tmp_path / "fuzz"
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    content = mutated(json.loads((micro.PATH / name if name.startswith("tok") else whole / name).read_text()), data)
    (folder / name).write_text(json.dumps(content))
    only_one_line(lambda: use(folder))


@settings(FUZZ, max_examples=15)
@given(data=st.data())
def test_a_changed_tokenizer_is_one_line_or_works(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "fuzz"
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    content = json.loads((whole / "tokenizer.json").read_text())
    content["model"]["vocab"] = dict(list(content["model"]["vocab"].items())[:40])
    content["model"]["merges"] = content["model"]["merges"][:5]
    (folder / "tokenizer.json").write_text(json.dumps(mutated(content, data)))
    only_one_line(lambda: load_tokenizer(folder))


@FUZZ
@given(data=st.data())
def test_a_changed_index_is_one_line_or_works(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "fuzz"
    if not folder.is_dir():
        in_shards(shutil.copytree(whole, folder), 2)
        index(folder).rename(tmp_path / "index.json")
    index(folder).write_text(json.dumps(mutated(json.loads((tmp_path / "index.json").read_text()), data)))
    only_one_line(lambda: use(folder))


@FUZZ
@given(data=st.data())
def test_a_changed_header_is_one_line_or_works(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "fuzz"
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    raw = (whole / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    if data.draw(st.booleans()):
        header = json.dumps(mutated(json.loads(raw[8 : 8 + size]), data)).encode()
        raw = struct.pack("<Q", len(header)) + header + raw[8 + size :]
    else:
        place = data.draw(st.integers(0, size + 7))
        raw = raw[:place] + data.draw(st.binary(min_size=1, max_size=3)) + raw[place + 1 :]
    (folder / "model.safetensors").write_bytes(raw)
    only_one_line(lambda: use(folder))
