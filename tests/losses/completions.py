"""Sampled completions with log-probabilities and advantages, and the losses of online RL, for tests in this folder."""

from types import SimpleNamespace

import torch

from prlhf_lightning import losses as L

RL_LOSSES = {
    "grpo": L.GRPOLoss,
    "dr_grpo": L.DrGRPOLoss,
    "bnpo": L.BNPOLoss,
    "dapo": L.DAPOLoss,
    "gspo": L.GSPOLoss,
    "cispo": L.CISPOLoss,
    "rloo": L.RLOOLoss,
}
MAX_LENGTH = 9


def random_completions(rows=6, width=7, seed=0, spread=0.3):
    """Completions `[rows, width]` of unequal lengths, in float64; the policy has moved by `spread` since sampling."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    lengths[0] = width
    mask = torch.arange(width) < lengths[:, None]
    old = -noise(rows, width).abs()
    return SimpleNamespace(
        mask=mask,
        lengths=lengths,
        old=old,
        log_probs=(old + spread * noise(rows, width)).requires_grad_(),
        reference=old + spread * noise(rows, width),
        advantages=noise(rows),
    )


def sizes_of(completions):
    return L.StepSizes.of(completions.lengths, MAX_LENGTH)


def step(loss, c, rows=slice(None), denominator=None, reference=True):
    """The output of a loss for some rows of completions, as one micro-batch of the step."""
    return loss(
        c.log_probs[rows],
        c.old[rows],
        c.mask[rows],
        c.advantages[rows],
        loss.denominator(sizes_of(c)) if denominator is None else denominator,
        c.reference[rows] if reference else None,
    )
