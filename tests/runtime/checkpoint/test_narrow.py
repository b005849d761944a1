"""A decoder with weights in int8: the products, what is loaded, and what is refused. What answers lose is measured in
tests/builder/evaluation/test_accuracy.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from earlytom.errors import UserError
from earlytom.micro.random_model import random_model
from runtime.checkpoint import load_decoder
from runtime.checkpoint.narrow import DTYPE, NarrowLinear, narrow, narrowed, scale_of
from runtime.decoder.eager import Decoder, InnerMerge
from runtime.decoder.prefix import Prefix
from runtime.parts import WantedParts
from runtime.pipeline import Pipeline
from tests.earlytom.tiny import tiny_qwen3_5, tiny_qwen3_vl
from tests.runtime.checkpoint.tiny_checkpoint import same_name, tiny_config, write


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_each_row_has_a_scale_of_its_own() -> None:
    values, scale = narrowed(torch.tensor([[127.0, -3.4, 0.6], [-0.25, 0.125, 0.0], [0.0, 0.0, 0.0]]))
    assert values.tolist() == [[127, -3, 1], [-127, 64, 0], [0, 0, 0]]
    assert scale[0] == 1
    assert float(scale[1]) == pytest.approx(0.25 / 127, rel=2**-8)  # as bf16 has it
    many = random(3000, 2000)  # more than is narrowed at once
    values, scale = narrowed(many)
    assert ((values.float() * scale.float()[:, None] - many).abs() <= 0.51 * scale.float()[:, None]).all()


@pytest.mark.parametrize("rows", [1, 5, 32, 33, 60])
@pytest.mark.parametrize(("outputs", "inputs"), [(48, 32), (17, 30), (33, 65)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_that_of_the_narrow_weights(rows: int, outputs: int, inputs: int, bias: bool) -> None:
    linear = nn.Linear(inputs, outputs, bias).bfloat16()
    linear.weight.data = random(outputs, inputs, seed=1).bfloat16()
    made, entering = NarrowLinear(linear), random(1, rows, inputs).bfloat16()
    weights = made.weight.double() * made.scale.double()[:, None]
    wanted = entering.double() @ weights.T + (linear.bias.double() if bias else 0)
    got = made(entering)
    assert (got.dtype, got.shape) == (DTYPE, (1, rows, outputs))
    torch.testing.assert_close(got.double(), wanted, rtol=2e-2, atol=2e-2)
    made.scale.data *= 2  # the negative control
    assert not torch.allclose(made(entering).double(), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
def test_what_is_loaded_narrow_is_what_is_made_narrow(tmp_path: Path, tied: bool, shards: int) -> None:
    model: Any = random_model(tiny_config(tied=tied), torch.bfloat16, seed=5)
    source = write(tmp_path / "c", model, rename=same_name, shards=shards)
    loaded: Any = load_decoder(source, int8=True)
    assert {one for one in scale_of(loaded) if "lm_head" in one} == (set() if tied else {"lm_head.weight"})
    narrow(model)
    theirs = dict(model.named_parameters())
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, theirs[name]), name
        assert parameter.dtype == (torch.int8 if name in scale_of(loaded) else DTYPE), name
    inside = [one for one in loaded.get_decoder().layers.modules() if isinstance(one, nn.Linear | NarrowLinear)]
    assert len(inside) == 7 * len(loaded.get_decoder().layers)
    assert all(isinstance(one, NarrowLinear) for one in inside)


def widened(model: Any) -> Any:
    """The same weights in fp32."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, NarrowLinear):
                linear = nn.Linear(*reversed(child.weight.shape), bias=child.bias is not None)
                linear.weight.data = child.weight.float() * child.scale.float()[:, None]
                linear.bias = child.bias
                setattr(parent, name, linear)
    return model.float()


