"""Judges, which say which of two answers a user would prefer: subclasses of `Judge`, named by `class_path`."""

from prlhf_lightning.analysis.judges.base import Judge, PairResult, Person, Question, Verdict, Vote, judge_pair
from prlhf_lightning.analysis.judges.openai_chat import OpenAIJudge
from prlhf_lightning.analysis.judges.reward import RewardJudge
from prlhf_lightning.analysis.judges.utility import UtilityJudge

__all__ = [
    "Judge",
    "OpenAIJudge",
    "PairResult",
    "Person",
    "Question",
    "RewardJudge",
    "UtilityJudge",
    "Verdict",
    "Vote",
    "judge_pair",
]
