"""`PersonalizedModel`: user model, policy and loss together, without Lightning, for training, inference and reports.

Shapes: B pairs or prompts in a batch, K pairs of a user's history, L tokens, d the policy's embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag
from transformers import PreTrainedTokenizerBase

from prlhf_lightning.data.records import Text
from prlhf_lightning.data.tokenization import (
    FeedbackTokenizer,
    TokenizationSettings,
    decode,
    loses_first_space,
    read_on_from,
)
from prlhf_lightning.data.users import UserVocabulary
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.losses import PreferenceLoss
from prlhf_lightning.policies import Policy, Sampling
from prlhf_lightning.policies.shared_texts import SharedTexts, contents, distinct
from prlhf_lightning.types import (
    History,
    LogProbs,
    PairLogProbs,
    PairTokens,
    PreferenceBatch,
    SoftPrompt,
    Tokens,
    Users,
    to_device,
)
from prlhf_lightning.user_models import UserModel

# Share prompts and completions between pairs if that saves at least this share of all positions. Below it, looking
# them up and scattering their scores costs as much.
_MIN_SAVED = 0.2


class KeepsReference(Protocol):
    """Store of reference log-probs."""

    def keep(self, batch: PreferenceBatch, computed: PairLogProbs) -> PairLogProbs:
        """Store a batch's log-probs and return them."""


