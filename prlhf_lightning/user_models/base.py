"""What every user model is."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.types import History, SoftPrompt, Users


class UserModel(nn.Module, ABC):
    """Turns users into soft-prompt vectors: `f_P(u)` of arXiv:2402.05133.

    To write your own, take settings in `__init__`, create parameters in `build` (the table's size and the
    embedding width are known only there), and return a `SoftPrompt` from `forward`. Parameters in `row_tables`
    hold one row a user; their gradients should be sparse, so that users absent from a batch do not move.
    """

    #: Whether the model gives different users different vectors. If not, the user term and the generic term of
    #: the objective are the same, and only one is computed.
    personalizes: bool = True

    #: Whether the model reads the users' text.
    uses_text: bool = False

    #: Most pairs of a user that the model reads in training; 0 of a model that reads none.
    history_size: int = 0

    @abstractmethod
    def build(self, num_rows: int, token_embeddings: Tensor) -> None:
        """Create the parameters.

        Args:
            num_rows: Rows of the user table: the known users, and row 0 for the generic user.
            token_embeddings: `[n, d]` the policy's input embeddings of many words; the width of a vector, and the scale
                to start at.
        """

    @abstractmethod
    def forward(self, users: Users) -> SoftPrompt:
        """Return the vectors of each user, `[B, T, d]`."""

    def generic(self, users: Users) -> SoftPrompt:
        """Return the vectors of the generic user in each user's place: `f_P(u_t, u_0)`, the text kept."""
        prompt: SoftPrompt = self(users.anonymous())
        return prompt

    def reference(self, users: Users) -> SoftPrompt | None:
        """Return what the reference policy sees of the users: their text where the model reads it, never the id."""
        return users.text if self.uses_text else None

    def row_tables(self) -> list[Tensor]:
        """Return the parameters that hold one row a user, in the order of the vocabulary."""
        return []

    def new_rows(self, tables: list[Tensor]) -> list[Tensor]:
        """Return the row that a user gets who is added to a trained model: by default the generic user's, row 0.

        Override it where row 0 does not stand for the generic user, or a better start is known.

        Args:
            tables: The trained tables, in the order of `row_tables`.
        """
        return [table[0] for table in tables]

    def history_tables(self) -> list[Tensor]:
        """Return those of `row_tables` that are filled from the users' training pairs, instead of trained.

        A model with a `history_size` has one or more. They are what it goes by where `Users.history` is not given, as
        it is in training only.
        """
        return []

    def history_rows(self, history: History) -> list[Tensor]:
        """Return what pairs say that users' rows of the `history_tables` are, `[B, ...]` each, in their order.

        Args:
            history: Pairs of B users.
        """
        return []

    def share_tables(self) -> list[Tensor]:
        """Return those of `row_tables` whose rows are weights before a softmax, to be shown as shares."""
        return []


def check_count(model: UserModel, name: str, value: int, least: int = 1) -> int:
    """Return a number of vectors or the like, or raise where it is below `least`."""
    if value < least:
        raise ConfigurationError(f"{type(model).__name__}: {name} is {value}; it must be {least} or more.")
    return value


def sample_token_embeddings(token_embeddings: Tensor, count: int) -> Tensor:
    """Draw `count` rows of the vocabulary's embeddings, with replacement: `[count, d]` float32.

    Starting at word vectors keeps soft prompts on the scale that the policy was trained on (Lester et al. 2021, §3.2).
    """
    rows = torch.randint(token_embeddings.shape[0], (count,), device=token_embeddings.device)
    return token_embeddings.detach()[rows].float().clone()
