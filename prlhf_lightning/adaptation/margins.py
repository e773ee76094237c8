"""Reward margins of pairs and their gradients with respect to user rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import functional_call

from prlhf_lightning.adaptation.pauses import pause
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.model import PersonalizedModel
from prlhf_lightning.types import LogProbs, PairLogProbs, PreferenceBatch, SoftPrompt, Tokens, Users
from prlhf_lightning.utils.modes import eval_mode

# Positions in a pass of the policy, for either completion of its pairs. In an 8B-parameter model in 16 bits, the keys
# and values of a position take up to 0.5 MB, and the activations for a backward pass 6 MB (counted: 46 bytes per layer
# and unit of width). Passes of this size still keep a GPU busy.
_POSITIONS = 1 << 13
_POSITIONS_ON_CPU = 1 << 10  # more are no faster there, and a server generates nothing during a pass
_POSITIONS_WITH_GRADIENT = 1 << 10


class Margins:
    """Computes reward margins of pairs as a function of user rows, for any user model.

    The model does not change. Repeated texts and the reference's log-probs are computed once.

    Args:
        model: A trained model.
        pairs: N pairs, on any device.
        batch_size: Pairs in a pass of the policy, fewer if they are long; small batches keep a small model's
            activations in a CPU's cache.
    """

    def __init__(self, model: PersonalizedModel, pairs: PreferenceBatch, batch_size: int = 32) -> None:
        check_ranks_pairs(model)
        self._tables = row_tables(model)
        self._device = next(iter(self._tables.values())).device
        self._positions = _POSITIONS_ON_CPU if self._device.type == "cpu" else _POSITIONS
        self._texts = texts = DistinctTexts.of(pairs.to(self._device), model.user_model.uses_text)
        self._model, self._policy = model, model.policy.merged_for_scoring()
        anyone = Users(torch.zeros(1, dtype=torch.long, device=self._device))
        vectors = model.user_model.generic(anyone).vectors.shape[1]
        parts = (texts.user_text, texts.prompt, texts.completion)
        self._batch_size, self._longest = batch_size, vectors + sum(part.mask.shape[1] for part in parts)
        self._every = torch.arange(len(texts.chosen), device=self._device)
        every = torch.ones(len(texts.completion), dtype=torch.bool, device=self._device)
        with eval_mode(model):
            self._reference = self._log_probs(every, None) if model.loss.requires_reference else None

    def __call__(self, rows: Tensor, of: Tensor | None = None, only: Tensor | None = None) -> Tensor:
        """Return the margin of each pair, `[N]`.

        Args:
            rows: `[R, p]` user rows, with all tables concatenated; `[p]` for the same user in all pairs, which is
                faster if pairs share prompts or completions.
            of: `[N]` row number of each pair.
            only: `[N]` bool, the pairs to compute; the others' margins are 0.
        """
        margins = rows.new_zeros(len(self._texts.chosen))
        wanted = self._every if only is None else only.to(self._device).nonzero().flatten()
        with eval_mode(self._model), torch.no_grad():
            if of is not None:
                of = of.to(self._device)
                for some in self._batches(wanted, self._positions):
                    pause()
                    margins[some] = self._apart(some, self._own_tables(rows[of[some]]))
            elif len(wanted):
                needed = torch.zeros(len(self._texts.completion), dtype=torch.bool, device=self._device)
                needed[self._texts.chosen[wanted]] = needed[self._texts.rejected[wanted]] = True
                scores = self._log_probs(needed, self._own_tables(rows[None]))
                margins[wanted] = self._margins(self._pair(scores, wanted), wanted)
        return margins

    def along(self, directions: Tensor, rows: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
        """Return the margin of each pair, `[N]`, and its gradient `[N, k]` along directions of the user's row.

        It takes about three times as long as the margins.

        Args:
            directions: `[k, p]` directions of a row.
            rows: `[R, p]` user rows, as above.
            of: `[N]` row number of each pair.
        """
        of, margins = of.to(self._device), rows.new_zeros(len(self._texts.chosen))
        slopes = rows.new_zeros(len(margins), len(directions))
        with eval_mode(self._model), torch.enable_grad():
            for some in self._batches(self._every, _POSITIONS_WITH_GRADIENT):
                pause()
                own = {name: table.requires_grad_() for name, table in self._own_tables(rows[of[some]]).items()}
                found = self._apart(some, own)
                # Each pair gets its own copy of the row, so that one backward pass gives the gradient of each margin
                # separately.
                grads = torch.autograd.grad(found.sum(), list(own.values()), allow_unused=True, materialize_grads=True)
                dense = [grad.to_dense() if grad.is_sparse else grad for grad in grads]
                margins[some], slopes[some] = found.detach(), table_rows(dense)[1:] @ directions.T
        return margins, slopes

    def _batches(self, index: Tensor, positions: int) -> Sequence[Tensor]:
        """Return batches of pairs of similar length, which saves padding."""
        texts, lengths = self._texts, self._texts.completion.mask.sum(1)
        longest = torch.maximum(lengths[texts.chosen[index]], lengths[texts.rejected[index]])
        return torch.split(index[longest.argsort(stable=True)], self._most(positions)) if len(index) else ()

    def _most(self, positions: int) -> int:
        """Return the maximum number of pairs in a pass with rows of `positions`."""
        return max(1, min(self._batch_size, positions // max(1, self._longest)))

    def _apart(self, index: Tensor, own: dict[str, Tensor]) -> Tensor:
        """Score the pairs `index` `[n]`, each under its own row of the tables of `_own_tables`."""
        texts = self._texts
        completions = [texts.completion.select(part[index]).trimmed() for part in (texts.chosen, texts.rejected)]
        prompts = texts.prompt_of[texts.chosen[index]]
        visible = self._soft_prompt(prompts, own, torch.arange(1, len(index) + 1, device=self._device))
        scored = self._policy.log_probs(texts.prompt.select(prompts).trimmed(), completions, visible)
        return self._margins(PairLogProbs(*scored), index)

    @torch.no_grad()
    def _log_probs(self, wanted: Tensor, own: dict[str, Tensor] | None) -> LogProbs:
        """Score completions `[D]` under the only user of `own`, or under the reference; others get zeros."""
        texts, most = self._texts, self._most(self._positions)
        scores = torch.zeros(texts.completion.mask.shape, device=self._device)
        for completions in texts.groups(wanted, most):
            pause()
            prompts, prompt_of = torch.unique(texts.prompt_of[completions], return_inverse=True)
            found = (self._policy if own else self._model.policy).grouped_log_probs(
                texts.prompt.select(prompts).trimmed(),
                texts.completion.select(completions).trimmed(),
                prompt_of,
                self._soft_prompt(prompts, own, torch.ones_like(prompts)),
                reference=own is None,
                batch_size=2 * most,
            )
            scores[completions, : found.tokens.shape[1]] = found.tokens
        return LogProbs(scores, texts.completion.mask)

    def _soft_prompt(self, prompts: Tensor, own: dict[str, Tensor] | None, places: Tensor) -> SoftPrompt | None:
        """Return the soft prompts of U prompts: of users at `places` `[U]` of own tables, or of the reference."""
        text = self._texts.user_text.select(prompts).trimmed()
        users = self._model.users([""] * len(prompts), text, reference=own is None)
        if own is None:
            return self._model.user_model.reference(users)
        prompt: SoftPrompt = functional_call(self._model.user_model, own, (replace(users, rows=places),))
        return prompt

    def _own_tables(self, rows: Tensor) -> dict[str, Tensor]:
        """Return tables with the generic user's row and `rows` `[n, p]`; only the latter may be trained."""
        parts = torch.split(rows.detach(), [table[0].numel() for table in self._tables.values()], dim=1)
        return {
            name: torch.cat([table.detach()[:1], part.reshape(len(rows), *table.shape[1:]).to(table.dtype)])
            for part, (name, table) in zip(parts, self._tables.items(), strict=True)
        }

    def _pair(self, scores: LogProbs, index: Tensor) -> PairLogProbs:
        return PairLogProbs(scores.select(self._texts.chosen[index]), scores.select(self._texts.rejected[index]))

    def _margins(self, scored: PairLogProbs, index: Tensor) -> Tensor:
        """Return the margins `[n]` of the pairs `index`."""
        reference = self._pair(self._reference, index) if self._reference is not None else None
        chosen, rejected = self._model.loss.rewards(scored, reference)
        return chosen - rejected


