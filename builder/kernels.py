"""Measure the operators of the compression stage beside what the hardware allows and beside plain PyTorch.

    python -m builder.kernels                                 on a GPU, at the size of LLaVA-OneVision-7B with 32 frames
    python -m builder.kernels --device cpu --size tiny        anywhere, to see what it does

For how times are taken see `builder.operators.times`. "floor" is the time that the bytes an operator must move, or its
flops, take at the copy bandwidth and matrix product rate measured in the same run; "PyTorch" is the reference on the
same device. The last line compares the whole compression path of the budget schedule with the vision encoder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from builder.operators.sizes import SIZES
from earlytom.config import EarlyTomConfig
from earlytom.errors import UserError
from runtime import cli, trt
from runtime.engine import layout

NO_GPU = "no CUDA GPU can be used here: add --device cpu --size tiny to see what is measured"


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0; every failure is raised (see `runtime.cli.run`)."""
    options = parser().parse_args(argv)
    screen = cli.Screen(json_only=options.json)
    size = SIZES[options.size]
    if options.device == "cuda" and not trt.has_gpu():
        raise UserError(NO_GPU)
    if options.repeats < 1:
        raise UserError(f"--repeats must be at least 1, got {options.repeats}")
    if not 0 < options.ratio <= 1:
        raise UserError(f"--ratio must be in (0, 1], got {options.ratio}")
    config = EarlyTomConfig(retention_ratio=options.ratio, merge_layers=size.merge_layers, schedule="budget")
    import torch

    from builder.operators.times import Clock, cases, measure_limits, measure_path, measured
    from runtime.engine.dtypes import DTYPES

    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    if device.type == "cuda" and not torch.cuda.is_available():  # the driver shows one; was PyTorch built for it?
        raise UserError(NO_GPU)
    clock = Clock(device, options.repeats)
    with torch.inference_mode():
        limits = measure_limits(clock, dtype)
        figures = [measured(case, clock, limits) for case in cases(size, dtype, device, config)]
        path, encoder = measure_path(size, config, dtype, clock)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    screen.line(
        f"{name}, torch {torch.__version__}: copies at {limits.bandwidth / 1e9:.0f} GB/s, {options.dtype} matrix "
        f"products at {limits.matmul / 1e12:.2f} TFLOP/s"
    )
    columns = ("operator", "shape", "MB", "GFLOP", "floor us", "ours us", "of floor", "PyTorch us")
    title = f"{options.size}, {options.dtype}, medians of {options.repeats} calls"
    screen.table(columns, [row(figure) for figure in figures], title=title)
    share = f"{path / encoder:.1%}"
    screen.line(f"whole compression path {1e3 * path:.2f} ms of the encoder's {1e3 * encoder:.2f} ms: {share}")
    screen.result(
        {
            "device": name,
            "torch": torch.__version__,
            "size": options.size,
            "dtype": options.dtype,
            "ratio": options.ratio,
            "repeats": options.repeats,
            "bandwidth": limits.bandwidth,
            "matmul": limits.matmul,
            "operators": figures,
            "path_seconds": path,
            "encoder_seconds": encoder,
            "path_share": path / encoder,
        }
    )
    return 0


def row(figure: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table."""
    return (
        figure["name"],
        figure["shape"],
        f"{figure['bytes'] / 1e6:.2f}",
        f"{figure['flops'] / 1e9:.2f}",
        f"{1e6 * figure['floor']:.1f}",
        f"{1e6 * figure['ours']:.1f}",
        f"{figure['of_floor']:.0%}",
        f"{1e6 * figure['pytorch']:.1f}",
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = cli.Parser(
        prog="python -m builder.kernels",
        description="Measure the operators of the compression stage beside the hardware's limits and plain PyTorch.",
        epilog="examples:\n"
        "  python -m builder.kernels --dtype fp16\n"
        "  python -m builder.kernels --device cpu --size tiny",
    )
    result.add_argument("--size", choices=SIZES, default="so400m", help="default: so400m, as in LLaVA-OneVision-7B")
    result.add_argument("--dtype", choices=layout.DTYPE_NAMES, default="bf16", help="default: bf16")
    result.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    result.add_argument("--ratio", type=float, default=0.1, help="retention ratio (default: 0.1)")
    result.add_argument("--repeats", type=int, default=30, metavar="N", help="timed calls of each (default: 30)")
    result.add_argument("--json", action="store_true", help="print the JSON line alone")
    return result


if __name__ == "__main__":
    cli.stop_by_signal()
    sys.exit(cli.run(main, None))
