"""What a service writes against the public names, for `tests/test_packaging.py`: it is type-checked, never run."""

from pathlib import Path

from builder.build import build_engine
from builder.settings.config import BuildConfig
from earlytom import EarlyTomConfig, UserError, token_count
from runtime.errors import EngineError, VideoError
from runtime.pipeline import Answer, Delta, InnerMerge, Pipeline, Request, Sampling, Timings
from runtime.video import Clip, Limits, load_clip


def settings() -> EarlyTomConfig:
    return EarlyTomConfig.preset("videomme", 0.2).replace(schedule="budget")


def tokens(frames: int) -> int:
    return token_count(frames, 196, 0.2, frame_budget=[24, 18, 14])


def build(config: BuildConfig) -> Path:
    lines: list[str] = []
    return build_engine(config, Path("engines"), verify=True, say=lines.append)


def first_word(pipeline: Pipeline, video: str) -> str:
    delta: Delta
    for delta in pipeline.stream(video, "What happens?", max_new_tokens=8, sampling=Sampling(temperature=0.5)):
        if delta.text:
            return delta.text
    return ""


def answered(engine: str, video: bytes) -> tuple[str, float]:
    try:
        with Pipeline.load(engine, inner=InnerMerge(18, 0.5), limits=Limits(max_seconds=60.0)) as pipeline:
            request: Request = pipeline.submit(video, "How many people are there?", deadline=2.0, kept=True)
            answer: Answer = request.result(timeout=5.0)
            times: Timings = answer.timings
            return answer.text, times.first_token
    except (VideoError, EngineError) as error:
        return str(error), 0.0
    except UserError:
        return "", 0.0


def clip(path: Path) -> Clip:
    return load_clip(path, 16, (72, 72))
