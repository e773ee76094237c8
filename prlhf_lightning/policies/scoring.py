"""Scoring completions with a Hugging Face causal LM, on the quickest way that the model allows.

B prompts with n completions each; d the hidden width; N the completion tokens of all rows together.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from prlhf_lightning.policies.moe import states_and_router_loss
from prlhf_lightning.policies.prefix_sharing import BLOCK, pack_prefixes, takes_block_masks
from prlhf_lightning.policies.sequences import join, token_log_probs
from prlhf_lightning.types import LogProbs, SoftPrompt, Tokens

# The prompt is computed once where that spares at least this share of all positions (benchmarks/prompt_sharing.py):
# below, what is added costs as much, a second pass through the layers or attention over whole trees.
_WORTH_SHARING = 0.1
_WORTH_A_TREE = 0.15
# Positions of a row of trees, at most: the table of blocks grows with its square.
_ROW = 1 << 15


@dataclass(frozen=True)
class Capabilities:
    """What may be skipped with a model, without changing a number.

    Attributes:
        head: Logits are the output embedding applied to the last hidden state and nothing more, so that it can be
            applied to completion positions alone.
        shared_prompt: Completions can be continued from the key-value cache of their prompt.
        trees: Completions can be branches of a tree whose trunk is their prompt; see `prefix_sharing.py`.
    """

    head: bool
    shared_prompt: bool
    trees: bool = False


def embed(lm: PreTrainedModel, tokens: Tokens) -> SoftPrompt:
    """Return the input embeddings of tokens as vectors, `[B, L, d]`."""
    return SoftPrompt(lm.get_input_embeddings()(tokens.ids), tokens.mask)


def segments(
    lm: PreTrainedModel, bos_id: int | None, prompt: Tokens, soft_prompt: SoftPrompt | None
) -> list[SoftPrompt]:
    """Return what precedes a completion, embedded: BOS where the prompt has one, soft prompt, prompt."""
    embedded = embed(lm, prompt)
    if soft_prompt is None:
        return [embedded]
    is_bos = torch.zeros_like(prompt.mask)
    if bos_id is not None:
        is_bos[:, :1] = prompt.ids[:, :1] == bos_id
    bos = SoftPrompt(embedded.vectors[:, :1], (embedded.mask & is_bos)[:, :1])
    vectors = soft_prompt.vectors.to(embedded.vectors.dtype)
    return [bos, SoftPrompt(vectors, soft_prompt.mask), SoftPrompt(embedded.vectors, embedded.mask & ~is_bos)]


def score(
    lm: PreTrainedModel,
    before: Sequence[SoftPrompt],
    completions: Sequence[Tokens],
    shortcuts: Capabilities,
    as_trees: bool = False,
    router_losses: list[Tensor] | None = None,
) -> tuple[LogProbs, ...]:
    """Score n completions of the same B prompts.

    Args:
        lm: The model.
        before: What precedes the completions, in segments of B rows.
        completions: n batches of B completions.
        shortcuts: What may be skipped with this model.
        as_trees: Score trees where they may be, however much that spares.
        router_losses: A list to which a mixture of experts appends its load-balancing loss; each row is then computed
            whole, as the loss is a mean over all tokens.

    Returns:
        For each batch of completions, its per-token log-probabilities, float32.
    """
    n = len(completions)
    targets = Tokens.concat(completions)
    rows, offsets = targets.mask.nonzero(as_tuple=True)
    ids = targets.ids[rows, offsets]
    head = lm.get_output_embeddings()
    spared = _spared(before, targets, n)
    # Attention under a dense mask goes over whole trees, n times the completions; only this has been measured.
    pays_as_tree = n == 2 and ids.device.type == "cpu" and not shortcuts.shared_prompt and spared >= _WORTH_A_TREE
    whole_rows = router_losses is not None
    if shortcuts.trees and (as_trees or pays_as_tree) and not whole_rows:
        hidden = _tree_states(lm, before, completions, rows, offsets)
    elif shortcuts.shared_prompt and n > 1 and spared >= _WORTH_SHARING and not whole_rows:
        row_of = torch.arange(len(targets) // n, device=rows.device).repeat(n)
        hidden = _Prefix.of(lm, before).continued(lm, targets, row_of)[rows, offsets]
    else:
        repeated = [SoftPrompt(part.vectors.repeat(n, 1, 1), part.mask.repeat(n, 1)) for part in before]
        # The token at place i is predicted from place i - 1.
        places = torch.stack([part.mask.sum(1) for part in repeated]).sum(0)[rows] + offsets - 1
        inputs = model_inputs(lm, join([*repeated, embed(lm, targets)]))
        if router_losses is not None:
            states, loss = states_and_router_loss(lm, inputs, shortcuts.head)
            router_losses.append(loss)
            hidden, head = states[rows, places], head if shortcuts.head else nn.Identity()
        elif shortcuts.head:
            # Mamba returns float32 whatever its weights are, and its head is what takes it back.
            hidden = lm.base_model(**inputs).last_hidden_state[rows, places].to(inputs["inputs_embeds"].dtype)
        else:
            hidden, head = lm(**inputs).logits[rows, places], nn.Identity()
    scores = token_log_probs(hidden, ids, head, lm.get_input_embeddings().weight.shape[0])
    log_probs = scores.new_zeros(targets.mask.shape).index_put((rows, offsets), scores)
    return LogProbs(log_probs, targets.mask).chunk(n)


@torch.no_grad()
def grouped_score(
    lm: PreTrainedModel,
    before: Sequence[SoftPrompt],
    completions: Tokens,
    prompt_of: Tensor,
    shortcuts: Capabilities,
    batch_size: int,
) -> LogProbs:
    """Score any number of completions of each of U prompts, without gradient.

    Args:
        lm: The model.
        before: What precedes the completions, in segments of U rows.
        completions: D completions.
        prompt_of: `[D]` each one's prompt.
        shortcuts: What may be skipped with this model.
        batch_size: Completions in a pass, which are of about the same length.

    Returns:
        Per-token log-probabilities `[D, L]`, float32.
    """
    prefix = _Prefix.of(lm, before) if shortcuts.shared_prompt else None
    vocab_size = lm.get_input_embeddings().weight.shape[0]
    log_probs = torch.zeros(completions.mask.shape, device=completions.ids.device)
    for some in torch.split(completions.mask.sum(1).argsort(stable=True), batch_size):
        rows = completions.select(some).trimmed()
        if prefix is not None:
            hidden = prefix.continued(lm, rows, prompt_of[some])
            scores = token_log_probs(hidden[rows.mask], rows.ids[rows.mask], lm.get_output_embeddings(), vocab_size)
            found = scores.new_zeros(rows.mask.shape).masked_scatter(rows.mask, scores)
        else:
            own = [part.select(prompt_of[some]) for part in before]
            found = score(lm, own, [rows], shortcuts)[0].tokens
        log_probs[some, : found.shape[1]] = found
    return LogProbs(log_probs, completions.mask)


def _spared(before: Sequence[SoftPrompt], targets: Tokens, n: int) -> float:
    """Return the share of positions that computing each prompt once spares."""
    prompt, completion = sum(part.mask.shape[1] for part in before), targets.ids.shape[1]
    return (n - 1) * prompt / (n * (prompt + completion))


@dataclass(frozen=True)
class _Prefix:
    """Prompts that have been read: U right-aligned rows.

    Attributes:
        cache: Their keys and values.
        last: `[U, 1, d]` hidden states of their last positions.
        mask: `[U, P]` bool, true where there is a position.
    """

    cache: DynamicCache
    last: Tensor
    mask: Tensor

    @classmethod
    def of(cls, lm: PreTrainedModel, before: Sequence[SoftPrompt]) -> _Prefix:
        """Read what stands before completions."""
        prompt = join(before, align="right")  # its last position is real in every row, and predicts the first token
        output = lm.base_model(**model_inputs(lm, prompt), use_cache=True)
        return cls(getattr(output, cache_name(lm)), output.last_hidden_state[:, -1:], prompt.mask)

    def continued(self, lm: PreTrainedModel, targets: Tokens, row_of: Tensor) -> Tensor:
        """Return the hidden states `[D, L, d]` that predict completions, each of the row of `row_of` `[D]`.

        The completions of a prompt share its keys and values, which carry the gradient of all.
        """
        first = self.last[row_of]
        if targets.ids.shape[1] == 1:
            return first
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        cache.batch_select_indices(row_of)
        rest = embed(lm, Tokens(targets.ids[:, :-1], targets.mask[:, :-1]))
        mask = torch.cat([self.mask[row_of], rest.mask], dim=1)
        inputs = model_inputs(lm, SoftPrompt(rest.vectors, mask), past=self.mask.shape[1])
        hidden = lm.base_model(**inputs, **{cache_name(lm): cache}, use_cache=True).last_hidden_state
        return torch.cat([first, hidden], dim=1)


def _tree_states(
    lm: PreTrainedModel, before: Sequence[SoftPrompt], completions: Sequence[Tokens], rows: Tensor, offsets: Tensor
) -> Tensor:
    """Return the hidden states `[N, d]` that predict the tokens at `rows` and `offsets`, each prompt computed once.

    A tree has a row of its own, unless the model takes block masks, which make longer rows cost no more.
    """
    branches = [embed(lm, part) for part in completions]
    trees = len(completions[0])
    packed = takes_block_masks(lm, rows.device)
    if packed:
        longest = sum(part.mask.shape[1] for part in (*before, *branches))
        forest = pack_prefixes(before, branches, max(1, min(trees, _ROW // longest)), BLOCK)
    else:
        forest = pack_prefixes(before, branches)
    hidden: Tensor = lm.base_model(
        inputs_embeds=forest.vectors,
        position_ids=forest.positions,
        attention_mask=forest.block_mask() if packed else forest.dense_mask(),
    ).last_hidden_state
    return hidden[forest.predicting(rows % trees, rows // trees, offsets)]


def model_inputs(lm: PreTrainedModel, sequence: SoftPrompt, past: int = 0) -> dict[str, Any]:
    """Return a model's inputs for vectors that stand after `past` cached positions; the mask covers both."""
    inputs: dict[str, Any] = {"inputs_embeds": sequence.vectors, "attention_mask": sequence.mask.long()}
    # Models without absolute or rotary positions (ALiBi, state-space) take no position ids.
    if "position_ids" in arguments(lm):
        inputs["position_ids"] = (sequence.mask.cumsum(1) - 1).clamp(min=0)[:, past:]
    return inputs


def writing_inputs(lm: PreTrainedModel) -> dict[str, Any]:
    """Return what a model is told with every token that it writes.

    Mixtures of experts are told to compute no auxiliary loss, which fails where the mask covers more than new tokens.
    """
    return {"output_router_logits": False} if "output_router_logits" in inspect.signature(lm.forward).parameters else {}


def arguments(lm: PreTrainedModel) -> Collection[str]:
    """Return the names of a model's inputs."""
    return inspect.signature(lm.base_model.forward).parameters


def cache_name(lm: PreTrainedModel) -> str:
    """Return the name of the argument and output that holds a model's cache."""
    # transformers renamed it within version 5; both names are in the range that is supported.
    return "cache" if "cache" in arguments(lm) else "past_key_values"
