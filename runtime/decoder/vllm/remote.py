"""A vLLM server as the decoder: prompt embeddings go to its completions endpoint, token ids come back.

The server must be started with `--enable-prompt-embeds`, on the folder that `python -m runtime.extract_decoder` wrote
from the engine's checkpoint. Of this only the embeddings' width can be checked.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Generator
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from earlytom.numbers import shown
from runtime.decoder.naming import DecoderAddress
from runtime.decoder.sampling import GREEDY, Sampling
from runtime.decoder.vllm.prompts import CONCURRENT, Step, VllmDecoder, finish_of, ids_of
from runtime.decoder.vllm.wire import SILENT_SECONDS, Wire
from runtime.errors import DecoderFailed

_BYTES_A_TOKEN, _BYTES_AT_ALL = 4 << 10, 1 << 20  # of an answer's events


class RemoteDecoder(VllmDecoder):
    """The decoder at an address; see `VllmDecoder`.

    Args:
        address, key, silent_seconds: as of `Wire`.
        embeddings: [V, D] of the language model.
        context: the model's number of positions; the server's limit holds if it is lower.

    Raises:
        DecoderAway: the server cannot be reached or is busy.
        DecoderFailed: it is no vLLM server, lacks the model, or refuses these embeddings.
    """

    def __init__(
        self,
        address: DecoderAddress,
        embeddings: Tensor,
        context: int,
        *,
        key: str | None = None,
        concurrent: int = CONCURRENT,
        silent_seconds: float = SILENT_SECONDS,
    ) -> None:
        self._wire = Wire(address, key, silent_seconds=silent_seconds)
        self._model, longest = _model_of(self._wire.get("/models"), address)
        super().__init__(embeddings, min(context, longest), concurrent=concurrent)
        # A probe of one token: does the server accept embeddings, and of this width?
        with closing(self.steps(self._embeddings[:1], 1, frozenset(), GREEDY)) as steps:
            for _ in steps:
                pass

    def steps(
        self, embeds: Tensor, max_new_tokens: int, stop_ids: frozenset[int], sampling: Sampling
    ) -> Generator[Step, None, None]:
        """As of `VllmDecoder`. Sampling defaults from the checkpoint's generation settings are overridden."""
        body: dict[str, Any] = {
            "model": self._model,
            "prompt_embeds": packed(embeds),
            "max_tokens": max_new_tokens,
            "stop_token_ids": sorted(stop_ids),
            "ignore_eos": True,  # `stop_token_ids` end an answer
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "seed": sampling.seed,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stream": True,
            "return_token_ids": True,
        }
        most = _BYTES_AT_ALL + _BYTES_A_TOKEN * max_new_tokens + 16 * len(embeds)
        with closing(self._wire.events("/completions", body, most=most)) as events:
            for event in events:
                step = _step_of(event)
                yield step
                if step.finish is not None:
                    return


def packed(embeds: Tensor) -> str:
    """Embeddings [L, D] in vLLM's format: torch.save in base64."""
    buffer = io.BytesIO()
    torch.save(embeds.to("cpu", copy=True).contiguous(), buffer)  # a view would be saved with its whole storage
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _model_of(reply: Any, address: DecoderAddress) -> tuple[str, int]:
    """Name and context length of the model to use, from the server's list."""
    listed = reply.get("data") if isinstance(reply, dict) else None
    found: dict[str, int] = {}
    for one in listed if isinstance(listed, list) else []:
        if isinstance(one, dict) and isinstance(one.get("id"), str) and type(one.get("max_model_len")) is int:
            found[one["id"]] = one["max_model_len"]
    if not found:
        raise DecoderFailed(f"{address.url} lists no model with its max_model_len: is it a vLLM server?")
    if address.model is None and len(found) > 1:
        raise DecoderFailed(
            f"{address.url} has {len(found)} models: name one of {', '.join(map(shown, sorted(found)[:3]))} behind a "
            "#, as in http://HOST:8000/v1#NAME"
        )
    name = next(iter(found)) if address.model is None else address.model
    if name not in found:
        raise DecoderFailed(f"{address.url} has no model {shown(name)}, but {', '.join(map(shown, sorted(found)[:3]))}")
    if found[name] < 3:
        raise DecoderFailed(f"{address.url} has a model with {found[name]} positions, and none is left for an answer")
    return name, found[name]


def _step_of(event: Any) -> Step:
    """The step in one event; an empty one for other events (usage, for one)."""
    choices = event.get("choices") if isinstance(event, dict) else None
    if not isinstance(choices, list) or any(not isinstance(one, dict) for one in choices):
        raise DecoderFailed("the decoder sent an event without choices: is it a vLLM server?")
    if not choices:
        return Step(())
    if len(choices) > 1:
        raise DecoderFailed(f"the decoder sent {len(choices)} choices and was asked for one")
    return Step(ids_of(choices[0].get("token_ids")), finish_of(choices[0].get("finish_reason")))
