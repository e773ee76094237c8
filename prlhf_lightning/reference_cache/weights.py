"""A checksum of weights that is the same on every device."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

_BLOCK = 1 << 15  # 64-bit words summed together, few enough for a core's own cache; part of the digest


def weights_digest(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """Return a checksum of the names, shapes, dtypes and exact bits of parameters, whatever their order.

    Every block of words `w_i` is reduced to `Σ a_i w_i` and `Σ b_i (w_i >> 32)` modulo 2^64 with fixed odd random
    multipliers. Integer sums come out the same on every device and in every order of summation. The second sum is for
    the upper halves of the words, whose highest bits (signs) could cancel in the first. A difference goes unnoticed
    with a probability of about 2^-32; this is no defence against someone who seeks one.

    Args:
        parameters: Names and tensors, as from `Module.named_parameters()`; on any device, not sharded.
    """
    multipliers = torch.from_numpy(np.random.PCG64(0).random_raw((2, _BLOCK)).view(np.int64)) | 1
    rows = sorted([name, str(t.dtype), list(t.shape), _block_sums(t.detach(), multipliers)] for name, t in parameters)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _block_sums(tensor: Tensor, multipliers: Tensor) -> str:
    raw = tensor.flatten().view(torch.uint8)  # no copy unless the tensor is strided
    starts = range(0, raw.numel(), 8 * _BLOCK)
    low, high = multipliers.to(raw.device)
    words, product = torch.zeros(2, _BLOCK, dtype=torch.int64, device=raw.device)
    sums = torch.zeros(2, len(starts), dtype=torch.int64, device=raw.device)
    for block, start in enumerate(starts):
        data = raw[start : start + 8 * _BLOCK]
        if len(data) < 8 * _BLOCK:
            words.zero_()
        words.view(torch.uint8)[: len(data)].copy_(data)  # the tensor itself may not be aligned to words
        torch.sum(torch.mul(words, low, out=product), dim=0, out=sums[0, block])
        torch.sum(words.bitwise_right_shift_(32).mul_(high), dim=0, out=sums[1, block])
    return hashlib.sha256(sums.cpu().numpy().tobytes()).hexdigest()
