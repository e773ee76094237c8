"""Define a loss of your own and train with it; it is personalized like every other loss.

    python examples/custom_loss.py

The same from the command line, with this file's folder on the path:

    export PYTHONPATH=examples
    prlhf-lightning fit --config quickstart.yaml --model.loss custom_loss.CauchyLoss --model.loss.beta 0.5
"""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor

from prlhf_lightning import (
    CausalLMPolicy,
    IndividualUserModel,
    LoRA,
    MarginLoss,
    Optim,
    PersonalizedLM,
    PreferenceDataModule,
    SimulatedSource,
)


class CauchyLoss(MarginLoss):
    """`-log(1/2 + arctan(margin) / pi)`: as DPO, with the heavier tails of the Cauchy distribution.

    A pair that is ranked wrong by much pulls less, so that mistaken clicks do less harm.
    """

    def margin_loss(self, margin: Tensor) -> Tensor:
        """Return the loss of each reward margin, `[B]`."""
        return -torch.log(0.5 + torch.atan(margin) / torch.pi)


def main(folder: Path = Path("runs"), pairs_per_user: int = 450) -> float:
    """Train with the loss and return the accuracy on the users' held-out pairs."""
    seed_everything(0)
    policy = CausalLMPolicy("builtin:style-lm", lora=LoRA(rank=16, alpha=64))
    loss = CauchyLoss(beta=0.5, sft_weight=0.3)
    optim = Optim(lr=2e-3, user_lr=2e-2, betas=(0.9, 0.99))
    model = PersonalizedLM(IndividualUserModel(num_tokens=16), policy, loss, alpha=0.8, optim=optim)
    source = SimulatedSource(num_users=20, pairs_per_user=pairs_per_user, validation_pairs_per_user=10)
    data = PreferenceDataModule(source, policy.tokenizer, batch_size=10, max_prompt_length=64, max_completion_length=64)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=folder,
        use_distributed_sampler=False, gradient_clip_val=1.0,
    )  # fmt: skip
    trainer.fit(model, data)
    accuracy = float(trainer.callback_metrics["val/seen/accuracy"])
    print(f"accuracy on held-out pairs of the users: {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
