"""The server's process: its socket, its pipeline, and how it ends.

SIGTERM and SIGINT begin a drain: /ready says no and new questions are refused, while those inside are answered; then
the process ends with 0. A second signal ends it at once. The socket is bound before the model is loaded, so that a
port that is taken is refused in the first second, and listens when the model is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from earlytom.errors import UserError
from runtime.serve.app import ServerApp, create_app
from runtime.serve.backend import Backend, Local
from runtime.serve.decoding import Decoders
from runtime.serve.gate import load_keys
from runtime.serve.http.connection import connections
from runtime.serve.loading import decoders_of, load_pipeline
from runtime.serve.settings import Settings
from runtime.trace import Trace

_DRAIN_POLL_SECONDS = 0.02
_CLOSE_SECONDS = 5  # for clients that still read when all is answered


Behind = Callable[[Settings, Callable[..., Any], Trace], contextlib.AbstractContextManager[Backend]]


def serve(settings: Settings, trace: Trace, behind: Behind | None = None) -> None:
    """Load the engine and serve it until a signal ends that.

    Args:
        behind: makes the backend, with `Decoders.clip`; it ends with its context. By default a pipeline here.

    Raises:
        UserError: a setting that cannot be had: the port is taken, no key in the file, no room for one video.
        EngineError: as `Pipeline.load`.
    """
    keys = () if settings.api_key_file is None else load_keys(settings.api_key_file)
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(contextlib.closing(bind(settings.host, settings.port)))
        decoding = decoders_of(settings)
        backend = stack.enter_context((local if behind is None else behind)(settings, decoding.clip, trace))
        if not keys:
            trace.line("note: whoever reaches the port may ask: give --api-key-file where that is not meant")
        app = create_app(backend, settings, keys)
        stack.enter_context(contextlib.closing(app))
        all_answered = run(app, decoding, listening, lambda url: trace.line(f"serving {settings.name} on {url}/v1"))
    trace.line("stopped: all that was asked is answered" if all_answered else "stopped at once, by a second signal")


@contextlib.contextmanager
def local(settings: Settings, decode: Callable[..., Any], trace: Trace) -> Iterator[Backend]:
    """The backend with a pipeline of this process."""
    with load_pipeline(settings) as pipeline:
        trace.line(f"engine: {pipeline.manifest.name} ({pipeline.vision.name})")
        for note in pipeline.notes:
            trace.line(f"note: {note}")
        sampled = functools.partial(decode, sampling=pipeline.manifest.model.preprocessing.sampling)
        yield Local(pipeline, sampled, videos=settings.videos)


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet. Raises UserError where there is none to be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(f"--host {host!r} is no address of this machine ({error.strerror or error})") from error
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind(address)
    except (OSError, OverflowError) as error:
        made.close()
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on --host {host} --port {port} ({reason}); give another port") from error
    return made


def run(app: ServerApp, decoding: Decoders, listening: socket.socket, started: Callable[[str], object]) -> bool:
    """Serve on a bound socket until a signal has been followed by a drain; False where a second one has cut that short.

    started: told the address once clients are answered.
    """
    config = uvicorn.Config(
        app,
        http=connections(header_seconds=app.settings.body_seconds),
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=_CLOSE_SECONDS,
    )
    server = DrainingServer(config, app, lambda: started(_url(listening)))

    async def serve() -> None:
        try:
            await decoding.start()
            await server.serve(sockets=[listening])
        finally:
            await decoding.close()

    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(serve())
    return not server.force_exit


class DrainingServer(uvicorn.Server):
    """A uvicorn server that goes on answering what it has taken when it is told to stop."""

    def __init__(self, config: uvicorn.Config, app: ServerApp, told: Callable[[], object]) -> None:
        super().__init__(config)
        self._app, self._told = app, told
        self._draining: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """In the place of uvicorn's, which ends the process by the signal once it has stopped."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.drain)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self._told()

    def drain(self) -> None:
        """Stop once all is answered; called again, now."""
        if self._draining is not None:
            self.should_exit = self.force_exit = True
            return
        self._app.draining = True
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        while self._app.busy:
            await asyncio.sleep(_DRAIN_POLL_SECONDS)
        self.should_exit = True


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
