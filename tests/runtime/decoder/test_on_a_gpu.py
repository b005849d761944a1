"""Decode steps as CUDA graphs: what recordings cannot show. Needs a GPU; test_decode_step.py has the rest."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.decoder.eager import Decoder
from runtime.decoder.picking import Picker
from runtime.decoder.placing import Placed
from runtime.decoder.sampling import GREEDY, Sampling
from runtime.gpu.graphs import Replay, ToHost
from runtime.text.prompt import Prompt, splice
from tests.processes import HANG_SECONDS
from tests.runtime.decoder.tiny_decoder import BUCKETS, WIDTH, answer, make_llama, make_qwen, prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that torch can use"),
]
SAMPLINGS = [GREEDY, Sampling(1.0, seed=3), Sampling(0.7, top_p=0.9, top_k=20, seed=4)]


def on_gpu(length: int, seed: int = 0) -> Tensor:
    return prompt(length, seed).cuda()


def called(model: Any) -> Decoder:
    """A decoder whose steps are not captured."""
    replay = Replay(torch.device("cuda"))
    replay.refuse("for comparison")
    return Decoder.from_model(model, buckets=BUCKETS, replay=replay)


@pytest.fixture
def model() -> Any:
    return make_qwen().cuda()


@pytest.fixture
def decoder(model: Any) -> Decoder:
    return Decoder.from_model(model, buckets=BUCKETS)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", [make_qwen, make_llama])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_replayed_steps_answer_as_called_ones(make: Any, dtype: torch.dtype, sampling: Sampling) -> None:
    model = make().to("cuda", dtype)
    decoder, eager = Decoder.from_model(model, buckets=BUCKETS), called(model)
    seen = set()
    for length, new, seed in [(3, 8, 0), (9, 8, 1), (3, 8, 2), (40, 24, 0), (3, 13, 3), (100, 28, 0), (9, 8, 4)]:
        tokens = answer(decoder, on_gpu(length, seed), new, sampling)
        assert tokens == answer(eager, on_gpu(length, seed), new, sampling)
        seen.add(tuple(tokens))
    assert len(seen) == 7  # a changed input changes the output
    assert decoder.replay.reason is None
    assert all(bucket in decoder.replay for bucket in BUCKETS)
    assert eager.replay.reason == "for comparison"


def test_a_prefix_gives_what_the_whole_prompt_gives(decoder: Decoder) -> None:
    whole = on_gpu(30)
    prefix = decoder.prefill(whole[:, :20])
    for _ in range(2):
        assert answer(decoder, whole[:, 20:], 12, prefix=prefix) == answer(decoder, whole, 12)
        answer(decoder, on_gpu(3), 12, prefix=prefix)


def test_a_greedy_step_allocates_nothing(decoder: Decoder) -> None:
    decoder.warm_up([60])
    stream = decoder.stream(on_gpu(20), max_new_tokens=30)
    next(stream)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(20):
        next(stream)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    torch.empty(1, device="cuda")  # negative control
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before + 1


def test_requests_ask_the_driver_for_no_memory(decoder: Decoder) -> None:
    prefix = decoder.prefill(on_gpu(20))

    def requests() -> None:
        for sampling in SAMPLINGS:
            answer(decoder, on_gpu(20), 30, sampling)
            answer(decoder, on_gpu(5), 30, sampling, prefix=prefix)

    decoder.warm_up([60])
    requests()
    before = torch.cuda.memory_stats()["segment.all.allocated"]
    for _ in range(3):
        requests()
    assert torch.cuda.memory_stats()["segment.all.allocated"] == before


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_host_waits_for_nothing_but_the_token(decoder: Decoder, sampling: Sampling) -> None:
    prefix, embeds = decoder.prefill(on_gpu(20)), on_gpu(5)
    pick = Picker(sampling, decoder.device)
    for start in (prefix, None, prefix):
        cache = decoder._cleared_cache(60)
        with no_synchronisation():
            decoder._read_prompt(embeds, cache, None, start)
            decoder._choose(pick)
            for _ in range(5):
                assert decoder._to_host(decoder._chosen) >= 0
                decoder._advance(cache, None)
                decoder._choose(pick)
    with pytest.raises(RuntimeError, match="synchroniz"), no_synchronisation():
        decoder._chosen.item()  # negative control


# With positions and a bias


def places(length: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 * seed + length)
    return {
        "positions": torch.randint(1, 5, (length,), generator=generator).cumsum(0).cuda(),
        "bias": torch.randn(length, generator=generator).cuda() * 2,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", [make_qwen, make_llama])
def test_replayed_steps_with_places_answer_as_called_ones(make: Any, dtype: torch.dtype) -> None:
    model = make().to("cuda", dtype)
    decoder, eager = Decoder.from_model(model, buckets=BUCKETS), called(model)
    seen = set()
    for length, new, seed in [(9, 8, 0), (40, 24, 0), (9, 8, 1)]:
        whole = places(length, seed)
        for how in (whole, {}, {"positions": whole["positions"]}, {"bias": whole["bias"]}):
            tokens = answer(decoder, on_gpu(length, seed), new, **how)
            assert tokens == answer(eager, on_gpu(length, seed), new, **how)
            seen.add(tuple(tokens))
    assert len(seen) > 6
    assert decoder.replay.reason is None
    assert all((bucket, kind) in decoder.replay for bucket in (32, 64) for kind in ("bias", "positions"))


def test_on_a_gpu_places_give_what_they_give_on_the_cpu(decoder: Decoder) -> None:
    there, whole = Decoder.from_model(make_qwen(), buckets=BUCKETS), places(30)
    held = {name: values.cpu() for name, values in whole.items()}
    assert answer(decoder, on_gpu(30), 12, **whole) == answer(there, prompt(30), 12, **held)
    prefix = decoder.prefill(on_gpu(30)[:, :20], **{name: values[:20] for name, values in whole.items()})
    rest = {name: values[20:] for name, values in whole.items()}
    assert answer(decoder, on_gpu(30)[:, 20:], 12, prefix=prefix, **rest) == answer(decoder, on_gpu(30), 12, **whole)


def test_a_greedy_step_with_a_bias_allocates_nothing(decoder: Decoder) -> None:
    decoder.warm_up([60], positions=True, bias=True)
    stream = decoder.stream(on_gpu(20), max_new_tokens=30, **places(20))
    next(stream)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(20):
        next(stream)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_with_places_the_host_waits_for_nothing_but_the_token(decoder: Decoder) -> None:
    prefix, embeds, how = decoder.prefill(on_gpu(20), **places(20)), on_gpu(5), places(5)
    for start in (prefix, None, prefix):
        cache = decoder._cleared_cache(60, Placed.of(5, how["positions"], how["bias"], start, decoder.device))
        with no_synchronisation():
            placed = Placed.of(5, how["positions"], how["bias"], start, decoder.device)
            decoder._read_prompt(embeds, cache, None, start, placed)
            decoder._choose(Picker(GREEDY, decoder.device))
            for _ in range(5):
                assert decoder._to_host(decoder._chosen) >= 0
                decoder._advance(cache, None)


def test_text_is_embedded_without_waiting_for_the_video(decoder: Decoder) -> None:
    words, newline = Prompt((1, 2, 3), (4, 5), 9), torch.zeros(WIDTH, device="cuda")
    visual = torch.randn(10, WIDTH, device="cuda")
    for _ in range(2):  # the first call asks the driver for pinned memory, which waits
        torch.cuda.synchronize()
        torch.cuda._sleep(200_000_000)  # the vision engine
        with no_synchronisation():
            whole = splice(words, torch.cat([visual, newline[None]]), decoder.embed)
            rest = decoder.embed(torch.tensor([[4, 5]]))
        busy = not torch.cuda.current_stream().query()
    assert busy
    assert torch.equal(whole[:, -2:], rest)
    assert torch.equal(whole[0, 3:13], visual)


def test_numbers_are_read_as_of_now() -> None:
    read, number = ToHost(torch.device("cuda")), torch.zeros((), dtype=torch.int64, device="cuda")
    for value in (5, -1, 7):
        torch.cuda._sleep(10_000_000)
        number.fill_(value)
        assert read(number) == value


def test_weights_that_change_in_place_are_followed(decoder: Decoder, model: Any) -> None:
    first = answer(decoder, on_gpu(9))
    with torch.no_grad():
        model.get_decoder().layers[1].mlp.down_proj.weight.mul_(-1)
    assert first != answer(decoder, on_gpu(9)) == answer(called(model), on_gpu(9))
    decoder.replay.clear()
    assert answer(decoder, on_gpu(9)) == answer(called(model), on_gpu(9))
    assert 32 in decoder.replay


def test_a_capture_that_fails_costs_no_answer(decoder: Decoder, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, step = torch.cuda.current_stream(), decoder._step

    def waits(*args: Any) -> None:
        step(*args)
        decoder._chosen.item()

    monkeypatch.setattr(decoder, "_step", waits)
    for length in (3, 9, 40):
        assert answer(decoder, on_gpu(length)) == answer(called(model), on_gpu(length))
    assert str(decoder.replay.reason).startswith("the capture of a CUDA graph failed: ")
    assert not any(bucket in decoder.replay for bucket in BUCKETS)
    assert torch.cuda.current_stream() == stream
    monkeypatch.undo()
    decoder.replay.clear()
    assert answer(decoder, on_gpu(9)) == answer(called(model), on_gpu(9))
    assert 32 in decoder.replay


def test_another_thread_may_allocate_during_a_capture(decoder: Decoder, model: Any) -> None:
    done = threading.Event()

    def allocate() -> None:
        size = 1 << 20
        while not done.is_set():
            torch.ones(size, device="cuda").sum().item()
            size += 1 << 20 if size < 1 << 26 else -(1 << 26) + (1 << 20)

    thread = threading.Thread(target=allocate)
    thread.start()
    try:
        decoder.warm_up(BUCKETS)
    finally:
        done.set()
        thread.join(HANG_SECONDS)
    assert decoder.replay.reason is None
    assert answer(decoder, on_gpu(40)) == answer(called(model), on_gpu(40))
