"""Loads the pipeline of a server's settings, in the server's process or in a replica's."""

from __future__ import annotations

import torch

from earlytom.errors import UserError
from runtime.engine.dtypes import DTYPES
from runtime.pipeline import Pipeline
from runtime.serve.decoding import Decoders
from runtime.serve.gate import load_keys
from runtime.serve.settings import Settings
from runtime.video import Clip, Limits


def load_pipeline(settings: Settings) -> Pipeline:
    """Load the engine, and prefill a black clip as a client's video.

    Raises:
        UserError: the prefix cache is too small for one video, the key file has no key; otherwise as `Pipeline.load`.
        EngineError: as `Pipeline.load`.
    """
    pipeline = Pipeline.load(
        settings.engine,
        settings.model,
        settings.backend,
        device=settings.device,
        dtype=None if settings.dtype is None else DTYPES[settings.dtype],
        decoder=settings.decoder,
        # The server counts places itself; a request whose answer was just read may still have one in the pipeline.
        waiting=settings.waiting + 2,
        watch_bytes=settings.watch_bytes,
        limits=limits_of(settings),
        bias=settings.bias,
        positions=settings.positions,
        decoder_key=_decoder_key(settings),
        decoder_dtype=settings.decoder_dtype,
    )
    try:
        check_room_for_a_video(pipeline)
    except BaseException:
        pipeline.close()
        raise
    return pipeline


def limits_of(settings: Settings) -> Limits:
    """The settings' limits of a video."""
    return Limits(settings.max_pixels, settings.max_frames, settings.max_seconds, settings.max_video)


def decoders_of(settings: Settings) -> Decoders:
    """The video decoders, not started yet."""
    return Decoders(limits_of(settings), seconds=settings.decode_seconds, workers=settings.video_decoders)


def check_room_for_a_video(pipeline: Pipeline) -> None:
    """Prefill a black clip as a client's video, which also allocates memory and threads for later ones.

    Raises UserError if its prefix does not fit into --watch-bytes.
    """
    count, size = max(pipeline.manifest.counts), pipeline.manifest.model.preprocessing.size
    black = Clip(torch.zeros(count, 3, *size, dtype=torch.uint8), (), count, 0.0, 0.0, 0.0)
    try:
        pipeline.watch(black).close()
    except UserError as error:
        raise UserError(f"--watch-bytes {pipeline.watched.limit} has no room for a video: {error}") from error


def _decoder_key(settings: Settings) -> str | None:
    """The API key of the vLLM server, if any."""
    if settings.decoder_key_file is None:
        return None
    keys = load_keys(settings.decoder_key_file, "--decoder-key-file")
    if len(keys) > 1:
        raise UserError(f"--decoder-key-file has {len(keys)} keys: give one")
    return keys[0]
