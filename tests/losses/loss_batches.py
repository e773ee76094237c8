"""Batches of log-probabilities and the list of losses that the tests in this folder share."""

import torch

from prlhf_lightning import losses as L
from prlhf_lightning.types import LogProbs, PairLogProbs

LOSSES = {
    "dpo": L.DPOLoss(),
    "cdpo": L.DPOLoss(label_smoothing=0.2),
    "rpo": L.DPOLoss(sft_weight=0.5),
    "ipo": L.IPOLoss(beta=0.3),
    "hinge": L.HingeLoss(),
    "robust": L.RobustLoss(label_smoothing=0.2),
    "exo": L.EXOLoss(),
    "discopop": L.DiscoPOPLoss(),
    "apo_zero": L.APOZeroLoss(),
    "apo_down": L.APODownLoss(),
    "nca": L.NCALoss(),
    "bco": L.BCOLoss(),
    "sppo": L.SPPOLoss(),
    "simpo": L.SimPOLoss(),
    "cpo": L.CPOLoss(),
    "orpo": L.ORPOLoss(),
    "sft": L.SFTLoss(),
    "aot": L.AOTLoss(),
    "aot_unpaired": L.AOTUnpairedLoss(),
}
for loss in LOSSES.values():
    loss.eval()  # BCO's running mean stands still, so that calls can be compared
BY_PAIR = {name: loss for name, loss in LOSSES.items() if not name.startswith("aot")}


def random_mask(rows, width=5, seed=0):
    """A mask `[rows, width]` of right-padded completions, none of them empty."""
    lengths = torch.randint(1, width + 1, (rows, 1), generator=torch.Generator().manual_seed(seed))
    return torch.arange(width) < lengths


def random_tokens(mask, seed=0):
    """Token log-probabilities `[B, L]` in float64, 0 where masked."""
    generator = torch.Generator().manual_seed(seed)
    return -3 * torch.rand(mask.shape, generator=generator, dtype=torch.float64) * mask


def pairs(tokens, mask):
    """The pairs whose chosen completions are the first half of the rows and whose rejected ones the second."""
    return PairLogProbs(*LogProbs(tokens, mask).chunk(2))


def random_batch(n, seed=0):
    """Policy and reference log-probabilities of n random pairs; the policy's require a gradient."""
    mask = random_mask(2 * n, seed=seed)
    tokens = random_tokens(mask, seed).requires_grad_()
    return tokens, pairs(tokens, mask), pairs(random_tokens(mask, seed + 1), mask)


def one_token_pairs(chosen, rejected):
    """Pairs of one-token completions with the given log-probabilities `[B]`."""
    tokens = torch.cat([torch.as_tensor(chosen), torch.as_tensor(rejected)])[:, None]
    return pairs(tokens, torch.ones_like(tokens, dtype=torch.bool))
