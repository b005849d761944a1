"""The compression stage as Triton kernels: one source with three uses.

PyTorch on a GPU runs them, the TensorRT plugin embeds them, and tests run them on a CPU in Triton's interpreter.

Each module has one operation: its kernel or kernels, their `Launch` for given shapes, and a function that allocates the
outputs and launches. They decide exactly as the plain PyTorch of `earlytom.merge`, `earlytom.select`,
`earlytom.attention` and `earlytom.cells`. Call them through `earlytom.ops`.
"""
