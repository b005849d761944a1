"""The compression stage as Triton kernels: one source with three uses.

PyTorch on a GPU runs them, the TensorRT plugin embeds them, and tests run them on a CPU in Triton's interpreter.

Each module holds one kernel, the `Launch` that says how it is started for given shapes, and a function that allocates
the outputs and starts it. They compute what `earlytom.merge`, `earlytom.select` and `earlytom.towers` compute in plain
PyTorch, and decide the same. `earlytom.ops` is the way to call them; nothing else imports Triton.
"""
