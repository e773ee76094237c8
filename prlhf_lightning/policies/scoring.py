"""Scoring completions with a Hugging Face causal LM, on the quickest way that the model allows.

B prompts with n completions each; d the hidden width; N the completion tokens of all rows together.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prlhf_lightning.policies.attention import takes_block_masks
from prlhf_lightning.policies.sequences import join, token_log_probs
from prlhf_lightning.policies.trees import BLOCK, plant
from prlhf_lightning.types import LogProbs, SoftPrompt, Tokens

# The prompt is computed once where that spares at least this share of all positions (benchmarks/prompt_sharing.py):
# below, what is added costs as much, a second pass through the layers or attention over whole trees.
_WORTH_SHARING = 0.1
_WORTH_A_TREE = 0.15
# Positions of a row of trees, at most: the table of blocks grows with its square.
_ROW = 1 << 15


@dataclass(frozen=True)
class Shortcuts:
    """What may be skipped with a model, without changing a number.

    Attributes:
        head: Logits are the output embedding applied to the last hidden state and nothing more, so that it can be
            applied to completion positions alone.
        shared_prompt: Completions can be continued from the key-value cache of their prompt.
        trees: Completions can be branches of a tree whose trunk is their prompt; see `trees.py`.
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
    shortcuts: Shortcuts,
    as_trees: bool = False,
) -> tuple[LogProbs, ...]:
    """Score n completions of the same B prompts.

    Args:
        lm: The model.
        before: What precedes the completions, in segments of B rows.
        completions: n batches of B completions.
        shortcuts: What may be skipped with this model.
        as_trees: Score trees where they may be, however much that spares.

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
    if shortcuts.trees and (as_trees or pays_as_tree):
        hidden = _tree_states(lm, before, completions, rows, offsets)
    elif shortcuts.shared_prompt and n > 1 and spared >= _WORTH_SHARING:
        hidden = _continued_states(lm, before, targets, n)[rows, offsets]
    else:
        repeated = [SoftPrompt(part.vectors.repeat(n, 1, 1), part.mask.repeat(n, 1)) for part in before]
        # The token at place i is predicted from place i - 1.
        places = torch.stack([part.mask.sum(1) for part in repeated]).sum(0)[rows] + offsets - 1
        inputs = model_inputs(lm, join([*repeated, embed(lm, targets)]))
        if shortcuts.head:
            hidden = lm.base_model(**inputs).last_hidden_state[rows, places]
        else:
            hidden, head = lm(**inputs).logits[rows, places], nn.Identity()
    scores = token_log_probs(hidden, ids, head, lm.get_input_embeddings().weight.shape[0])
    log_probs = scores.new_zeros(targets.mask.shape).index_put((rows, offsets), scores)
    return LogProbs(log_probs, targets.mask).chunk(n)


def _spared(before: Sequence[SoftPrompt], targets: Tokens, n: int) -> float:
    """Return the share of positions that computing each prompt once spares."""
    prompt, completion = sum(part.mask.shape[1] for part in before), targets.ids.shape[1]
    return (n - 1) * prompt / (n * (prompt + completion))


def _continued_states(lm: PreTrainedModel, before: Sequence[SoftPrompt], targets: Tokens, n: int) -> Tensor:
    """Return the hidden states `[n * B, L, d]` that predict the completions, each prompt computed once.

    The n completions of a prompt are continued from its keys and values, which carry the gradient of all n.
    """
    prompt = join(before, align="right")  # its last position is real in every row, and predicts the first token
    prefix = lm.base_model(**model_inputs(lm, prompt), use_cache=True)
    name = cache_name(lm)
    cache = getattr(prefix, name)
    every = torch.arange(len(prompt.mask), device=prompt.mask.device).repeat(n)
    cache.batch_select_indices(every)
    first: Tensor = prefix.last_hidden_state[:, -1:][every]
    if targets.ids.shape[1] == 1:
        return first
    rest = embed(lm, Tokens(targets.ids[:, :-1], targets.mask[:, :-1]))
    mask = torch.cat([prompt.mask[every], rest.mask], dim=1)
    inputs = model_inputs(lm, SoftPrompt(rest.vectors, mask), past=prompt.mask.shape[1])
    hidden = lm.base_model(**inputs, **{name: cache}, use_cache=True).last_hidden_state
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
        forest = plant(before, branches, max(1, min(trees, _ROW // longest)), BLOCK)
    else:
        forest = plant(before, branches)
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


def arguments(lm: PreTrainedModel) -> Collection[str]:
    """Return the names of a model's inputs."""
    return inspect.signature(lm.base_model.forward).parameters


def cache_name(lm: PreTrainedModel) -> str:
    """Return the name of the argument and output that holds a model's cache."""
    # transformers renamed it within version 5; both names are in the range that is supported.
    return "cache" if "cache" in arguments(lm) else "past_key_values"
