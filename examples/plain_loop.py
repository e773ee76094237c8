"""P-DPO in a plain PyTorch loop: no Trainer, no YAML.

    python examples/plain_loop.py

Trains the small language model of the package on simulated users and prints the accuracy on held-out pairs, with each
user's own soft prompt and with the generic user's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prlhf_lightning import CausalLMPolicy, DPOLoss, IndividualUserModel, LoRA, PreferenceDataModule, SimulatedSource
from prlhf_lightning.model import PersonalizedModel
from prlhf_lightning.types import PreferenceBatch

ALPHA = 0.8  # weight of the user's own term; the generic user's has the rest


def objective(model: PersonalizedModel, batch: PreferenceBatch) -> Tensor:
    """Return the P-DPO loss of each pair, `[B]` (arXiv:2402.05133)."""
    own, generic = model.log_probs(batch, generic=[False, True])
    reference = model.reference_log_probs(batch)
    return ALPHA * model.loss(own, reference).losses + (1 - ALPHA) * model.loss(generic, reference).losses


def accuracy(model: PersonalizedModel, batches: list[PreferenceBatch], generic: bool) -> float:
    """Return the share of pairs that the model ranks as their user did."""
    right = []
    for batch in batches:
        chosen, rejected = model.rewards(batch, generic)
        right.append((chosen > rejected).float())
    return torch.cat(right).mean().item()


def main(pairs_per_user: int = 450) -> PersonalizedModel:
    """Train, print the accuracy, and return the model."""
    torch.manual_seed(0)
    policy = CausalLMPolicy("builtin:style-lm", lora=LoRA(rank=16, alpha=64))
    source = SimulatedSource(num_users=20, pairs_per_user=pairs_per_user, validation_pairs_per_user=10)
    data = PreferenceDataModule(source, policy.tokenizer, batch_size=10, max_prompt_length=64, max_completion_length=64)
    data.prepare_data()
    data.setup("fit")

    model = PersonalizedModel(IndividualUserModel(num_tokens=16), policy, DPOLoss(beta=0.5, sft_weight=0.3))
    model.vocabulary = data.vocabulary
    policy.build()
    model.user_model.build(data.num_users, policy.token_embeddings())

    # The users' table has sparse gradients: only the users of a batch move.
    table = list(model.user_model.row_tables())
    dense = [p for p in model.parameters() if p.requires_grad and all(p is not one for one in table)]
    optimizers = [torch.optim.AdamW(dense, lr=2e-3, betas=(0.9, 0.99)), torch.optim.SparseAdam(table, lr=2e-2)]
    for step, batch in enumerate(data.train_dataloader()):
        loss = objective(model, batch).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(dense, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}")

    seen = list(data.val_dataloader()[0])
    print(
        f"accuracy {accuracy(model, seen, generic=False):.3f}, generic user {accuracy(model, seen, generic=True):.3f}"
    )
    return model


if __name__ == "__main__":
    main()
