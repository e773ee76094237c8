"""Base class of user models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.types import History, SoftPrompt, Users


@dataclass(frozen=True)
class UserCodes:
    """What judgments say about users' codes. Over all users, mean and uncertainty together have about variance 1.

    Attributes:
        mean: `[U, k]` float32 expected codes, the direction that matters most first; 0 for a user without judgments.
        std: `[U, k]` float32 standard deviation of each number; 1 for a user without judgments.
        explained: Share by which codes reduce the log loss of judgments that were left out of the fit; 0 or less where
            there is nothing that the estimate could personalize.
    """

    mean: Tensor
    std: Tensor
    explained: float


class UserModel(nn.Module, ABC):
    """Base class: maps users to soft-prompt vectors, `f_P(u)` of arXiv:2402.05133.

    In a subclass, take settings in `__init__`, create parameters in `build` (the table size and the embedding width
    are known only there), and return a `SoftPrompt` from `forward`. Parameters in `row_tables` have one row per user;
    their gradients should be sparse, so that users absent from a batch do not change.
    """

    #: Whether different users get different vectors. If not, the user term and the generic term of the objective are
    #: equal, and only one is computed.
    personalizes: bool = True

    #: Whether the model reads the users' text.
    uses_text: bool = False

    #: Most pairs per user that the model reads in training; 0 if it reads none.
    history_size: int = 0

    #: Numbers per user that `start_fit` can start from, estimated from users' feedback alone; 0 if none.
    code_size: int = 0

    @abstractmethod
    def build(self, num_rows: int, token_embeddings: Tensor) -> None:
        """Create the parameters.

        Args:
            num_rows: Rows of the user table: row 0 for the generic user, and one for each known user.
            token_embeddings: `[n, d]` input embeddings of the policy, a sample of the vocabulary; they give the
                embedding width and the scale of initialization.
        """

    @abstractmethod
    def forward(self, users: Users) -> SoftPrompt:
        """Return the vectors of each user, `[B, T, d]`."""

    def generic(self, users: Users) -> SoftPrompt:
        """Return the generic user's vectors for each row: `f_P(u_t, u_0)`, with the user's text."""
        prompt: SoftPrompt = self(users.anonymous())
        return prompt

    def reference(self, users: Users) -> SoftPrompt | None:
        """Return the soft prompt of the reference policy: the users' text if the model reads it, never the id."""
        return users.text if self.uses_text else None

    def row_tables(self) -> list[Tensor]:
        """Return the parameters with one row per user, in the order of the vocabulary."""
        return []

    def new_rows(self, tables: list[Tensor]) -> list[Tensor]:
        """Return the initial row of a user added to a trained model; by default the generic user's, row 0.

        Override it if row 0 is not the generic user, or if there is a better initialization.

        Args:
            tables: The trained tables, in the order of `row_tables`.
        """
        return [table[0] for table in tables]

    def directions(self) -> list[nn.Parameter]:
        """Return shared parameters that users' rows multiply; their learning rate is relative to their size."""
        return []

    def start_fit(self, pairs: Tensor, codes: UserCodes | None, is_fresh: bool) -> None:
        """Prepare for a fit, after `build`; by default nothing.

        Args:
            pairs: `[num_rows]` float32 number of training pairs of each row's user.
            codes: What the pairs say about the users' codes, `[num_rows - 1, code_size]`; None if that is not known.
            is_fresh: Whether the rows are those of `build`, and not of a checkpoint.
        """

    def penalty(self, users: Users) -> Tensor | None:
        """Return a penalty of each user's row, such as a prior, to add to the loss of the user's own term.

        Returns:
            `[B]`, or None for none. Each is the share of one of the user's training pairs.
        """
        return None

    @property
    def has_unit_prior(self) -> bool:
        """Whether all rows were estimated with the prior N(0, I) around the generic user's row, 0."""
        return False

    def history_tables(self) -> list[Tensor]:
        """Return the `row_tables` that are computed from the users' training pairs instead of trained.

        A model with a `history_size` has one or more. It reads them if `Users.history` is None; only training gives
        histories.
        """
        return []

    def history_rows(self, history: History) -> list[Tensor]:
        """Return the users' rows of the `history_tables`, computed from their pairs, `[B, ...]` each, in their order.

        Args:
            history: Pairs of B users.
        """
        return []

    def share_tables(self) -> list[Tensor]:
        """Return the `row_tables` whose rows are logits of shares; reports show their softmax."""
        return []


def check_count(model: UserModel, name: str, value: int, least: int = 1) -> int:
    """Return a setting such as a number of vectors, or raise if it is below `least`."""
    if value < least:
        raise ConfigurationError(f"{type(model).__name__}: {name} is {value}; it must be {least} or more.")
    return value


def sample_token_embeddings(token_embeddings: Tensor, count: int) -> Tensor:
    """Draw `count` rows of the vocabulary's embeddings, with replacement: `[count, d]` float32.

    Initializing soft prompts with word vectors gives them the scale of the policy's inputs (Lester et al. 2021, §3.2).
    """
    rows = torch.randint(token_embeddings.shape[0], (count,), device=token_embeddings.device)
    return token_embeddings.detach()[rows].float().clone()
