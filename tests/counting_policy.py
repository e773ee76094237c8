"""A policy that counts what its reference scores."""

from __future__ import annotations

from prlhf_lightning.policies import CausalLMPolicy


class CountingPolicy(CausalLMPolicy):
    """Counts the completions that the reference scores."""

    scored = 0

    def reference_log_probs(self, prompt, completions, soft_prompt=None):
        self.scored += len(prompt) * len(completions)
        return super().reference_log_probs(prompt, completions, soft_prompt)
