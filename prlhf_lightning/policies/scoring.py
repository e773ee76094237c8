"""Scoring of completions with a Hugging Face causal LM, by the fastest method that the model supports.

B prompts with n completions each; d the hidden width; N the number of completion tokens in all rows.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from prlhf_lightning.policies.moe import states_and_router_loss
from prlhf_lightning.policies.prefix_sharing import BLOCK, pack_prefixes, takes_block_masks
from prlhf_lightning.policies.sequences import join, token_log_probs
from prlhf_lightning.types import LogProbs, SoftPrompt, Tokens

# Compute the prompt once if that saves at least this share of all positions (benchmarks/prompt_sharing.py). Below it,
# the overhead is as large: a second pass through the layers, or attention over whole trees.
_MIN_SAVED_BY_CACHE = 0.1
_MIN_SAVED_BY_TREES = 0.15
# Most positions of a packed row: the block mask grows with its square.
_MAX_ROW = 1 << 15


@dataclass(frozen=True)
class Capabilities:
    """Exact shortcuts that a model supports.

    Attributes:
        head: Logits are just the output embedding applied to the last hidden state, so it can be applied to completion
            positions only.
        shared_prompt: Completions can continue from the key-value cache of their prompt.
        trees: Completions can be packed as branches after their shared prompt; see `prefix_sharing.py`.
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
    """Return the embedded segments before a completion: BOS (if the prompt has one), soft prompt, prompt."""
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
    temperature: float = 1.0,
) -> tuple[LogProbs, ...]:
    """Score n completions of the same B prompts.

    Args:
        lm: The model.
        before: Segments before the completions, B rows each.
        completions: n batches of B completions.
        shortcuts: The model's capabilities.
        as_trees: Pack trees if the model supports it, however little that saves.
        router_losses: A list to which a mixture of experts appends its load-balancing loss. Completions then do not
            share their prompt, because the loss is a mean over all tokens.
        temperature: Divides the logits.

    Returns:
        For each batch of completions, its per-token log-probabilities, float32.
    """
    targets = Tokens.concat(completions)
    rows, offsets = targets.mask.nonzero(as_tuple=True)
    hidden = _states_before(lm, before, completions, rows, offsets, shortcuts, as_trees, router_losses)
    head = lm.get_output_embeddings() if shortcuts.head else nn.Identity()
    vocab_size = lm.get_input_embeddings().weight.shape[0]
    scores = token_log_probs(hidden, targets.ids[rows, offsets], head, vocab_size, temperature)
    log_probs = scores.new_zeros(targets.mask.shape).index_put((rows, offsets), scores)
    return LogProbs(log_probs, targets.mask).chunk(len(completions))


def end_states(
    lm: PreTrainedModel,
    before: Sequence[SoftPrompt],
    completions: Sequence[Tokens],
    shortcuts: Capabilities,
    as_trees: bool = False,
    router_losses: list[Tensor] | None = None,
) -> Tensor:
    """Return the last hidden state at the last real token of each completion, `[n * B, d]`; arguments as for `score`.

    That token is found by the mask: with a tokenizer that pads with its end token, ids do not tell them apart.
    """
    lengths = torch.cat([part.mask.sum(1) for part in completions])
    widened = [_widened(part) for part in completions]
    rows = torch.arange(len(lengths), device=lengths.device)
    states = replace(shortcuts, head=True)  # also of models whose logits need more than the states
    return _states_before(lm, before, widened, rows, lengths, states, as_trees, router_losses)


def _widened(completions: Tokens) -> Tokens:
    """Add a column of padding, so that each completion has a position after its last token."""
    return Tokens(*(nn.functional.pad(part, (0, 1)) for part in (completions.ids, completions.mask)))


