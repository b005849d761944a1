"""The stages of the training, in order, and the model that is trained.

Three stages, each resumable: single frames with dense labels (vision tower and projector), then clips of eight and of
sixteen frames with questions (decoder). All data is generated. The model sees all visual tokens: EarlyTom needs no
training.
"""

from __future__ import annotations

import math
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from builder.micro import see
from builder.micro.answering import Stage, motion_head, train_answering
from builder.micro.packing import Packer
from builder.micro.see import train_perception
from earlytom.families import DEFAULT_FAMILY
from earlytom.families.bundled import architecture
from earlytom.micro.checkpoint import build_tokenizer

SEED = 0
PERCEPTION_STEPS = 3600
_HARD = ("shape", "direction", "where", "changed")
_HARDEST = ("exists", "changed")
STAGES = (
    Stage("glimpses", seed=11, steps=3900, clips=16, frames=8, rate=1e-3, kept=4096, stretched=0.5, often=_HARD),
    Stage("clips", seed=12, steps=1350, clips=16, frames=16, rate=7e-4, kept=1024, stretched=0.3, often=_HARDEST),
)
"""The stages after the first, in order."""


def new_model(seed: int = SEED) -> Any:
    """The bundled architecture in fp32, initialised for training."""
    torch.manual_seed(seed)
    model = DEFAULT_FAMILY.new_model(architecture()).float()
    with torch.no_grad():
        nn.init.normal_(model.get_input_embeddings().weight, std=1 / math.sqrt(model.config.text_config.hidden_size))
        for name, matrix in model.model.language_model.layers.named_parameters():
            if matrix.dim() == 2:
                # smaller where a layer adds to the residual stream, so that its updates do not drown the tokens
                gain = 0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                nn.init.normal_(matrix, std=gain / math.sqrt(matrix.shape[1]))
    return model


class Display:
    """A bar for the running stage, and every `every` steps a line with running means of loss and accuracies."""

    def __init__(self, every: int = 100) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        self.progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
        self._every, self._stage, self._means = every, "", dict[str, float]()

    def __call__(self, stage: str, step: int, steps: int, loss: Tensor, right: dict[str, Tensor]) -> None:
        """See `builder.micro.loop.Report`."""
        if stage != self._stage:
            self._stage, self._means = stage, {}
            self._task = self.progress.add_task(stage, total=steps)
        for name, value in {"loss": loss, **right}.items():
            self._means[name] = 0.96 * self._means.get(name, float(value)) + 0.04 * float(value)
        self.progress.update(self._task, completed=step)
        if step % self._every == 0 or step == steps:
            figures = "  ".join(f"{name} {mean:.3f}" for name, mean in sorted(self._means.items()))
            self.progress.console.print(f"{stage} {step}/{steps}  {figures}", highlight=False, soft_wrap=True)


def train(work: Path, device: torch.device, scale: float, workers: int, display: Display) -> tuple[Any, dict[str, Any]]:
    """Run all stages that are not done yet; returns the model on the CPU and the content of training.json."""
    tokenizer = build_tokenizer()
    packer = Packer(tokenizer)
    model = new_model().to(device)
    model.train()

    def scaled(steps: int) -> int:
        return max(1, round(steps * scale))

    stages = [{"stage": see.NAME, "steps": scaled(PERCEPTION_STEPS), "frames": see.CLIPS * see.FRAMES_A_CLIP}]
    stages[0]["seconds"] = train_perception(model, tokenizer, scaled(PERCEPTION_STEPS), work, display, workers)
    head = motion_head(model)
    for stage in STAGES:
        steps = scaled(stage.steps)
        seconds = train_answering(model, head, packer, replace(stage, steps=steps), work, display, workers)
        stages.append({"stage": stage.name, "steps": steps, "frames": stage.clips * stage.frames, "seconds": seconds})
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU cores"
    about = {"seed": SEED, "stages": stages, "hardware": hardware, "torch": torch.__version__.partition("+")[0]}
    return model.cpu().eval(), {**about, "python": platform.python_version()}
