"""Online RL without Lightning: sampling of answers, and their rewards."""

from prlhf_lightning.online.rewards import Reward, RewardFunction, UtilityReward
from prlhf_lightning.online.sampling import Sampler

__all__ = ["Reward", "RewardFunction", "Sampler", "UtilityReward"]
