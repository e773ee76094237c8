import re
from collections import Counter
from itertools import pairwise
from random import Random

import pytest

from prlhf_lightning.data.sources.simulated import SimulatedSource, StyleCorpus
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.simulation.grammar import ATTRIBUTES, NOTE_WORDS, PROMPTS, STYLES, parse, render
from prlhf_lightning.simulation.users import SimulatedUser, best_common_utility, state_preference

SOURCE = SimulatedSource(num_users=8, pairs_per_user=20, num_unseen_users=4, validation_pairs_per_user=30)


def rows(source, split="train"):
    return [row for _, row in source.rows(split)]


def test_the_best_style_is_worth_one_and_the_mean_style_nothing():
    for user in SOURCE.seen_users:
        utilities = [user.style_utility(style) for style in STYLES]
        assert max(utilities) == pytest.approx(1.0)
        assert min(utilities) == pytest.approx(-1.0)
        assert sum(utilities) == pytest.approx(0.0, abs=1e-9)


def test_utility_is_the_weighted_sum_of_the_styles_scores():
    user = SimulatedUser("a", 0, (0.5, -0.3, 0.1, 0.06, 0.04))
    # medium, casual, cool, sure, closed: 0 + 0.3 - 0.1 + 0.06 - 0.04
    assert user.utility("How do I cook rice?", "Just rinse it well. Also cover the pot.") == pytest.approx(0.22)


def test_ill_formed_text_earns_the_least():
    judgment = SOURCE.judge("user-01", "How do I cook rice?", "rice rice rice")
    assert (judgment.utility, judgment.well_formed) == (-1.0, False)


def test_a_user_judges_the_best_text_as_one():
    user = SOURCE.seen_users[3]
    prompt = SOURCE.eval_prompts()[0]
    judgment = SOURCE.judge(user.user_id, prompt, render(prompt, user.best_style, Random(0)))
    assert judgment.utility == pytest.approx(1.0)
    assert judgment.well_formed


def test_rows_are_the_same_each_time_and_differ_between_seeds():
    again = SimulatedSource(num_users=8, pairs_per_user=20, num_unseen_users=4, validation_pairs_per_user=30)
    assert list(SOURCE.rows("train")) == list(again.rows("train"))
    assert rows(SOURCE) != rows(SimulatedSource(num_users=8, pairs_per_user=20, seed=1))


def test_groups_have_the_shares_asked_for():
    source = SimulatedSource(num_users=20, groups=2, group_shares=[9, 1])
    assert Counter(user.group for user in source.seen_users) == {0: 18, 1: 2}
    with pytest.raises(ConfigurationError, match="group_shares"):
        SimulatedSource(groups=4, group_shares=[9, 1])


def test_asking_for_more_pairs_keeps_those_already_drawn():
    more = SimulatedSource(num_users=8, pairs_per_user=40)
    assert [row for row in rows(SOURCE) if row not in rows(more)] == []


def test_every_user_has_the_pairs_asked_for():
    assert set(Counter(row["user_id"] for row in rows(SOURCE)).values()) == {20}
    assert set(Counter(row["user_id"] for row in rows(SOURCE, "validation")).values()) == {30}
    assert len(rows(SOURCE)) == 8 * 20
    assert len(rows(SOURCE, "validation")) == 12 * 30


def test_unseen_users_stand_in_validation_only():
    unseen = {user.user_id for user in SOURCE.unseen_users}
    assert not unseen & {row["user_id"] for row in rows(SOURCE)}
    assert unseen < {row["user_id"] for row in rows(SOURCE, "validation")}


def test_validation_prompts_are_not_trained_on():
    trained = {row["prompt"] for row in rows(SOURCE)}
    validated = {row["prompt"] for row in rows(SOURCE, "validation")}
    assert not trained & validated
    assert validated <= set(SOURCE.eval_prompts())


def test_all_answers_are_well_formed():
    for row in rows(SOURCE):
        assert parse(row["prompt"], row["chosen"])
        assert parse(row["prompt"], row["rejected"])


