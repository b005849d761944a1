"""The method "cells" as pure functions: frames merged cell by cell (`merge`), diverse tokens (`select`), and the
settings of both (`config`, which needs no PyTorch). `earlytom.methods.cells` is the method made of them."""
