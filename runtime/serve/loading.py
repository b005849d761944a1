"""The pipeline that a server's settings ask for; of the server's process, or of a replica's."""

from __future__ import annotations

import torch

from earlytom.errors import UserError
from runtime.engine.dtypes import DTYPES
from runtime.pipeline import Pipeline
from runtime.serve.gate import load_keys
from runtime.serve.settings import Settings
from runtime.video import Clip, Limits


def load_pipeline(settings: Settings) -> Pipeline:
    """Load the engine, and read a black clip as a client's video.

    Raises:
        UserError: a setting that cannot be had: no room for one video, no key in the file.
        EngineError: as `Pipeline.load`.
    """
    pipeline = Pipeline.load(
        settings.engine,
        settings.model,
        settings.backend,
        device=settings.device,
        dtype=None if settings.dtype is None else DTYPES[settings.dtype],
        decoder=settings.decoder,
        # The server counts places itself; one whose answer has just been read may still be the pipeline's.
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
    """The largest video that is read."""
    return Limits(settings.max_pixels, settings.max_frames, settings.max_seconds, settings.max_video)


def check_room_for_a_video(pipeline: Pipeline) -> None:
    """Read a black clip as a client's video, which also finds memory and threads for all later ones.

    Raises:
        UserError: it does not fit into what --watch-bytes gives.
    """
    count, size = max(pipeline.manifest.counts), pipeline.manifest.model.preprocessing.size
    black = Clip(torch.zeros(count, 3, *size, dtype=torch.uint8), (), count, 0.0, 0.0, 0.0)
    try:
        pipeline.watch(black).close()
    except UserError as error:
        raise UserError(f"--watch-bytes {pipeline.watched.limit} has no room for a video: {error}") from error


def _decoder_key(settings: Settings) -> str | None:
    """What the vLLM server asks for."""
    if settings.decoder_key_file is None:
        return None
    keys = load_keys(settings.decoder_key_file, "--decoder-key-file")
    if len(keys) > 1:
        raise UserError(f"--decoder-key-file has {len(keys)} keys: give one")
    return keys[0]
