"""vLLM in this process: its engine, in an event loop of its own thread.

vLLM's pinned dependencies may conflict with this project's: see "vLLM" in runtime/README.md. The model's layers run in
a subprocess that vLLM starts and ends.
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import threading
from collections.abc import Callable, Coroutine, Generator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from torch import Tensor

from earlytom.errors import UserError
from runtime.decoder.sampling import Sampling
from runtime.decoder.vllm.prompts import CONCURRENT, Step, VllmDecoder, finish_of
from runtime.errors import DecoderFailed

_STOP_SECONDS = 30.0


class InsideDecoder(VllmDecoder):
    """The decoder of a folder that `runtime.checkpoint.language_model` wrote; see `VllmDecoder`.

    Args:
        folder: needed until the constructor returns.
        embeddings: [V, D] of the language model.
        context: the model's number of positions.

    Raises:
        UserError: vLLM is not installed.
        DecoderFailed: it does not start.
    """

    def __init__(self, folder: Path, embeddings: Tensor, context: int, *, concurrent: int = CONCURRENT) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise UserError(
                "vLLM is not installed, which --decoder vllm decodes with: install it, or start it elsewhere and give "
                "its address (--decoder http://HOST:8000/v1)"
            )
        self._numbers = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="earlytom-vllm", daemon=True)
        self._thread.start()
        self._engine: Any = None
        super().__init__(embeddings, context, concurrent=concurrent)
        try:
            self._engine = self._wait(self._start(folder))
        except Exception as error:  # vLLM fails with errors of many types, a page long each
            self.close()
            raise DecoderFailed(f"vLLM does not start ({type(error).__name__}); what it printed tells why") from error

    async def _start(self, folder: Path) -> Any:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        return AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=str(folder),
                dtype=str(self.dtype).removeprefix("torch."),
                max_model_len=self.limit,
                max_num_seqs=self.concurrent,
                enable_prompt_embeds=True,
                enable_prefix_caching=True,
            )
        )

    def steps(
        self, embeds: Tensor, max_new_tokens: int, stop_ids: frozenset[int], sampling: Sampling
    ) -> Generator[Step, None, None]:
        """As of `VllmDecoder`."""
        if self._engine is None:
            raise DecoderFailed("vLLM is closed")
        news: SimpleQueue[Step | BaseException | None] = SimpleQueue()
        work = self._answer(embeds, max_new_tokens, stop_ids, sampling, news.put)
        running = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            while (step := news.get()) is not None:
                if isinstance(step, BaseException):
                    raise DecoderFailed(f"vLLM failed ({type(step).__name__}); what it printed tells why") from step
                yield step
        finally:
            running.cancel()  # aborts the request in vLLM, unless it has ended

    async def _answer(
        self,
        embeds: Tensor,
        max_new_tokens: int,
        stop_ids: frozenset[int],
        sampling: Sampling,
        tell: Callable[[Step | BaseException | None], None],
    ) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        how = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=sampling.seed,
            max_tokens=max_new_tokens,
            stop_token_ids=sorted(stop_ids),
            ignore_eos=True,  # `stop_token_ids` end an answer
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        prompt = {"prompt_embeds": embeds.to("cpu", copy=True).contiguous()}
        try:
            async for output in self._engine.generate(prompt, how, f"earlytom-{next(self._numbers)}"):
                one = output.outputs[0]
                tell(Step(list(one.token_ids), finish_of(one.finish_reason)))
        except Exception as error:
            tell(error)
        finally:
            tell(None)

    def close(self) -> None:
        """End vLLM's processes. A second call does nothing."""
        if self._loop.is_closed():
            return
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.shutdown()
        self._wait(self._end_tasks())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_STOP_SECONDS)
        if not self._thread.is_alive():
            self._loop.close()

    async def _end_tasks(self) -> None:
        """Cancel the tasks that vLLM left in the loop."""
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
