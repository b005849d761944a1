"""A stand-in for a vLLM server: its completions endpoint as far as it is spoken here, with a decoder that is real.

It takes `prompt_embeds` as vLLM does, refuses what vLLM refuses, decodes with `runtime.decoder.eager` and sends events
as vLLM sends them. What it was sent is kept. `Raw` is a server that sends whatever bytes it is told to.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor

from runtime.decoder.eager import Decoder
from runtime.decoder.sampling import Sampling

NAME = "language-model"
LISTED = {"object": "list", "data": [{"id": NAME, "object": "model", "max_model_len": 512}]}


class StandIn:
    """The server.

    Attributes:
        embeds, bodies: what was sent, in the order in which it came.
        left: clients that went away before the end.
        hold: called with each token before it is sent.
        inside, most: answers under way, and the most that ever were.
    """

    def __init__(self, decoder: Decoder, listed: Any = LISTED, *, key: str | None = None) -> None:
        self._decoder, self._listed, self._key = decoder, listed, key
        self._turn, self._count = threading.Lock(), threading.Lock()
        self.embeds: list[Tensor] = []
        self.bodies: list[dict[str, Any]] = []
        self.left = threading.Semaphore(0)
        self.hold: Callable[[int], object] = lambda token: None
        self.inside = self.most = 0

    def answer(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a request. Raises ValueError for what vLLM refuses with 400."""
        content = base64.b64decode(body["prompt_embeds"], validate=True)
        embeds = torch.load(io.BytesIO(content), weights_only=True)
        width = self._decoder.embed(torch.tensor([0])).shape[-1]
        if embeds.ndim != 2 or embeds.shape[1] != width:
            raise ValueError(f"`prompt_embeds` hidden_size {embeds.shape[-1]} does not match {width}.")
        self.embeds.append(embeds)
        self.bodies.append({name: value for name, value in body.items() if name != "prompt_embeds"})
        return self._events(embeds, body)

    def _events(self, embeds: Tensor, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        how = Sampling(body["temperature"], body["top_p"], body["top_k"], body["seed"])
        with self._count:
            self.inside += 1
            self.most = max(self.most, self.inside)
        try:
            with self._turn:  # the decoder has one stream at a time
                ids = list(
                    self._decoder.stream(embeds[None], max_new_tokens=body["max_tokens"], sampling=how, stop_ids=())
                )
            stops = set(body["stop_token_ids"])
            end = next((at for at, token in enumerate(ids) if token in stops), None)
            ids = ids if end is None else ids[: end + 1]
            for at, token in enumerate(ids):
                self.hold(token)
                last = at == len(ids) - 1
                finish = None if not last else "length" if end is None else "stop"
                prompt = [0] * len(embeds) if at == 0 else None
                choice = {"index": 0, "text": "x", "finish_reason": finish, "token_ids": [token]}
                yield {"id": "cmpl", "choices": [choice | {"prompt_token_ids": prompt}]}
        finally:
            with self._count:
                self.inside -= 1


@contextlib.contextmanager
def standing(stand_in: StandIn) -> Iterator[str]:
    """The address, while it is served."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *words: Any) -> None:
            pass

        def reply(self, status: int, content: Any) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def refused(self) -> bool:
            if stand_in._key is None or self.headers["authorization"] == f"Bearer {stand_in._key}":
                return False
            self.reply(401, {"error": "Unauthorized"})
            return True

        def do_GET(self) -> None:
            if not self.refused():
                self.reply(200 if self.path == "/v1/models" else 404, stand_in._listed)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if self.refused():
                return
            if self.path != "/v1/completions" or body["model"] != NAME or not body["return_token_ids"]:
                self.reply(404, {"error": {"message": "The model does not exist."}})
                return
            try:
                events = stand_in.answer(body)
            except ValueError as error:
                self.reply(400, {"error": {"message": str(error), "code": 400}})
                return
            self.send_response(200)
            self.send_header("content-type", "text/event-stream; charset=utf-8")
            self.send_header("connection", "close")
            self.end_headers()
            try:
                for event in events:
                    self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                    self.wfile.flush()
                self.wfile.write(b"data: [DONE]\n\n")
            except OSError:
                events.close()  # type: ignore[attr-defined]
                stand_in.left.release()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Raw:
    """A server that answers each connection's request with some pieces of bytes, and then closes it or waits.

    Attributes:
        pieces: what is sent. waits: after that the connection stays open, until the server ends.
    """

    def __init__(self, *pieces: bytes, waits: bool = False) -> None:
        self.pieces, self.waits = pieces, waits
        self._over = threading.Event()

    @contextlib.contextmanager
    def standing(self) -> Iterator[str]:
        listening = socket.create_server(("127.0.0.1", 0))

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = listening.accept()
                    threading.Thread(target=self._answer, args=(client,), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        finally:
            self._over.set()
            listening.shutdown(socket.SHUT_RDWR)
            listening.close()

    def _answer(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                head += client.recv(1 << 16)
            head, _, body = head.partition(b"\r\n\r\n")
            length = next(
                (line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length: ")), b": 0"
            )
            while len(body) < int(length.split()[1]):  # or closing would throw away what was sent
                body += client.recv(1 << 16)
            for piece in self.pieces:
                client.sendall(piece)
            if self.waits:
                self._over.wait()


def reply(content: bytes, status: str = "200 OK", kind: str = "text/event-stream") -> bytes:
    """An HTTP response that ends with its connection."""
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nConnection: close\r\n\r\n".encode() + content