def _states_before(
    lm: PreTrainedModel,
    before: Sequence[SoftPrompt],
    completions: Sequence[Tokens],
    rows: Tensor,
    offsets: Tensor,
    shortcuts: Capabilities,
    as_trees: bool,
    router_losses: list[Tensor] | None,
) -> Tensor:
    """Return the states `[N, d]` one position before those at `rows` and `offsets`; logits `[N, V]` without `head`."""
    n = len(completions)
    targets = Tokens.concat(completions)
    saved = _saved(before, targets, n)
    # With a dense mask, attention covers whole trees, n completions each; only this case was measured.
    on_cpu = rows.device.type == "cpu"
    pays_as_tree = n == 2 and on_cpu and not shortcuts.shared_prompt and saved >= _MIN_SAVED_BY_TREES
    whole_rows = router_losses is not None
    if shortcuts.trees and (as_trees or pays_as_tree) and not whole_rows:
        return _tree_states(lm, before, completions, rows, offsets)
    if shortcuts.shared_prompt and n > 1 and saved >= _MIN_SAVED_BY_CACHE and not whole_rows:
        row_of = torch.arange(len(targets) // n, device=rows.device).repeat(n)
        return _Prefix.of(lm, before).continued(lm, targets, row_of)[rows, offsets]
    repeated = [SoftPrompt(part.vectors.repeat(n, 1, 1), part.mask.repeat(n, 1)) for part in before]
    # Position i - 1 predicts the token at position i.
    positions = torch.stack([part.mask.sum(1) for part in repeated]).sum(0)[rows] + offsets - 1
    inputs = model_inputs(lm, join([*repeated, embed(lm, targets)]))
    if router_losses is not None:
        states, loss = states_and_router_loss(lm, inputs, shortcuts.head)
        router_losses.append(loss)
        return states[rows, positions]
    if shortcuts.head:
        # Mamba returns float32 whatever the dtype of its weights; its own head casts it back.
        hidden: Tensor = lm.base_model(**inputs).last_hidden_state
        return hidden[rows, positions].to(inputs["inputs_embeds"].dtype)
    logits: Tensor = lm(**inputs).logits
    return logits[rows, positions]


def grouped_score(
    lm: PreTrainedModel,
    before: Sequence[SoftPrompt],
    completions: Tokens,
    prompt_of: Tensor,
    shortcuts: Capabilities,
    batch_size: int,
) -> LogProbs:
    """Score any number of completions of each of U prompts.

    Args:
        lm: The model.
        before: Segments before the completions, U rows each.
        completions: D completions.
        prompt_of: `[D]` int64 index of each completion's prompt.
        shortcuts: The model's capabilities.
        batch_size: Completions per forward pass; they have similar lengths.

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


def grouped_end_states(
    lm: PreTrainedModel,
    before: Sequence[SoftPrompt],
    completions: Tokens,
    prompt_of: Tensor,
    shortcuts: Capabilities,
    batch_size: int,
) -> Tensor:
    """Return the last hidden state at completions' last real tokens, `[D, d]`; arguments as for `grouped_score`."""
    prefix = _Prefix.of(lm, before) if shortcuts.shared_prompt else None
    lengths = completions.mask.sum(1)
    order = lengths.argsort(stable=True)
    states = []
    for some in torch.split(order, batch_size):
        rows = completions.select(some).trimmed()
        if prefix is not None:
            hidden = prefix.continued(lm, _widened(rows), prompt_of[some])
            states.append(hidden[torch.arange(len(some), device=some.device), lengths[some]])
        else:
            own = [part.select(prompt_of[some]) for part in before]
            states.append(end_states(lm, own, [rows], shortcuts))
    return torch.cat(states)[order.argsort()]


def _saved(before: Sequence[SoftPrompt], targets: Tokens, n: int) -> float:
    """Return the share of positions saved by computing each prompt once."""
    prompt, completion = sum(part.mask.shape[1] for part in before), targets.ids.shape[1]
    return (n - 1) * prompt / (n * (prompt + completion))


@dataclass(frozen=True)
class _Prefix:
    """Key-value cache of U right-aligned prompts.

    Attributes:
        cache: Keys and values.
        last: `[U, 1, d]` hidden states of the last positions.
        mask: `[U, P]` bool, true on real positions.
    """

    cache: DynamicCache
    last: Tensor
    mask: Tensor

    @classmethod
    def of(cls, lm: PreTrainedModel, before: Sequence[SoftPrompt]) -> _Prefix:
        """Compute the cache of the segments before completions."""
        prompt = join(before, align="right")  # its last position is real in every row, and predicts the first token
        output = lm.base_model(**model_inputs(lm, prompt), use_cache=True)
        return cls(getattr(output, cache_name(lm)), output.last_hidden_state[:, -1:], prompt.mask)

    def continued(self, lm: PreTrainedModel, targets: Tokens, row_of: Tensor) -> Tensor:
        """Return the hidden states `[D, L, d]` that predict completions; `row_of` `[D]` is each completion's prompt.

        The completions of a prompt share its keys and values, and gradients of all of them flow back.
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
    """Return the hidden states `[N, d]` that predict the tokens at `rows` and `offsets`; compute each prompt once.

    Each tree has its own row, unless the model accepts block masks: with these, longer rows cost no more.
    """
    branches = [embed(lm, part) for part in completions]
    trees = len(completions[0])
    packed = takes_block_masks(lm, rows.device)
    if packed:
        longest = sum(part.mask.shape[1] for part in (*before, *branches))
        prefixes = pack_prefixes(before, branches, max(1, min(trees, _MAX_ROW // longest)), BLOCK)
    else:
        prefixes = pack_prefixes(before, branches)
    hidden: Tensor = lm.base_model(
        inputs_embeds=prefixes.vectors,
        position_ids=prefixes.positions,
        attention_mask=prefixes.block_mask() if packed else prefixes.dense_mask(),
    ).last_hidden_state
    return hidden[prefixes.predicting(rows % trees, rows // trees, offsets)]


def model_inputs(lm: PreTrainedModel, sequence: SoftPrompt, past: int = 0) -> dict[str, Any]:
    """Return a model's inputs for vectors after `past` cached positions; the mask covers both."""
    inputs: dict[str, Any] = {"inputs_embeds": sequence.vectors, "attention_mask": sequence.mask.long()}
    # Models without absolute or rotary positions (ALiBi, state-space) take no position ids.
    if "position_ids" in arguments(lm):
        inputs["position_ids"] = (sequence.mask.cumsum(1) - 1).clamp(min=0)[:, past:]
    return inputs


def writing_inputs(lm: PreTrainedModel) -> dict[str, Any]:
    """Return the extra arguments of a model in generation.

    Mixtures of experts must not compute the auxiliary loss, which fails if the mask covers more than the new tokens.
    """
    return {"output_router_logits": False} if "output_router_logits" in inspect.signature(lm.forward).parameters else {}


def arguments(lm: PreTrainedModel) -> Collection[str]:
    """Return the names of a model's inputs."""
    return inspect.signature(lm.base_model.forward).parameters


def cache_name(lm: PreTrainedModel) -> str:
    """Return the name of the argument and output that holds a model's cache."""
    # Renamed within transformers 5; the supported versions have either name.
    return "cache" if "cache" in arguments(lm) else "past_key_values"
