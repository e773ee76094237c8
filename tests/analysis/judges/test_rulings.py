"""Verdicts in both orders, and judges that know or were trained."""

from __future__ import annotations

import pytest

from prlhf_lightning.analysis.judges import Judge, Person, Question, UtilityJudge, judge_pair
from prlhf_lightning.data import FileSource, PreferenceDataModule, SimulatedSource
from prlhf_lightning.errors import ConfigurationError, JudgeError

ANN = Person("ann")


class FirstJudge(Judge):
    """Likes whatever comes first."""

    def judge(self, prompt, user, a, b):
        return "a"


class LongJudge(Judge):
    """Likes the longer answer, and fails at questions marks."""

    def __init__(self, workers=1):
        self.workers, self.asked = workers, []

    def judge(self, prompt, user, a, b):
        self.asked.append((a, b))
        if "?" in a + b:
            raise JudgeError("cannot say")
        return "tie" if len(a) == len(b) else "a" if len(a) > len(b) else "b"


def ruled(judge, *pairs):
    return judge_pair(judge, [Question("why", ANN, a, b) for a, b in pairs])


def test_a_judge_who_likes_whatever_comes_first_only_makes_ties():
    (ruling,) = ruled(FirstJudge(), ("x", "y"))
    assert (ruling.verdict, ruling.agrees, ruling.score) == ("tie", False, 0.5)


@pytest.mark.parametrize("workers", [1, 4])
def test_verdicts_name_answers_by_their_place_in_the_question(workers):
    rulings = ruled(LongJudge(workers), ("long", "no"), ("no", "long"), ("ab", "cd"))
    assert [(one.verdict, one.agrees) for one in rulings] == [("a", True), ("b", True), ("tie", True)]


def test_each_question_is_asked_in_both_orders_unless_equal():
    judge = LongJudge()
    assert ruled(judge, ("x", "yy"), ("z", "z"))[1].verdict == "tie"
    assert judge.asked == [("x", "yy"), ("yy", "x")]


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_is_neither_a_tie_nor_the_end(workers):
    failed, fine = ruled(LongJudge(workers), ("what?", "x"), ("long", "no"))
    assert (failed.verdict, failed.error, fine.verdict) == (None, "cannot say", "a")
    assert failed.score != failed.score


@pytest.mark.parametrize("workers", [1, 3])
def test_a_judge_that_cannot_be_used_stops_all(workers):
    class Broken(LongJudge):
        def judge(self, prompt, user, a, b):
            raise ConfigurationError("no key")

    with pytest.raises(ConfigurationError, match="no key"):
        ruled(Broken(workers), *[("x", "y")] * 20)


@pytest.fixture(scope="module")
def simulated():
    return SimulatedSource(num_users=4, pairs_per_user=5, num_unseen_users=1)


def test_simulated_users_prefer_what_is_worth_more_to_them(simulated):
    judge = UtilityJudge()
    judge.prepare(PreferenceDataModule(simulated))
    for _, row in list(simulated.rows("validation"))[:40]:
        person, chosen, rejected = Person(row["user_id"]), row["chosen"], row["rejected"]
        utilities = [simulated.judge(row["user_id"], row["prompt"], text).utility for text in (chosen, rejected)]
        expected = "a" if utilities[0] > utilities[1] else "b"
        assert judge.judge(row["prompt"], person, chosen, rejected) == expected
        assert judge.judge(row["prompt"], person, chosen, "no such answer") == ("tie" if utilities[0] == -1 else "a")


def test_simulated_users_do_not_judge_for_real_ones(votes):
    with pytest.raises(ConfigurationError, match="RewardJudge or OpenAIJudge"):
        UtilityJudge().prepare(PreferenceDataModule(FileSource(votes)))


def test_pseudonyms_are_judged_as_the_users_they_stand_for(simulated, monkeypatch):
    monkeypatch.setenv("SALT", "0123456789abcdef")
    data = PreferenceDataModule(simulated, hash_user_ids_with="SALT")
    judge, user = UtilityJudge(), simulated.seen_users[0]
    judge.prepare(data)
    prompt = simulated.eval_prompts()[0]
    person = Person(data.known_as(user.user_id))
    assert judge.utility(prompt, person, "no such answer").utility == -1
    assert person.user_id != user.user_id
    with pytest.raises(JudgeError):
        judge.utility(prompt, Person(user.user_id), "no such answer")
