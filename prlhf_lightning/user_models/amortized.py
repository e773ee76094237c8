"""User model that infers a soft prompt from a user's pairs in one forward pass, without per-user training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prlhf_lightning.types import History, SoftPrompt, Users
from prlhf_lightning.user_models.base import UserModel, check_count, sample_token_embeddings


class AmortizedUserModel(UserModel):
    """`f_im(u) = e_0 + B tanh(A h_u)`, where `h_u` sums features of the user's pairs, and `f_im(u_0) = e_0` exactly.

    `IndividualUserModel` learns parameters for each user. Here two matrices shared by all users infer the prompt from
    the user's preferences (amortized inference). The features of a pair are the difference of the mean embeddings of
    its chosen and rejected completions, and the difference of their log lengths. `h_u` is the sum over at most
    `num_pairs` pairs, in any order (Deep Sets, arXiv:1703.06114, with features that are not learned). So each pair adds
    evidence, and opposite judgments cancel. There is no bias, so a user without pairs gets `e_0`.

    Each training pair comes with up to `num_pairs` other training pairs of its user, or none. A table stores `h_u` of
    each user; evaluation, generation and serving read only this table. It is not trained.

    Args:
        num_tokens: Length T_u of the soft prompt.
        rank: Number of dimensions in which users can differ.
        num_pairs: Most pairs K per user in training. The sum over more pairs is scaled to K pairs.
    """

    scale: Tensor

    def __init__(self, num_tokens: int = 10, rank: int = 16, num_pairs: int = 10) -> None:
        super().__init__()
        self.num_tokens = check_count(self, "num_tokens", num_tokens)
        self.rank = check_count(self, "rank", rank)
        self.num_pairs = self.history_size = check_count(self, "num_pairs", num_pairs)

    def build(self, num_rows: int, token_embeddings: Tensor) -> None:
        """Create `e_0 [T, d]`, the matrices `A [rank, d + 1]` and `B [T * d, rank]`, and `h [num_rows, d + 1]`."""
        self.generic_prompt = nn.Parameter(sample_token_embeddings(token_embeddings, self.num_tokens))
        scale = token_embeddings.detach().float().std()
        self.register_buffer("scale", scale)  # std of the word vectors: the unit of differences between embeddings
        width, device = token_embeddings.shape[1] + 1, token_embeddings.device
        self.reads = nn.Linear(width, self.rank, bias=False, device=device)
        self.writes = nn.Linear(self.rank, self.generic_prompt.numel(), bias=False, device=device)
        # At initialization, a user with many pairs is about as far from e_0 as word vectors are from one another.
        nn.init.normal_(self.writes.weight, std=scale.item() / self.rank**0.5)
        # A parameter, because rows of parameters are saved in checkpoints, added and erased. It gets no gradient:
        # training reads histories, not the table.
        self.histories = nn.Embedding(num_rows, width, padding_idx=0, sparse=True)
        nn.init.zeros_(self.histories.weight)

    def forward(self, users: Users) -> SoftPrompt:
        """Return `e_0 + B tanh(A h_u)` for each row, `[B, T, d]`; without histories, `h_u` comes from the table."""
        if users.history is None:
            summed = self.histories(users.rows)
        else:  # a user without a row is the generic user, whatever the history
            summed = self._sums(users.history) * (users.rows > 0)[:, None]
        summed = summed.to(self.reads.weight.dtype)  # with bf16-true, histories are still float32
        offsets = self.writes(torch.tanh(self.reads(summed))).view(-1, *self.generic_prompt.shape)
        return SoftPrompt.full(self.generic_prompt + offsets)

    def row_tables(self) -> list[Tensor]:
        """Return `h`."""
        return [self.histories.weight]

    def history_tables(self) -> list[Tensor]:
        """Return `h`."""
        return self.row_tables()

    def history_rows(self, history: History) -> list[Tensor]:
        """Return `h_u` of each history."""
        return [self._sums(history)]

    def _sums(self, history: History) -> Tensor:
        """Return `h_u` `[B, d + 1]`, zero for a history without pairs."""
        chosen_lengths, rejected_lengths = (history.lengths.float() + 1).log().unbind(-1)
        differences = (history.chosen - history.rejected).float() / self.scale
        features = torch.cat([differences, (chosen_lengths - rejected_lengths)[..., None]], dim=-1)
        pairs = (history.lengths[..., 0] > 0).sum(1, keepdim=True)
        sums: Tensor = features.sum(1) * self.history_size**0.5 / pairs.clamp(min=self.history_size)
        return sums
