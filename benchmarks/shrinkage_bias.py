"""How far the gain is overstated if the shrinkage factor is chosen on the pairs that the gain is reported for.

Users have tastes in four dimensions; their rows are the tastes plus noise. The factor is chosen on some pairs, and the
gain over the generic user is compared between these pairs and fresh ones. No model is trained; it takes a minute.

    python benchmarks/shrinkage_bias.py
"""

from __future__ import annotations

import numpy as np
import torch

from prlhf_lightning.adaptation.shrink_users import most_likely

REPEATS = 60


def measure(users: int, pairs: int, taste: float, noise: float, draw: np.random.Generator) -> tuple[float, ...]:
    """Return the chosen factor, the excess of the reported gain in points, and the half width of its interval."""
    own = taste * draw.normal(size=(users, 4))
    rows = own + noise * draw.normal(size=(users, 4))

    def margins() -> tuple[np.ndarray, np.ndarray]:
        items, generic = draw.normal(size=(users, pairs, 4)) / 2, draw.normal(size=(users, pairs))
        logits = generic + np.einsum("unk,uk->un", items, own)
        sign = np.where(draw.random((users, pairs)) < 1 / (1 + np.exp(-logits)), 1, -1)
        return generic * sign, np.einsum("unk,uk->un", items, rows) * sign

    def gains(generic: np.ndarray, more: np.ndarray) -> np.ndarray:
        return 100 * ((generic + factor * more > 0).mean(1) - (generic > 0).mean(1))

    generic, more = margins()
    factor = most_likely((0.0, 1.0), torch.from_numpy(np.stack([generic.ravel(), (generic + more).ravel()])))
    reported, fresh = gains(generic, more), gains(*margins())
    return factor, reported.mean() - fresh.mean(), 1.96 * reported.std(ddof=1) / users**0.5


def main() -> None:
    """Print a line for each kind of users."""
    draw = np.random.default_rng(0)
    for users, pairs in ((1000, 4), (100, 10)):
        for taste in (0.0, 0.5, 1.0):
            found = np.array([measure(users, pairs, taste, 1.0, draw) for _ in range(REPEATS)])
            factor, excess, half = found.mean(0)
            error = 1.96 * found[:, 1].std() / REPEATS**0.5
            print(
                f"{users} users, {pairs} pairs, tastes {taste:g}: factor {factor:.2f}, excess {excess:+.2f} ± "
                f"{error:.2f} points, interval of the gain ± {half:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
