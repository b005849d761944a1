"""A closed loop of clients on a pipeline, each of which asks again once it is answered."""

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
    """A pipeline with the given engine (default: the newest) and room for `waiting` requests in line."""
    folder = asked.engine[0] if asked.engine else newest_engine(ENGINES)
    dtype = None if asked.dtype is None else DTYPES[asked.dtype]
    how: dict[str, Any] = {"device": asked.device, "dtype": dtype, "decoder_dtype": asked.decoder_dtype}
    return Pipeline.load(folder, asked.model, waiting=waiting, **how)


def conditions(asked: BenchSettings, pipeline: Pipeline) -> dict[str, Any]:
    """A record's fields about engine and machine."""
    return {
        "engine": pipeline.manifest.name,
        "backend": pipeline.vision.name,
        "device": asked.device,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
    }


@contextmanager
def clients(count: int, requests: int, ask: Callable[[int], None]) -> Iterator[None]:
    """Within the block, `count` client threads make `requests` requests between them.

    `ask` is called with a request's number, from 1, and returns once it is answered. The block's end waits for the
    clients. After a failed request or an error in the block no client begins another request; an error in the block
    is raised without waiting.
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
        except BaseException as error:  # raised again in the block's thread
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