class PersonalizedModel(nn.Module):
    """A policy conditioned on users by a user model, with the loss that defines implicit rewards.

    Args:
        user_model: Maps users to soft-prompt vectors.
        policy: The language model conditioned on these vectors.
        loss: Decides which completions of a row are scored, and maps log-probs to rewards.

    Attributes:
        vocabulary: The users with a row in the user model; None before `setup()` or before a checkpoint is loaded.
        tokenization: Tokenization settings.
        sampling: Default sampling settings of `generate`.
        reference_store: Cache of reference log-probs; None for no cache.
    """

    def __init__(self, user_model: UserModel, policy: Policy, loss: PreferenceLoss) -> None:
        super().__init__()
        self.user_model = user_model
        self.policy = policy
        self.loss = loss
        self.vocabulary: UserVocabulary | None = None
        self.tokenization = TokenizationSettings()
        self.sampling = Sampling()
        self.reference_store: KeepsReference | None = None

    # ---- users

    def users(self, user_ids: Sequence[str], user_text: Tokens, reference: bool = False) -> Users:
        """Look up users and embed their texts.

        Args:
            user_ids: B ids; unknown users fall back to the generic user.
            user_text: B texts; an empty row for a user without a text.
            reference: Embed the texts with the reference policy.

        Raises:
            ConfigurationError: The model has no users yet.
        """
        rows = to_device(self._known_users().rows(user_ids), user_text.ids.device)
        with_text = self.user_model.uses_text and user_text.ids.shape[1] > 0
        return Users(rows, self.policy.embed(user_text, reference) if with_text else None)

    def users_of(self, batch: PreferenceBatch) -> Users:
        """Look up a batch's users, with their earlier pairs if the user model reads these."""
        users = self.users(batch.user_ids, batch.user_text)
        if batch.history is None or not self.user_model.history_size:
            return users
        return replace(users, history=pool_history(self.policy, batch.history))

    @torch.no_grad()
    def add_users(self, user_ids: Sequence[str], rows: Tensor) -> None:
        """Add adapted users, such as those of `adapt_users`, or replace the rows of known users.

        Args:
            user_ids: B ids.
            rows: `[B, p]` rows of each user in all tables of the user model, flattened and concatenated.

        Raises:
            ConfigurationError: The model has no users yet.
        """
        known, tables = self._known_users(), self.user_model.row_tables()
        if new := [user_id for user_id in user_ids if user_id not in known]:
            for table in tables:
                table.data = torch.cat([table.data, table.data[:1].expand(len(new), *table.shape[1:])])
            self.vocabulary = known = known.plus(*new)
        places = known.rows(user_ids)
        for table, part in zip(tables, torch.split(rows, [table[0].numel() for table in tables], dim=1), strict=True):
            table.data[places.to(table.device)] = part.view(len(rows), *table.shape[1:]).to(table)

    def _known_users(self) -> UserVocabulary:
        if self.vocabulary is None:
            raise ConfigurationError("The users are not known yet: call setup() or load a checkpoint first.")
        return self.vocabulary

    def penalty(self, batch: PreferenceBatch) -> Tensor | None:
        """Return the user model's penalty of each pair's user, `[B]`, or None; see `UserModel.penalty`."""
        if not self.training:
            return None
        return self.user_model.penalty(Users(to_device(self._known_users().rows(batch.user_ids), self.device)))

    # ---- log-probs and rewards

    def reference_log_probs(self, batch: PreferenceBatch) -> PairLogProbs | None:
        """Score a batch's completions under the reference, which never sees the user's id.

        Returns:
            The log-probs, without gradient; None if the loss needs no reference.
        """
        if not self.loss.requires_reference:
            return None
        if batch.reference is not None:
            return batch.reference
        first, of_pair = self._distinct(batch)
        with torch.no_grad():
            visible = self.user_model.reference(self.users(batch.user_ids, batch.user_text, reference=True))
        visible = visible.select(first) if visible is not None else None
        completions = [part.select(first) for part in self._completions(batch)]
        scored = self.policy.reference_log_probs(batch.prompt.select(first), completions, visible)
        reference = self._pair(scored, batch.desirable[first]).select(of_pair)
        if self.reference_store is not None and batch.reference_keys:
            reference = self.reference_store.keep(batch, reference)
        return reference

    def log_probs(self, batch: PreferenceBatch, generic: Sequence[bool] = (False,)) -> list[PairLogProbs]:
        """Score a batch's completions once for each entry of `generic`, in one forward pass of the policy.

        Under the generic user, a pair that several users of the batch judged is scored once.

        Args:
            batch: B pairs.
            generic: For each result, whether the generic user replaces each user.

        Returns:
            Differentiable log-probs, one result for each entry of `generic`.
        """
        every = torch.arange(len(batch), device=self.device)
        first, of_pair = self._distinct(batch) if any(generic) else (every, every)
        rows = [first if g else every for g in generic]
        is_generic = torch.cat([torch.full((len(r),), g) for r, g in zip(rows, generic, strict=True)])
        scored = self._scored_under(batch, torch.cat(rows), is_generic)
        ends = torch.tensor([len(r) for r in rows]).cumsum(0).tolist()
        places = [torch.arange(end - len(r), end, device=first.device) for r, end in zip(rows, ends, strict=True)]
        return [scored.select(place[of_pair] if g else place) for place, g in zip(places, generic, strict=True)]

    def log_probs_under_either(self, batch: PreferenceBatch, generic: Tensor) -> PairLogProbs:
        """Score each pair once, under its own user or under the generic user.

        Args:
            batch: B pairs.
            generic: `[B]` bool, true where the generic user replaces the user; on the CPU, to avoid a device sync.

        Returns:
            Differentiable log-probs of B pairs.
        """
        return self._scored_under(batch, torch.arange(len(batch), device=self.device), generic)

    def _scored_under(self, batch: PreferenceBatch, rows: Tensor, generic: Tensor) -> PairLogProbs:
        """Score the pairs at `rows` `[N]`, under the generic user where `generic` `[N]` (on the CPU) says so."""
        users = self.users_of(batch)
        if self.policy.shares_prompts and users.history is None:
            completions = [part.select(rows) for part in self._completions(batch)]
            who = users.rows[rows].masked_fill(to_device(generic, rows.device), 0)
            texts = [batch.user_text] if self.user_model.uses_text else []
            asked = [contents(part.select(rows)) for part in (batch.prompt, *texts)]
            shared = SharedTexts.find([who, *asked], completions)
            if shared.saved(batch.prompt.mask.shape[1]) >= _MIN_SAVED:
                first = rows[shared.rows]
                soft_prompt = self._prompts_under(users.select(first), generic[shared.rows.cpu()])
                scores = self.policy.grouped_log_probs(
                    batch.prompt.select(first), shared.completions, shared.prompt_of, soft_prompt
                )
                return self._pair(shared.of_rows(scores), batch.desirable[rows])
        return self.scored(batch, rows, self._prompts_under(users.select(rows), generic))

    def _prompts_under(self, users: Users, generic: Tensor) -> SoftPrompt:
        """Return the soft prompts of N users, or of the generic user where `generic` `[N]` (on the CPU) says so."""
        order = to_device(generic.int().argsort(stable=True), users.rows.device)
        own, others = (users.select(rows) for rows in order.tensor_split([int((~generic).sum())]))
        return SoftPrompt.cat_batch([self.user_model(own), self.user_model.generic(others)]).select(order.argsort())

    @torch.no_grad()
    def rewards(self, batch: PreferenceBatch, generic: bool = False) -> tuple[Tensor, Tensor]:
        """Return the implicit rewards of a batch's chosen and rejected completions, `[B]` each.

        Args:
            batch: B pairs.
            generic: Whether the generic user replaces each user.
        """
        (scored,) = self.log_probs(batch, [generic])
        return self.loss.rewards(scored, self.reference_log_probs(batch))

    @torch.no_grad()
    def completion_rewards(self, batch: PreferenceBatch) -> Tensor:
        """Return the implicit rewards of a batch's chosen completions alone, `[B]`; the rejected ones are not read.

        Args:
            batch: B completions.
        """
        own = self.policy.log_probs(batch.prompt, [batch.chosen], self.user_model(self.users_of(batch)))
        nothing = batch.desirable.new_ones(len(batch))
        reference = None
        if self.loss.requires_reference:
            visible = self.user_model.reference(self.users(batch.user_ids, batch.user_text, reference=True))
            scored = self.policy.reference_log_probs(batch.prompt, [batch.chosen], visible)
            reference = self._pair(scored, nothing)
        return self.loss.rewards(self._pair(own, nothing), reference)[0]

    def scored(self, batch: PreferenceBatch, rows: Tensor, soft_prompt: SoftPrompt) -> PairLogProbs:
        """Return differentiable log-probs of the pairs at `rows` `[N]`, each with its own of N soft prompts."""
        completions = [part.select(rows) for part in self._completions(batch)]
        scores = self.policy.log_probs(batch.prompt.select(rows), completions, soft_prompt)
        return self._pair(scores, batch.desirable[rows])

    def _distinct(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """Find the distinct pairs of a batch, regardless of the user.

        Returns:
            The first row of each distinct pair `[U]`, and for each row the index of its pair `[B]`.
        """
        # Compare both sides of an unpaired row: by its completion alone, thumbs-up and thumbs-down would be equal.
        completions = self._completions(batch) if self.loss.feedback != "thumbs" else [batch.chosen, batch.rejected]
        parts = [batch.prompt, *completions, *([batch.user_text] if self.user_model.uses_text else [])]
        return distinct(torch.cat([contents(part) for part in parts], dim=1))

    def _completions(self, batch: PreferenceBatch) -> list[Tokens]:
        """Return the completions of each row that are scored."""
        if self.loss.feedback == "pairs":
            return [batch.chosen, batch.rejected]
        return [batch.completion if self.loss.feedback == "thumbs" else batch.chosen]

    def _pair(self, scores: Sequence[LogProbs], desirable: Tensor) -> PairLogProbs:
        """Arrange the scores of rows as pairs; `desirable` `[B]` is true for liked unpaired rows."""
        if self.loss.feedback == "thumbs":
            (completion,) = scores
            return PairLogProbs(*(_where(kind[:, None], completion) for kind in (desirable, ~desirable)))
        nothing = LogProbs(scores[0].tokens[:, :0], scores[0].mask[:, :0])
        return PairLogProbs(scores[0], scores[1] if len(scores) > 1 else nothing)

    # ---- generation

    @torch.no_grad()
    def generate(
        self,
        prompt: Tokens | Sequence[Text],
        user_ids: Sequence[str],
        user_text: Tokens | Sequence[str] | None = None,
        sampling: Sampling | None = None,
        chat_template: bool | None = None,
    ) -> list[str]:
        """Generate a completion of each prompt for its user.

        Args:
            prompt: B prompts: strings, conversations, or token ids. Texts are tokenized as in training: a prompt over
                `max_prompt_length` keeps its end.
            user_ids: B ids; unknown users fall back to the generic user.
            user_text: B texts about the users (empty for none) or their token ids, or None.
            sampling: Sampling settings; by default `self.sampling`.
            chat_template: Whether to wrap a string in the chat template as one turn of the user. By default true if the
                strings of the training rows were wrapped, or if these rows were conversations.

        Raises:
            ConfigurationError: The numbers of users, or of texts about them, and of prompts differ.
        """
        settings = self.tokenization
        if chat_template is not None:
            settings = replace(settings, chat_template=chat_template)
        inputs = _Inputs.of(prompt, user_ids, user_text, self.policy.tokenizer, settings, self.device)
        soft_prompt = self.user_model(self.users(user_ids, inputs.user_text))
        written = self.policy.generate(inputs.prompt, soft_prompt, sampling or self.sampling)
        if isinstance(prompt, Tokens):
            return self.texts_of(written, inputs.prompt)
        is_raw = [isinstance(one, str) and not settings.chat_template for one in prompt]
        return self.texts_of(written, inputs.prompt, is_raw)

    def texts_of(self, written: Tokens, prompt: Tokens, is_raw: Sequence[bool] | None = None) -> list[str]:
        """Return completions as text, without special tokens.

        Args:
            written: B completions.
            prompt: Their prompts.
            is_raw: For each prompt, true if it was not rendered by a chat template; by default as in training.
        """
        tokenizer, lost = self.policy.tokenizer, self._loses_first_space
        goes_on = [not self.tokenization.chat_template] * len(prompt) if is_raw is None else is_raw
        rows = zip(written.unpadded(), prompt.unpadded(), goes_on, strict=True)
        return [decode(tokenizer, ids.tolist(), read_on_from(before.tolist(), on, lost)) for ids, before, on in rows]

    @property
    def device(self) -> torch.device:
        """Device of the weights; the CPU if there are none."""
        return next((parameter.device for parameter in self.parameters()), torch.device("cpu"))

    @cached_property
    def _loses_first_space(self) -> bool:
        return loses_first_space(self.policy.tokenizer)


@torch.no_grad()
def pool_history(policy: Policy, pairs: PairTokens) -> History:
    """Return the mean input embeddings of users' completions under the reference.

    Training does not change the reference, so pooled histories stay valid. The policy is called exactly once, because
    all processes must call a sharded policy equally often. Each distinct token is embedded once: the embeddings
    `[2 * B * K, L, d]` of all tokens would be many times larger than a batch.

    Args:
        policy: A policy built with a reference.
        pairs: Histories `[B, K, L]`.
    """
    sides = pairs.chosen, pairs.rejected
    lengths = torch.stack([side.mask.sum(-1) for side in sides])
    ids = torch.cat([side.ids[side.mask] for side in sides] + [lengths.new_zeros(1)])  # the last id is padding
    words, places = torch.unique(ids, return_inverse=True)
    vectors = policy.embed(Tokens(words[None], torch.ones_like(words[None], dtype=torch.bool)), reference=True).vectors
    starts = torch.cat([lengths.new_zeros(1), lengths.flatten().cumsum(0)])
    means = embedding_bag(places, vectors[0].float(), starts, mode="mean")[:-1]
    chosen, rejected = means.view(*lengths.shape, means.shape[1])
    return History(chosen, rejected, lengths.permute(1, 2, 0))


@dataclass(frozen=True)
class _Inputs:
    """B prompts and B texts about their users, as token ids."""

    prompt: Tokens
    user_text: Tokens

    @classmethod
    def of(
        cls,
        prompts: Tokens | Sequence[Text],
        user_ids: Sequence[str],
        user_texts: Tokens | Sequence[str] | None,
        tokenizer: PreTrainedTokenizerBase,
        settings: TokenizationSettings,
        device: torch.device,
    ) -> _Inputs:
        """Tokenize prompts and user texts that are not ids yet; the new ids are on `device`.

        Raises:
            ConfigurationError: A string is given instead of a list, or the lists' lengths differ.
        """
        given: dict[str, Any] = {"prompt": prompts, "user_ids": user_ids, "user_text": user_texts}
        for name, value in given.items():
            if isinstance(value, str):
                raise ConfigurationError(
                    f"{name} is a string; give a list with one entry per prompt, such as [{value[:40]!r}]."
                )
        if len(prompts) != len(user_ids) or (user_texts is not None and len(user_texts) != len(prompts)):
            texts = "" if user_texts is None else f" and {len(user_texts)} texts about users"
            raise ConfigurationError(
                f"There are {len(prompts)} prompts for {len(user_ids)} users{texts}; give equally many, and repeat a "
                "prompt for each of its users."
            )
        nothing = Tokens.from_lists([[]] * len(prompts)).to(device)
        if isinstance(prompts, Tokens) and not isinstance(user_texts, Sequence):
            return cls(prompts, nothing if user_texts is None else user_texts)
        encode = FeedbackTokenizer(tokenizer, settings)
        if not isinstance(prompts, Tokens):
            if any(not isinstance(prompt, str) and prompt[-1]["role"] == "assistant" for prompt in prompts if prompt):
                raise ConfigurationError(
                    "prompt: the last message is the assistant's, which needs no answer; end with a message of the "
                    "user, or continue it with Generator and GenerationRequest(..., continue_final_message=True)."
                )
            prompts = Tokens.from_lists(encode.prompts(prompts)).to(device)
        if isinstance(user_texts, Sequence):
            limit = settings.max_user_text_length
            user_texts = Tokens.from_lists([ids[:limit] for ids in encode.user_texts(user_texts)]).to(device)
        return cls(prompts, nothing if user_texts is None else user_texts)


def _where(kept: Tensor, scores: LogProbs) -> LogProbs:
    """Mask the scores of rows where `kept` `[B, 1]` is false."""
    return LogProbs(torch.where(kept, scores.tokens, 0.0), scores.mask & kept)
