"""The two programs of a decoder: what they compute, what they must not look at, and that `torch.export` takes them."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import ExportedProgram

from runtime.decoder.programs import (
    DecoderProgram,
    ProgramSize,
    _attend,
    empty_caches,
    example_inputs,
    explicit_attention,
    export_program,
    weights_digest,
)
from tests.runtime.decoder.tiny_decoder import WIDTH, make_qwen, prompt

pytestmark = pytest.mark.usefixtures("one_thread")
PREFILL, DECODE = ProgramSize(cache=24, tokens=16), ProgramSize(cache=24, tokens=1)


def parts(model: Any) -> tuple[Any, Any]:
    return model.get_decoder(), model.get_output_embeddings()


@pytest.fixture(scope="module")
def qwen() -> Any:
    return make_qwen()


@pytest.fixture(scope="module")
def exported(qwen: Any) -> dict[str, ExportedProgram]:
    return {size.kind: export_program(*parts(qwen), size) for size in (PREFILL, DECODE)}


@pytest.fixture(scope="module")
def programs(exported: dict[str, ExportedProgram]) -> dict[str, Any]:
    return {kind: program.module() for kind, program in exported.items()}


def padded(embeds: Tensor, value: float = 0.0) -> Tensor:
    return torch.nn.functional.pad(embeds, (0, 0, 0, PREFILL.tokens - embeds.shape[1]), value=value)


def at(slot: int) -> Tensor:
    return torch.tensor([slot])


def empty(model: Any, **how: Any) -> tuple[Tensor, ...]:
    return empty_caches(model.config, PREFILL.cache, how.get("dtype", torch.float32), torch.device("cpu"))


def without_cache(model: Any, embeds: Tensor) -> Tensor:
    """Logits [1, V] after the last of `embeds`, by transformers and its own attention."""
    with torch.no_grad():
        return model(inputs_embeds=embeds, use_cache=False).logits[:, -1]


@torch.no_grad()
def walk(programs: dict[str, Any], model: Any, length: int, steps: int) -> list[tuple[Tensor, Tensor]]:
    """Logits of the programs and of transformers without a cache, after a prompt and after each further embedding."""
    whole = prompt(length + steps)
    logits, *caches = programs["prefill"](padded(whole[:, :length]), at(length - 1), *empty(model))
    pairs = [(logits, without_cache(model, whole[:, :length]))]
    for slot in range(length, length + steps):
        logits, *caches = programs["decode"](whole[:, slot : slot + 1], at(slot), *caches)
        pairs.append((logits, without_cache(model, whole[:, : slot + 1])))
    return pairs


# What they compute


@pytest.mark.parametrize("length", [1, 2, 9, 15, 16])
def test_exported_programs_give_the_logits_of_transformers(qwen: Any, programs: dict[str, Any], length: int) -> None:
    for got, want in walk(programs, qwen, length, PREFILL.cache - length):  # up to the cache's last slot
        torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)


def test_exported_programs_with_sliding_window_layers() -> None:
    model = make_qwen(use_sliding_window=True, sliding_window=6, max_window_layers=1)
    assert model.config.layer_types == ["full_attention", "sliding_attention"]
    programs = {size.kind: export_program(*parts(model), size).module() for size in (PREFILL, DECODE)}
    for got, want in walk(programs, model, 11, 8):
        torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)
    wider = make_qwen(use_sliding_window=True, sliding_window=7, max_window_layers=1)
    got, want = walk(programs, wider, 11, 0)[0]
    assert (got - want).abs().max() > 0.1  # negative control: the window is noticed


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float16, 0.03), (torch.bfloat16, 0.2)])
def test_half_precision_is_close_to_single(qwen: Any, dtype: torch.dtype, allowed: float) -> None:
    half = make_qwen().to(dtype)
    for size in (PREFILL, DECODE):
        inputs = example_inputs(half.get_decoder(), size)
        with torch.no_grad():
            got = export_program(*parts(half), size).module()(*inputs)
            with explicit_attention(qwen.get_decoder()):
                program = DecoderProgram(*parts(qwen), size)
                want = program(*(t.float() if t.is_floating_point() else t for t in inputs))
        assert {tensor.dtype for tensor in got} == {dtype}
        worst = max(float((g.float() - w).abs().max() / w.abs().max()) for g, w in zip(got, want, strict=True))
        assert worst < allowed


@torch.no_grad()
def test_a_wrong_slot_gives_other_logits(qwen: Any, programs: dict[str, Any]) -> None:
    """Negative control of all the comparisons."""
    first, *caches = programs["prefill"](padded(prompt(9)), at(8), *empty(qwen))
    for slot in (7, 9):
        assert (programs["prefill"](padded(prompt(9)), at(slot), *empty(qwen))[0] - first).abs().max() > 0.1
    token = prompt(1)
    right = programs["decode"](token, at(9), *caches)[0]
    for slot in (8, 10):
        assert (programs["decode"](token, at(slot), *caches)[0] - right).abs().max() > 0.1


# With positions and a bias


@torch.no_grad()
def with_places(model: Any, embeds: Tensor, positions: Tensor, bias: Tensor) -> Tensor:
    """Logits [1, V] after the last of `embeds`, by transformers with an explicit mask."""
    length = embeds.shape[1]
    mask = torch.full((length, length), -1e30).triu(1) + bias
    found = model(inputs_embeds=embeds, attention_mask=mask[None, None], position_ids=positions[None], use_cache=False)
    return found.logits[:, -1]


@pytest.mark.parametrize("length", [1, 9, 16])
@torch.no_grad()
def test_programs_with_places_give_the_logits_of_transformers(qwen: Any, length: int) -> None:
    sizes = [ProgramSize(size.cache, size.tokens, placed=True) for size in (PREFILL, DECODE)]
    programs = {size.kind: export_program(*parts(qwen), size).module() for size in sizes}
    generator = torch.Generator().manual_seed(length)
    whole, slots = prompt(PREFILL.cache), PREFILL.cache
    positions = torch.randint(1, 5, (slots,), generator=generator).cumsum(0)
    bias = torch.randn(slots, generator=generator) * 2
    spoiled = torch.cat((positions[:length], torch.full((PREFILL.tokens - length,), 9**9)))  # of padding: anything
    logits, *caches = programs["prefill"](padded(whole[:, :length]), at(length - 1), spoiled, bias, *empty(qwen))
    want = with_places(qwen, whole[:, :length], positions[:length], bias[:length])
    torch.testing.assert_close(logits, want, atol=2e-4, rtol=1e-4)
    for slot in range(length, slots):
        here = positions[slot : slot + 1]
        before = caches
        logits, *caches = programs["decode"](whole[:, slot : slot + 1], at(slot), here, bias, *before)
        end = slot + 1
        want = with_places(qwen, whole[:, :end], positions[:end], bias[:end])
        torch.testing.assert_close(logits, want, atol=2e-4, rtol=1e-4)
        for wrong in ((here + 1, bias), (here, bias.roll(1))):  # negative control
            other, *_ = programs["decode"](whole[:, slot : slot + 1], at(slot), *wrong, *before)
            assert (other - want).abs().max() > 1e-3


def test_places_are_inputs_only_of_programs_made_for_them(qwen: Any, exported: dict[str, ExportedProgram]) -> None:
    for size in (PREFILL, DECODE):
        placed = ProgramSize(size.cache, size.tokens, placed=True)
        shapes = [tuple(tensor.shape) for tensor in example_inputs(qwen.get_decoder(), placed)]
        assert shapes[2:4] == [(size.tokens,), (size.cache,)]
        assert len(export_program(*parts(qwen), placed).graph_signature.user_inputs) == 2 + 2 + 4
        assert len(exported[size.kind].graph_signature.user_inputs) == 2 + 4


# What they must not look at


@pytest.mark.parametrize("value", [7.0, 1e6, float("nan"), float("inf")])
@torch.no_grad()
def test_padding_can_be_anything(qwen: Any, programs: dict[str, Any], value: float) -> None:
    clean = programs["prefill"](padded(prompt(9)), at(8), *empty(qwen))
    dirty = programs["prefill"](padded(prompt(9), value), at(8), *empty(qwen))
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert not clean[1][:, :, 9:].any()
    touched = padded(prompt(9))
    touched[0, 8] = value  # negative control: the last position that counts
    assert not torch.equal(programs["prefill"](touched, at(8), *empty(qwen))[0], clean[0])


@torch.no_grad()
def test_a_decode_step_ignores_later_slots(qwen: Any, programs: dict[str, Any]) -> None:
    _, *caches = programs["prefill"](padded(prompt(9)), at(8), *empty(qwen))
    token = prompt(1)
    want = programs["decode"](token, at(9), *caches)[0]
    for slot, same in ((9, True), (10, True), (23, True), (8, False)):
        noisy = [cache.clone() for cache in caches]
        for cache in noisy:
            cache[:, :, slot] = 50.0
        assert torch.equal(programs["decode"](token, at(9), *noisy)[0], want) is same


@torch.no_grad()
def test_a_prefill_keeps_the_slots_behind_it_and_a_step_all_others(qwen: Any, programs: dict[str, Any]) -> None:
    noise = [torch.randn(cache.shape) for cache in empty(qwen)]
    for got, before in zip(programs["prefill"](padded(prompt(9)), at(8), *noise)[1:], noise, strict=True):
        assert torch.equal(got[:, :, 16:], before[:, :, 16:])
        assert not torch.equal(got[:, :, :16], before[:, :, :16])
    for got, before in zip(programs["decode"](prompt(1), at(11), *noise)[1:], noise, strict=True):
        changed = (got != before).any(-1).any(1)[0]
        assert changed.nonzero().tolist() == [[11]]


# What a compiler gets


def test_nothing_is_changed_in_place(qwen: Any, exported: dict[str, ExportedProgram]) -> None:
    for size in (PREFILL, DECODE):
        signature = exported[size.kind].graph_signature
        assert not signature.buffers_to_mutate
        assert not signature.user_inputs_to_mutate
        inputs = example_inputs(qwen.get_decoder(), size)
        kept = [tensor.clone() for tensor in inputs]
        exported[size.kind].module()(*inputs)
        assert all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True))


def test_shapes_are_static_and_the_caches_go_in_and_out(exported: dict[str, ExportedProgram]) -> None:
    for size in (PREFILL, DECODE):
        program = exported[size.kind]
        assert not program.range_constraints
        signature = program.graph_signature
        assert len(signature.user_inputs) == 2 + 4  # embeds, last, keys and values of two layers
        assert len(signature.user_outputs) == 1 + 4


@pytest.mark.parametrize("size", [PREFILL, DECODE], ids=lambda size: size.kind)
def test_the_graph_keeps_clear_of_what_compilers_get_wrong(size: ProgramSize) -> None:
    nodes = [n for n in export_program(*parts(make_qwen().bfloat16()), size).graph.nodes if n.op == "call_function"]
    selects = [n for n in nodes if "where" in str(n.target)]
    assert selects
    assert {n.meta["val"].dtype for n in selects} == {torch.float32}
    assert not [n for n in nodes if "attention" in str(n.target)]
    assert {n.meta["val"].dtype for n in nodes if "softmax" in str(n.target)} == {torch.float32}


def test_attention_does_not_overflow_where_the_plain_product_does() -> None:
    query = torch.full((1, 4, 3, 8), 100.0).half()
    key = torch.full((1, 2, 5, 8), 100.0).half()
    key[:, :, 3] = 130.0  # a score of 36,770 after scaling, 104,000 before
    value = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0)).half()
    assert torch.isinf(query[:, :2] @ key.transpose(2, 3)).any()
    got, _ = _attend(torch.nn.Module(), query, key, value, torch.zeros(3, 5), 8**-0.5)
    for head in range(4):
        assert torch.equal(got[0, :, head], value[0, head // 2, 3].expand(3, 8))


def test_attention_equals_the_fused_one() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 5, 8, generator=generator) for heads in (6, 2, 2))
    allowed = torch.ones(5, 5).tril().bool()
    got, _ = _attend(torch.nn.Module(), query, key, value, allowed.logical_not() * -1e30, 8**-0.5)
    repeated = [tensor.repeat_interleave(3, 1) for tensor in (key, value)]
    want = torch.nn.functional.scaled_dot_product_attention(query, *repeated, attn_mask=allowed)
    torch.testing.assert_close(got, want.transpose(1, 2))


def test_the_models_own_attention_is_put_back(qwen: Any) -> None:
    before = qwen.config._attn_implementation
    with explicit_attention(qwen.get_decoder()):
        assert qwen.config._attn_implementation != before
    assert qwen.config._attn_implementation == before
    with pytest.raises(RuntimeError), explicit_attention(qwen.get_decoder()):
        qwen(inputs_embeds=torch.zeros(1, 1, WIDTH + 1))
    assert qwen.config._attn_implementation == before


def test_sizes_that_make_no_program_are_refused() -> None:
    assert (PREFILL.kind, DECODE.kind) == ("prefill", "decode")
    for cache, tokens in ((16, 16), (16, 17), (16, 0), (1, 1)):
        with pytest.raises(ValueError, match="tokens"):
            ProgramSize(cache, tokens)


# The digest


def test_digest_is_of_everything_the_programs_compute_with() -> None:
    digest = weights_digest(*parts(make_qwen()))
    assert weights_digest(*parts(make_qwen())) == digest
    others = [make_qwen(rms_norm_eps=1e-5), make_qwen(rope_parameters={"rope_type": "default", "rope_theta": 5e5})]
    others.append(make_qwen().half())
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"):
        others.append(make_qwen())
        with torch.no_grad():
            others[-1].get_parameter(name).view(-1)[-1] += 1e-3
    digests = {weights_digest(*parts(model)) for model in others}
    assert len(digests | {digest}) == len(others) + 1


def test_digest_leaves_the_embedding_out_unless_it_is_the_head() -> None:
    for tied in (False, True):
        model = make_qwen(tie_word_embeddings=tied)
        digest = weights_digest(*parts(model))
        with torch.no_grad():
            model.get_input_embeddings().weight[3, 4] += 1
        assert (weights_digest(*parts(model)) != digest) is tied
