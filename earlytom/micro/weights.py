"""Seeded random weights for a video model: scaled, reproducible, cheap.

Used for the bundled model before training and for published configurations measured without a download. It needs
tensor names and shapes only.

Three properties matter to callers:

* *Independent tensors.* Each tensor has its own random stream, keyed by the seed and its name, so tower and projector
  created alone equal those of the whole model.
* *Independent of the dtype.* Values are drawn in fp32 and rounded once, block by block: a half-precision engine and the
  fp32 reference have the same weights up to that rounding, and no whole tensor exists in fp32.
* *Reproducible bits.* The raw words of PCG64 are scaled and shifted into uniform values; no library routine for normal
  values, which may differ between processors, is used.

The scales make an untrained model's decisions meaningful: similarity of frames follows their content, received
attention is uneven, and activations stay within half precision through 26 layers.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from earlytom.families import DEFAULT_FAMILY, Family

SCHEME = "uniform-pcg64-1"
"""The name of this random scheme. Changing any number below changes the weights, so it must change this name too."""

# Values drawn at a time: a multiple of four, because a 64-bit word gives four; they fit the cache, and are so few
# that torch does not share them out to threads, which wait for one another on a busy machine (20 s instead of 2).
_BLOCK = 1 << 15
_UNIT = 1.0 / math.sqrt((2.0**32 - 1.0) / 12.0)  # makes the standard deviation of (int16 + 0.5) equal to one

# Gains g of matrices (standard deviation g / sqrt(fan in)) by the end of their name.
_VISION_GAINS = {
    "patch_embedding.weight": 1.5,
    # sharper than one, so that attention is well away from uniform
    "q_proj.weight": 1.5,
    "k_proj.weight": 1.5,
    # the two products that are added to the residual stream; small, so that depth does not wash the content out
    "out_proj.weight": 0.6,
    "fc2.weight": 0.6,
}
_DECODER_GAINS = {
    # attention has to outweigh the last token's own embedding, or greedy text repeats one token for ever
    "q_proj.weight": 2.0,
    "k_proj.weight": 2.0,
    "o_proj.weight": 1.5,
    "down_proj.weight": 0.9,
}
_POSITION_STD = 0.4
_QUERY_BIAS_STD = 1.0  # a query bias gives each key a salience of its own: some tokens draw attention from everywhere
_BIAS_STD = 0.05
_NORM_STD = 0.1


def _moments(name: str, shape: Sequence[int], family: Family) -> tuple[float, float]:
    """Mean and standard deviation of a tensor of the role `name`."""
    module = name.rpartition(".")[0].rpartition(".")[2]
    if "norm" in module:
        return (1.0 if name.endswith("weight") else 0.0), _NORM_STD
    if name.endswith("q_proj.bias"):
        return 0.0, _QUERY_BIAS_STD
    if name.endswith("bias"):
        return 0.0, _BIAS_STD
    if name.endswith("position_embedding.weight"):
        return 0.0, _POSITION_STD
    if name.endswith("embed_tokens.weight") or name == family.closing_name:
        return 0.0, 1.0 / math.sqrt(shape[-1])
    gains = _DECODER_GAINS if name.startswith(family.decoder_names) else _VISION_GAINS
    gain = next((gain for end, gain in gains.items() if name.endswith(end)), 1.0)
    return 0.0, gain / math.sqrt(math.prod(shape[1:]))


def random_tensor(
    name: str, shape: Sequence[int], dtype: torch.dtype, *, seed: int = 0, family: Family = DEFAULT_FAMILY
) -> Tensor:
    """The tensor `name` in `dtype`, uniform with its role's mean and standard deviation.

    Values depend on the canonical name, the shape, the family and the seed only.
    """
    name = family.canonical_name(name)
    role = family.weight_role(name)
    key = hashlib.sha256(f"{SCHEME}:{seed}:{name}".encode()).digest()
    words = np.random.PCG64(int.from_bytes(key[:16], "little"))
    mean, std = _moments(role, shape, family)
    tensor = torch.empty(tuple(shape), dtype=dtype)
    flat = tensor.view(-1)
    for start in range(0, flat.numel(), _BLOCK):
        size = min(_BLOCK, flat.numel() - start)
        raw = words.random_raw(-(-size // 4)).astype("<u8", copy=False).view("<i2")[:size]
        values = torch.from_numpy(raw).to(torch.float32)
        flat[start : start + size] = values.add_(0.5).mul_(std * _UNIT).add_(mean)
    return tensor


def random_state(
    shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, *, seed: int = 0, family: Family = DEFAULT_FAMILY
) -> dict[str, Tensor]:
    """A `random_tensor` for each name and shape, under the names given."""
    return {name: random_tensor(name, shape, dtype, seed=seed, family=family) for name, shape in shapes.items()}
