"""A pipeline behind Triton's Python backend; `config.pbtxt` beside it has the inputs and the outputs.

Each request streams on a thread of its own, so Triton may hand over the next at once: the pipeline has the line.
"""

from __future__ import annotations

import importlib
import json
import threading
from typing import Any

from earlytom.errors import UserError


class TritonPythonModel:
    """What Triton loads, calls and unloads."""

    def initialize(self, args: dict[str, str]) -> None:
        from runtime.pipeline import Pipeline

        parameters = {name: one["string_value"] for name, one in json.loads(args["model_config"])["parameters"].items()}
        self._backend = importlib.import_module("triton_python_backend_utils")
        self._deadline = float(parameters["deadline"])
        self._pipeline = Pipeline.load(parameters["engine"], parameters["model"])
        self._threads: set[threading.Thread] = set()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            thread = threading.Thread(target=self._answer, args=(request, request.get_response_sender()))
            self._threads = {one for one in self._threads if one.is_alive()} | {thread}
            thread.start()

    def finalize(self) -> None:
        for thread in self._threads:
            thread.join()
        self._pipeline.close()

    def _answer(self, request: Any, sender: Any) -> None:
        """Send the deltas of one answer; an error is one response, without details where it is a defect of ours."""
        backend = self._backend
        try:
            video, question = (_first(backend, request, name) for name in ("VIDEO", "QUESTION"))
            most = _first(backend, request, "MAX_TOKENS")
            more: dict[str, Any] = {} if most is None else {"max_new_tokens": int(most)}
            for delta in self._pipeline.stream(video, question.decode(), deadline=self._deadline, **more):
                if delta.text:
                    sender.send(backend.InferenceResponse([backend.Tensor("TEXT", _text(delta.text))]))
        except Exception as error:
            known = isinstance(error, UserError | UnicodeDecodeError)
            told = backend.TritonError(str(error) if known else f"the answer failed ({type(error).__name__})")
            sender.send(backend.InferenceResponse([], told))
        sender.send(flags=backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _first(backend: Any, request: Any, name: str) -> Any:
    tensor = backend.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy().flat[0]


def _text(text: str) -> Any:
    import numpy as np

    return np.array([text.encode()], dtype=object)
