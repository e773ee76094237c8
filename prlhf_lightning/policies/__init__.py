"""Policies. To add one, subclass `Policy` in your own file and select it by `class_path`."""

from prlhf_lightning.policies.base import Policy, Sampling
from prlhf_lightning.policies.causal_lm import CausalLMPolicy
from prlhf_lightning.policies.lora import LoRA
from prlhf_lightning.policies.reward import RewardPolicy

__all__ = ["CausalLMPolicy", "LoRA", "Policy", "RewardPolicy", "Sampling"]
