"""What is merged inside the LLM, and into what: the released code's vectors, and properties for any prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from earlytom import UserError
from earlytom.budget import kept_tokens
from earlytom.inner import InnerPlan, plan_inner

GOLDEN = Path(__file__).parents[1] / "golden" / "holitom"
CASES = sorted(path.stem for path in GOLDEN.glob("inner_*.npz"))


# --- the decision, against the released code


def vectors(name: str) -> dict[str, Any]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) if file[key].ndim else file[key].item() for key in file.files}


def test_every_vector_is_there() -> None:
    assert {f"inner_{n}" for n in range(7)} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str) -> None:
    case = vectors(name)
    visual = torch.arange(case["start"], case["start"] + case["length"])
    keep = kept_tokens(case["length"], case["r"])
    plan = plan_inner(case["hidden"], case["attn_last"].mean(0), visual, keep)
    assert plan.kept.tolist() == case["keep_index"].tolist()
    assert plan.folded.tolist() == case["dropped_index"].tolist()
    assert plan.targets[plan.into].tolist() == case["merged_into"].tolist()
    assert torch.allclose(plan.apply(case["hidden"]), case["hidden_out"], rtol=0, atol=1e-6)


def test_the_vectors_tell_orders_of_folding_apart() -> None:
    """Negative control: from the last to the first, or all with equal weight, is not what was released."""
    case = vectors("inner_3")
    visual = torch.arange(case["start"], case["start"] + case["length"])
    plan = plan_inner(case["hidden"], case["attn_last"].mean(0), visual, kept_tokens(case["length"], case["r"]))
    back = InnerPlan(plan.kept, plan.targets, plan.folded.flip(0), plan.into.flip(0))
    assert not torch.allclose(back.apply(case["hidden"]), case["hidden_out"], atol=1e-2)
    means = case["hidden"].clone()
    for n, target in enumerate(plan.targets):
        means[target] = torch.stack([means[target], *means[plan.folded[plan.into == n]]]).mean(0)
    assert not torch.allclose(means[plan.kept], case["hidden_out"], atol=1e-2)


# --- the decision, for any prompt


@st.composite
def prompts(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, float]:
    """Hidden states, received attention, positions of the visual tokens (anywhere), share to fold away."""
    tokens, width = draw(st.integers(1, 40)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    hidden = torch.randn(tokens, width, generator=generator) * draw(st.sampled_from([1e-3, 1.0, 1e3]))
    if draw(st.booleans()):  # few different rows: ties everywhere
        hidden = hidden[torch.randint(0, min(3, tokens), (tokens,), generator=generator)]
    received = torch.rand(tokens, generator=generator)
    if draw(st.booleans()):
        received = (4 * received).round() / 4
    visual = (torch.rand(tokens, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))).nonzero().flatten()
    return hidden, received, visual, draw(st.one_of(st.sampled_from([0.0, 0.5, 0.75]), st.floats(0, 0.999)))


def made_plan(prompt: tuple[Tensor, Tensor, Tensor, float]) -> InnerPlan:
    hidden, received, visual, ratio = prompt
    return plan_inner(hidden, received, visual, kept_tokens(len(visual), ratio))


@given(prompts())
def test_what_stays(prompt: tuple[Tensor, Tensor, Tensor, float]) -> None:
    """As many as asked for, in order, the ones that receive most, ties to the lower position; and all of the text."""
    hidden, received, visual, ratio = prompt
    plan = made_plan(prompt)
    count = round(len(visual) * (1 - ratio))
    assert len(plan.targets) == (max(count, 1) if len(visual) else 0)
    best = sorted(visual.tolist(), key=lambda n: (-float(received[n]), n))[: len(plan.targets)]
    assert plan.targets.tolist() == sorted(best)
    assert plan.folded.tolist() == sorted(set(visual.tolist()) - set(best))
    assert plan.kept.tolist() == sorted(set(range(len(hidden))) - set(plan.folded.tolist()))


@given(prompts())
def test_text_is_not_touched(prompt: tuple[Tensor, Tensor, Tensor, float]) -> None:
    """Bit for bit; and what the text is like changes nothing of the decision."""
    hidden, received, visual, ratio = prompt
    plan = made_plan(prompt)
    text = ~torch.isin(torch.arange(len(hidden)), visual)
    merged = plan.apply(hidden)
    assert torch.equal(merged[text[plan.kept]], hidden[text])
    other, loud = hidden.clone(), received.clone()
    other[text], loud[text] = 7, 9
    again = made_plan((other, loud, visual, ratio))
    assert torch.equal(again.into, plan.into)
    assert torch.equal(again.apply(other)[~text[plan.kept]], merged[~text[plan.kept]])


@given(prompts())
def test_each_goes_where_it_is_most_alike(prompt: tuple[Tensor, Tensor, Tensor, float]) -> None:
    hidden, plan = prompt[0].double(), made_plan(prompt)
    for folded, into in zip(plan.folded, plan.into, strict=True):
        norms = hidden[plan.targets].norm(dim=1) * hidden[folded].norm()
        cosines = hidden[plan.targets] @ hidden[folded] / norms
        assert float(cosines[into]) > float(cosines.max()) - 1e-5
        assert bool((cosines[:into] < cosines.max()).all())  # ties go to the first


@given(prompts())
def test_weights_are_convex(prompt: tuple[Tensor, Tensor, Tensor, float]) -> None:
    own, shares = made_plan(prompt).weights()
    assert bool((own > 0).all())
    assert bool((shares >= 0).all())
    assert torch.allclose(own + shares.sum(1), torch.ones_like(own), rtol=0, atol=1e-6)
    assert bool(((shares > 0).sum(0) == 1).all())  # each folded token goes to one target


@given(prompts())
def test_the_closed_form_is_the_sequential_fold(prompt: tuple[Tensor, Tensor, Tensor, float]) -> None:
    hidden, plan = prompt[0], made_plan(prompt)
    want = hidden.double().clone()
    for folded, into in zip(plan.folded.tolist(), plan.into.tolist(), strict=True):
        target = int(plan.targets[into])
        want[target] = (want[target] + want[folded]) / 2
    scale = float(hidden.abs().max())
    assert torch.allclose(plan.apply(hidden).double(), want[plan.kept], rtol=0, atol=1e-6 * scale)


@given(prompts())
def test_ratio_0_is_the_identity_bit_for_bit(prompt: tuple[Tensor, Tensor, Tensor, float]) -> None:
    hidden, received, visual, _ = prompt
    plan = made_plan((hidden, received, visual, 0.0))
    assert torch.equal(plan.apply(hidden), hidden)
    assert plan.kept.tolist() == list(range(len(hidden)))


def test_equally_alike_is_not_decided_by_rounding() -> None:
    """Targets that point the same way are equally like anything: the first of them takes all."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        direction, other = torch.randn(2, 33, generator=generator)
        scales = 0.1 + torch.rand(20, 1, generator=generator)
        hidden = torch.cat([scales * direction, direction + 0.3 * torch.randn(5, 33, generator=generator), other[None]])
        plan = plan_inner(hidden, torch.arange(26.0).flip(0), torch.arange(25), 20)
        assert plan.into.tolist() == [0] * 5