def check_ranks_pairs(model: PersonalizedModel) -> None:
    """Refuse a model whose loss does not rank two completions."""
    if model.loss.feedback != "pairs":
        raise ConfigurationError(
            f"This model was trained on {model.loss.feedback} ({type(model.loss).__name__}). New users are learned, "
            "and trained ones' rows judged, from pairs and by a loss that ranks pairs, such as DPOLoss; to serve "
            f"new users of this model, train it with their {model.loss.feedback} too."
        )


def users_in(pairs: PreferenceBatch, user_ids: Sequence[str] | None) -> tuple[str, ...]:
    """Return `user_ids`, or else the users of the pairs.

    Raises:
        ConfigurationError: A pair belongs to another user, or an id is repeated.
    """
    present = dict.fromkeys(pairs.user_ids)
    if user_ids is None:
        return tuple(present)
    named = dict.fromkeys(user_ids)
    if missing := [user_id for user_id in present if user_id not in named]:
        raise ConfigurationError(
            f"user_ids: {missing[0]!r} has pairs and is not among them (nor are {len(missing) - 1} others). Name all "
            "who have pairs, or leave the others' pairs out (`select_pairs`)."
        )
    if len(named) < len(user_ids):
        raise ConfigurationError("user_ids: an id is repeated; give each user once.")
    return tuple(named)


