"""User model with low-rank offsets from the generic user, in a basis shared by all users."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.types import SoftPrompt, Users
from prlhf_lightning.user_models.base import UserCodes, UserModel, check_count, sample_token_embeddings


class LowRankUserModel(UserModel):
    """`f_im(u) = e_0 + sum_r c_ur B_r`, and `f_im(u_0) = e_0`: `IndividualUserModel` with factorized offsets.

    The basis `B`, the directions in which preferences differ, is learned from all users together; each user has only a
    code `c_u`. A row has `rank` numbers instead of `num_tokens * d`, so few pairs per user suffice. (LoRe,
    arXiv:2504.14439, factorizes reward models in the same way.)

    `fit` first estimates the codes from users' feedback alone, with the prior N(0, I) (`rewards.codes`), and then
    trains what all users share. Each use of a code in training adds noise as large as the uncertainty of the code, so
    the shared weights cannot rely on more than is known about a user. Where codes and policy are trained together
    instead, they memorize the noise in users' pairs, and real users are served worse than the generic user.

    Args:
        num_tokens: Length T_u of the soft prompt.
        rank: Dimension of a user's code; at most `num_tokens * d`.
        estimate_codes: Whether `fit` estimates codes first. If not, every user starts as the generic user, and codes
            are trained together with the policy, with the same prior. So it is also for streams, and for `init_from`.
    """

    estimated: Tensor
    spread: Tensor | None
    pairs: Tensor | None

    def __init__(self, num_tokens: int = 10, rank: int = 8, estimate_codes: bool = True) -> None:
        super().__init__()
        self.num_tokens = check_count(self, "num_tokens", num_tokens)
        self.rank = check_count(self, "rank", rank)
        self.code_size = self.rank if estimate_codes else 0

    def build(self, num_rows: int, token_embeddings: Tensor) -> None:
        """Create `e_0 [T, d]`, the basis `[rank, T * d]` and the codes `[num_rows, rank]`."""
        self.generic_prompt = nn.Parameter(sample_token_embeddings(token_embeddings, self.num_tokens))
        size = self.generic_prompt.numel()
        if self.rank > size:
            raise ConfigurationError(
                f"LowRankUserModel: rank is {self.rank}; it must be at most num_tokens * d = {size}."
            )
        directions = torch.empty(self.rank, size, device=token_embeddings.device)
        nn.init.orthogonal_(directions, gain=token_embeddings.std().item() * size**0.5)
        self.basis = nn.Parameter(directions)
        # padding_idx keeps the generic user's code at zero and out of the gradient.
        self.codes = nn.Embedding(num_rows, self.rank, padding_idx=0, sparse=True)
        nn.init.zeros_(self.codes.weight)
        self.register_buffer("estimated", torch.tensor(False, device=token_embeddings.device))
        # Set at the start of each fit; not in checkpoints, since they follow from the training data.
        self.register_buffer("spread", None, persistent=False)
        self.register_buffer("pairs", None, persistent=False)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load weights, also those of versions that did not estimate codes."""
        state_dict.setdefault(f"{prefix}estimated", torch.tensor(False))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, users: Users) -> SoftPrompt:
        """Return `e_0 + B c_u` for each row, `[B, T, d]`."""
        codes = self.codes(users.rows)
        if self.training and self.spread is not None:
            codes = codes.detach() + self.spread[users.rows] * torch.randn_like(codes)
        return SoftPrompt.full(self.generic_prompt + (codes @ self.basis).view(-1, *self.generic_prompt.shape))

    def row_tables(self) -> list[Tensor]:
        """Return the codes."""
        return [self.codes.weight]

    def directions(self) -> list[nn.Parameter]:
        """Return the basis."""
        return [self.basis]

    @torch.no_grad()
    def start_fit(self, pairs: Tensor, codes: UserCodes | None, is_fresh: bool) -> None:
        """Set the codes of a new training, and their uncertainty."""
        self.pairs, self.spread = pairs, None
        # Codes that were trained from the start, as by versions that estimated none, are trained further.
        if codes is not None and (is_fresh or self.estimated):
            own = (part[:, : self.rank].to(self.codes.weight) for part in (codes.mean, codes.std))
            mean, self.spread = (F.pad(part, (0, 0, 1, 0)) for part in own)  # the generic user has neither
            if is_fresh:
                self.codes.weight.copy_(mean)
                self.estimated.fill_(True)

    @property
    def has_unit_prior(self) -> bool:
        """Whether the codes were estimated."""
        return bool(self.estimated)

    def penalty(self, users: Users) -> Tensor | None:
        """Return each pair's share of `-log p(c_u)`, `[B]`, so that all pairs of a user add up to it once."""
        if not self.training or self.pairs is None or self.spread is not None:  # estimated codes are not trained
            return None
        squares: Tensor = self.codes(users.rows).square().sum(1)
        return squares / (2 * self.pairs[users.rows].clamp(min=1))
