"""Who says which of two answers a user would like better; one subclass of `Judge` each, named by `class_path`."""

from prlhf_lightning.analysis.judges.base import Judge, Person, Question, Verdict, Vote
from prlhf_lightning.analysis.judges.openai_chat import OpenAIJudge
from prlhf_lightning.analysis.judges.reward import RewardJudge
from prlhf_lightning.analysis.judges.base import Ruling, rule
from prlhf_lightning.analysis.judges.utility import UtilityJudge

__all__ = [
    "Judge",
    "OpenAIJudge",
    "Person",
    "Question",
    "RewardJudge",
    "Ruling",
    "UtilityJudge",
    "Verdict",
    "Vote",
    "rule",
]