def table_rows(tables: Sequence[Tensor]) -> Tensor:
    """Return the concatenated rows of several tables, `[n, p]` float32."""
    return torch.cat([table.detach().flatten(1).float() for table in tables], dim=1)


def row_tables(model: PersonalizedModel) -> dict[str, Tensor]:
    """Return the user tables by their names in the user model; raise if there are none."""
    by_id = {id(parameter): name for name, parameter in model.user_model.named_parameters()}
    tables = {by_id[id(table)]: table for table in model.user_model.row_tables()}
    if not tables:
        raise ConfigurationError(
            f"user_model: {type(model.user_model).__name__} has no user rows, so it cannot learn users."
        )
    return tables


@dataclass(frozen=True)
class DistinctTexts:
    """The P distinct prompts and D distinct completions of N pairs.

    A prompt is identified by its own text, and by the text about the user if the user model reads it; a completion by
    its text and its prompt.

    Attributes:
        prompt: `[P, L]` tokens of the prompts.
        user_text: `[P, L]` tokens of the texts about users; empty if the user model does not read them.
        completion: `[D, L]` tokens of the completions.
        prompt_of: `[D]` prompt of each completion.
        chosen: `[N]` the completion that each pair's user preferred.
        rejected: `[N]` the other completion.
    """

    prompt: Tokens
    user_text: Tokens
    completion: Tokens
    prompt_of: Tensor
    chosen: Tensor
    rejected: Tensor

    @classmethod
    def of(cls, pairs: PreferenceBatch, uses_text: bool) -> DistinctTexts:
        """Return the distinct texts of N pairs; `uses_text` includes the text about the user."""
        text = pairs.user_text if uses_text else Tokens(pairs.user_text.ids[:, :0], pairs.user_text.mask[:, :0])
        prompts, prompt_of_pair = _distinct(_contents(text), _contents(pairs.prompt))
        both = Tokens.concat([pairs.chosen, pairs.rejected])
        completions, number = _distinct(prompt_of_pair * 2, _contents(both))

        def index(places: Sequence[int]) -> Tensor:
            return torch.tensor(places, dtype=torch.long, device=both.ids.device)

        return cls(
            pairs.prompt.select(index(prompts)),
            text.select(index(prompts)),
            both.select(index(completions)),
            index([(prompt_of_pair * 2)[place] for place in completions]),
            *(index(half) for half in (number[: len(pairs)], number[len(pairs) :])),
        )

    def groups(self, wanted: Tensor, most: int) -> Iterator[Tensor]:
        """Group completions by their prompts, with prompts of similar completion length together.

        Args:
            wanted: `[D]` bool, the completions to group.
            most: Maximum number of prompts in a group.

        Yields:
            `[n]` completions: all wanted ones of up to `most` prompts.
        """
        places = wanted.nonzero().flatten()
        longest = torch.zeros(len(self.prompt), dtype=torch.long, device=wanted.device)
        longest = longest.scatter_reduce(0, self.prompt_of[places], self.completion.mask.sum(1)[places], "amax")
        rank = longest.argsort(stable=True).argsort()  # prompts without wanted completions come first
        rank = (rank - (longest == 0).sum())[self.prompt_of[places]] // most
        order = rank.argsort(stable=True)
        yield from torch.split(places[order], torch.bincount(rank).tolist())


def _contents(tokens: Tokens) -> list[bytes]:
    return [ids.numpy().tobytes() for ids in tokens.to("cpu").unpadded()]


def _distinct(*parts: Sequence[bytes | int]) -> tuple[list[int], list[int]]:
    """Return the first row of each distinct content, and for each row the number of its content."""
    first: dict[tuple[bytes | int, ...], int] = {}
    for row, content in enumerate(zip(*parts, strict=True)):
        first.setdefault(content, row)
    number = {content: place for place, content in enumerate(first)}
    return list(first.values()), [number[content] for content in zip(*parts, strict=True)]