def test_many_into_one() -> None:
    """The weight of the first of 300 is far below the smallest number: it is zero, and nothing is infinite."""
    hidden = torch.randn(301, 4)
    plan = plan_inner(hidden, torch.arange(301.0).flip(0), torch.arange(301), 1)
    assert plan.kept.tolist() == [0]
    halves = torch.stack([0.5 ** (300 - n) * hidden[n + 1] for n in range(300)])
    assert torch.allclose(plan.apply(hidden)[0], halves.sum(0), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    hidden = torch.randn(60, 16).to(dtype)
    plan = plan_inner(hidden, torch.rand(60), torch.arange(5, 55), 10)
    got = plan.apply(hidden)
    assert got.dtype == dtype
    assert torch.equal(got, plan.apply(hidden.float()).to(dtype))


def test_shapes_need_no_values() -> None:
    """On the meta device there are none, so nothing can have been read back to the host."""
    with torch.device("meta"):
        plan = plan_inner(torch.empty(50, 8), torch.empty(50), torch.empty(30, dtype=torch.int64), 12)
        assert plan.apply(torch.empty(50, 8)).shape == (50 - 18, 8)
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):  # negative control
            torch.empty(5).nonzero().tolist()


@pytest.mark.parametrize(
    ("tokens", "ratio", "kept"),
    [(161, 0.5, 80), (483, 0.5, 242), (40, 0.75, 10), (33, 0.25, 25), (20, 0.0, 20), (1, 0.5, 1), (0, 0.5, 0)],
)
def test_kept_tokens(tokens: int, ratio: float, kept: int) -> None:
    assert kept_tokens(tokens, ratio) == kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.ones(1, 5, 2)}, r"takes hidden \[T, D\], received \[T\] and visual \[L\], got \[1, 5, 2\]"),
        ({"received": torch.ones(2, 5)}, r"got \[5, 2\], \[2, 5\] and \[3\]"),
        ({"visual": torch.ones(5, 1, dtype=torch.int64)}, r"and \[5, 1\]"),
        ({"keep": 0}, "of 3 visual tokens at least one and at most all can stay, got keep=0"),
        ({"keep": 4}, "got keep=4"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(change: dict[str, Any], message: str) -> None:
    right: dict[str, Any] = {
        "hidden": torch.ones(5, 2),
        "received": torch.ones(5),
        "visual": torch.arange(3),
        "keep": 2,
    }
    assert len(plan_inner(**right).kept) == 4
    with pytest.raises(UserError, match=message):
        plan_inner(**(right | change))