@pytest.mark.parametrize("make", [tiny_qwen3_5, tiny_qwen3_vl])
@pytest.mark.parametrize("cut", [20, 48])
def test_a_watched_answer_differs_by_rounding_alone(make: Any, cut: int) -> None:
    """A prompt is multiplied in another form than a short question behind a prefix (and both in bf16): all are near
    what the same weights say in fp32, where a prompt in two pieces is the whole one."""
    embeds, positions = random(1, 60, 32), torch.arange(60).expand(3, -1)

    def logits(decoder: Decoder, prefix: Prefix | None = None) -> Tensor:
        at = 0 if prefix is None else cut
        list(decoder.stream(embeds[:, at:], positions=positions[:, at:], prefix=prefix, max_new_tokens=1))
        return decoder._logits.float()

    def read(decoder: Decoder) -> Prefix:
        return decoder.prefill(embeds[:, :cut], positions=positions[:, :cut])

    model = make().bfloat16()
    narrow(model)
    decoder = Decoder.from_model(model)
    asked, watched = logits(decoder).clone(), logits(decoder, read(decoder)).clone()
    exact = Decoder.from_model(widened(model))
    wanted = logits(exact).clone()
    prefix = read(exact)
    torch.testing.assert_close(logits(exact, prefix), wanted, rtol=0, atol=1e-3)
    near = 0.2 * float(wanted.std())
    assert float((asked - wanted).abs().max()) < near
    assert float((watched - wanted).abs().max()) < near
    lost = replace(prefix, keys=tuple(map(torch.zeros_like, prefix.keys)))  # negative controls
    assert float((logits(exact, lost) - wanted).abs().max()) > 0.1
    lost = replace(prefix, ends=tuple((conv, torch.zeros_like(state)) for conv, state in prefix.ends))
    assert not prefix.ends or float((logits(exact, lost) - wanted).abs().max()) > 0.1


def test_logits_stay_near(tmp_path: Path) -> None:
    """Of the bundled model: prefill by widened weights, steps by narrow ones."""
    wide: Any = load_decoder(dtype=torch.float32)
    narrow_: Any = load_decoder(int8=True)
    embeds = random(1, 48, wide.config.text_config.hidden_size) * wide.get_input_embeddings().weight.std()
    with torch.inference_mode():
        for length in (48, 8):
            wanted = wide.get_decoder()(inputs_embeds=embeds[:, :length]).last_hidden_state.flatten(0, 1)
            got = narrow_.get_decoder()(inputs_embeds=embeds[:, :length].bfloat16()).last_hidden_state.flatten(0, 1)
            assert torch.cosine_similarity(wanted, got.float()).min() > 0.98, length
    decoder = Decoder.from_model(narrow_)
    assert decoder.dtype == DTYPE
    assert len(list(decoder.stream(embeds, max_new_tokens=4))) == 4


REFUSED = [
    ({"decoder_dtype": "int4"}, "decoder_dtype (--decoder-dtype) is int8 or nothing, got 'int4'"),
    ({"decoder_dtype": "int8", "decoder": "torch-tensorrt"}, "not for torch-tensorrt: use --decoder torch"),
    ({"decoder_dtype": "int8", "decoder": "vllm"}, "not for vllm: use --decoder torch"),
    ({"decoder_dtype": "int8", "device": "cuda"}, "runs on a CPU, not on cuda: use --device cpu"),
    ({"decoder_dtype": "int8", "dtype": torch.float32}, "computes in bf16, not in torch.float32: use --dtype bf16, or"),
]


@pytest.mark.parametrize(("given", "line"), REFUSED)
def test_where_int8_is_not_to_be_had(bundled_engine: Path, given: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as error:
        WantedParts.checked(bundled_engine, **({"device": "cpu"} | given))
    assert line in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("inner", [None, InnerMerge(1, 0.5)])
def test_a_pipeline_answers(bundled_engine: Path, drawn_clip: Path, inner: InnerMerge | None) -> None:
    how: dict[str, Any] = {"device": "cpu", "inner": inner, "decoder_dtype": "int8"}
    with Pipeline.load(bundled_engine, **how) as pipeline:
        assert pipeline.decoder.dtype == DTYPE
        answer = pipeline.ask(drawn_clip, "What happens in this video?", max_new_tokens=4)
    assert answer.tokens
