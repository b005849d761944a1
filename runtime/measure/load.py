"""Load: an engine as a service opens it, and clients, each of which asks again as soon as it was answered."""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from runtime.engine.dtypes import DTYPES
from runtime.engine.folder import ENGINES, newest_engine
from runtime.measure.arguments import BenchSettings
from runtime.pipeline import Pipeline


def opened(asked: BenchSettings, *, waiting: int) -> Pipeline:
    """The engine that is asked for, the newest if none is, in a pipeline in whose line so many requests may wait."""
    folder = asked.engine[0] if asked.engine else newest_engine(ENGINES)
    dtype = None if asked.dtype is None else DTYPES[asked.dtype]
    how: dict[str, Any] = {"device": asked.device, "dtype": dtype, "decoder_dtype": asked.decoder_dtype}
    return Pipeline.load(folder, asked.model, waiting=waiting, **how)


def conditions(asked: BenchSettings, pipeline: Pipeline) -> dict[str, Any]:
    """What a record says of the engine and the machine that its figures are of."""
    return {
        "engine": pipeline.manifest.name,
        "backend": pipeline.vision.name,
        "device": asked.device,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
    }


@contextmanager
def clients(count: int, requests: int, ask: Callable[[int], None]) -> Iterator[None]:
    """`count` clients in threads of their own, who make `requests` requests between them.

    `ask` is called with the number of a request, from 1, and returns when it was answered. The clients begin with the
    block, and its end waits for them. None begins another request after one has failed, or after an error in the
    block, which waits for nobody.
    """
    numbers, lock, stop = iter(range(1, requests + 1)), threading.Lock(), threading.Event()
    errors: list[BaseException] = []

    def client() -> None:
        try:
            while not stop.is_set():
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                ask(number)
        except BaseException as error:  # raised again where it can be seen, in the thread of the block
            errors.append(error)
            stop.set()

    threads = [threading.Thread(target=client, daemon=True) for _ in range(count)]
    try:
        for thread in threads:
            thread.start()
        yield
        for thread in threads:
            thread.join()
    finally:
        stop.set()
    if errors:
        raise errors[0]
