"""A soft prompt read off a user's pairs in one pass: no user has anything to learn."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prlhf_lightning.types import History, SoftPrompt, Users
from prlhf_lightning.user_models.base import UserModel, check_count, sample_token_embeddings


class AmortizedUserModel(UserModel):
    """`f_im(u) = e_0 + B tanh(A h_u)`, where `h_u` sums up the user's pairs, and `f_im(u_0) = e_0` exactly.

    In place of the parameters that `IndividualUserModel` has for each user, two matrices that all users share infer
    the prompt from what the user preferred (amortized inference). A pair says by how much the mean embedding of the
    chosen completion differs from that of the rejected one, and how much longer it is; `h_u` is the sum over at most
    `num_pairs` pairs, whatever their order (Deep Sets, arXiv:1703.06114, with features that are not learned), so that
    what is known of a user grows with each pair and opposite judgments cancel. Without a bias, no pairs give `e_0`.

    Each training pair comes with some of its user's other training pairs, from none to `num_pairs`. What users' pairs
    sum up to is kept in a table, which is all that evaluation, writing and serving read; it is not trained.

    Args:
        num_tokens: Length T_u of the soft prompt.
        rank: Dimensions that users can differ in.
        num_pairs: Pairs K that a user is known by in training. Of more, the mean counts as K pairs would.
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
        self.register_buffer("scale", scale)  # of word vectors, in which differences between them are counted
        width, device = token_embeddings.shape[1] + 1, token_embeddings.device
        self.reads = nn.Linear(width, self.rank, bias=False, device=device)
        self.writes = nn.Linear(self.rank, self.generic_prompt.numel(), bias=False, device=device)
        # A user of whom much is known starts about as far from e_0 as word vectors lie apart.
        nn.init.normal_(self.writes.weight, std=scale.item() / self.rank**0.5)
        # Rows of a parameter are kept in checkpoints, added to them and erased from them. No gradient comes here, as
        # training reads histories and not the table.
        self.histories = nn.Embedding(num_rows, width, padding_idx=0, sparse=True)
        nn.init.zeros_(self.histories.weight)

    def forward(self, users: Users) -> SoftPrompt:
        """Return `e_0 + B tanh(A h_u)` for each row, `[B, T, d]`; `h_u` is the table's where no histories are given."""
        if users.history is None:
            summed = self.histories(users.rows)
        else:  # who has no row is the generic user, whatever the history
            summed = self._sums(users.history) * (users.rows > 0)[:, None]
        summed = summed.to(self.reads.weight.dtype)  # with bf16-true, in which histories are not
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
        """Return `h_u` `[B, d + 1]`, zero of a history without pairs."""
        chosen_lengths, rejected_lengths = (history.lengths.float() + 1).log().unbind(-1)
        differences = (history.chosen - history.rejected).float() / self.scale
        features = torch.cat([differences, (chosen_lengths - rejected_lengths)[..., None]], dim=-1)
        pairs = (history.lengths[..., 0] > 0).sum(1, keepdim=True)
        sums: Tensor = features.sum(1) * self.history_size**0.5 / pairs.clamp(min=self.history_size)
        return sums