def test_the_noise_ceiling_counts_labels_of_true_utility():
    hits = [
        SOURCE.judge(row["user_id"], row["prompt"], row["chosen"]).utility
        > SOURCE.judge(row["user_id"], row["prompt"], row["rejected"]).utility
        for row in rows(SOURCE, "validation")
        if row["user_id"].startswith("user-")
    ]
    assert SOURCE.noise_ceiling() == sum(hits) / len(hits)
    assert 0.94 < SOURCE.noise_ceiling() < 1


def test_noise_falls_with_temperature():
    ceilings = [SimulatedSource(temperature=t).noise_ceiling() for t in (1e-6, 0.05, 0.5, 50.0)]
    assert ceilings[0] == 1.0
    assert all(high > low for high, low in pairwise(ceilings))
    assert ceilings[-1] == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("seed", range(5))
def test_no_style_pleases_conflicting_users(seed):
    assert best_common_utility(SimulatedSource(seed=seed).seen_users) < 0.2


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_users_come_from_the_number_of_groups_asked_for(groups):
    sizes = Counter(user.group for user in SimulatedSource(groups=groups).seen_users)
    assert sorted(sizes) == list(range(groups))
    assert sizes[0] <= 3 * sizes[groups - 1]


def test_opposed_groups_want_opposite_styles():
    users = SimulatedSource().seen_users
    first = next(user for user in users if user.group == 0)
    second = next(user for user in users if user.group == 1)
    assert second.style_utility(first.best_style) < -0.8


def test_users_of_one_group_differ():
    weights = [user.weights for user in SimulatedSource().seen_users if user.group == 0]
    assert len(set(weights)) == len(weights)


def test_contrasting_users_are_of_different_groups():
    assert len({user.group for user in SimulatedSource().contrasting_users(3)}) == 3


def test_stated_preference_names_the_users_strongest_tastes():
    user = SimulatedUser("a", 0, (0.5, -0.3, 0.1, 0.06, 0.04))
    assert user.stated_preference() == "I like long, casual and warm answers."
    assert state_preference(["warm"]) == "I like warm answers."


def test_user_text_is_given_only_when_asked_for():
    stated = SimulatedSource(user_text=True)
    assert rows(stated)[0]["user_text"] == stated.seen_users[0].stated_preference()
    assert "user_text" not in rows(SOURCE)[0]


@pytest.mark.parametrize("kwargs", [{"groups": 0}, {"groups": 9}, {"groups": 4, "num_users": 3}, {"temperature": 0.0}])
def test_impossible_settings_are_refused(kwargs):
    with pytest.raises(ConfigurationError, match=next(iter(kwargs))):
        SimulatedSource(**kwargs)


def test_the_fingerprint_follows_every_setting_of_the_rows():
    changes = [{}, {"seed": 1}, {"groups": 2}, {"num_users": 9}, {"pairs_per_user": 9}, {"temperature": 0.1}]
    assert len({SimulatedSource(**change).fingerprint("train") for change in changes}) == len(changes)


def test_corpus_has_all_styles_alike():
    corpus = [row for _, row in StyleCorpus(num_rows=4800).rows("train")]
    alone = [row for row in corpus if row["prompt"] in PROMPTS]
    counts = Counter(parse(row["prompt"], row["chosen"]) for row in alone)
    assert set(counts) == set(STYLES)
    assert max(counts.values()) < 3 * min(counts.values())
    assert {row["prompt"] for row in alone} == set(PROMPTS)


def test_the_corpus_follows_the_style_named_before_the_prompt():
    styles = {value for values in ATTRIBUTES.values() for value in values}
    said = 0
    for _, row in StyleCorpus(num_rows=100).rows("train"):
        prompt = next(prompt for prompt in PROMPTS if row["prompt"].endswith(prompt))
        wishes = styles & set(re.findall(r"\w+", row["prompt"].removesuffix(prompt)))
        assert wishes <= set(vars(parse(prompt, row["chosen"])).values())
        said += bool(wishes)
    assert 40 < said < 70


def test_topics_and_tips_name_no_style_in_notes():
    assert not set(NOTE_WORDS) & {value for values in ATTRIBUTES.values() for value in values}
