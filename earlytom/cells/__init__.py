"""The method "cells" as pure functions: merging of frames cell by cell (`merge`), selection of diverse tokens
(`select`), and their settings (`config`, which needs no PyTorch). `earlytom.methods.cells` is the method itself."""
