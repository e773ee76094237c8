"""What votes say before any model, against counting by hand or one by one."""

from itertools import combinations

import numpy as np
import pytest

from prlhf_lightning.analysis.votes import (
    Votes,
    agreement_between_users,
    contradictions,
    cycles,
    spread_between_users,
)


def votes_of(rows, num_users=10, num_items=10):
    return Votes(*np.array(rows, dtype=np.int64).reshape(-1, 3).T.copy(), num_users, num_items)


def random_votes(count, num_users, num_items, seed=0):
    draw = np.random.default_rng(seed)
    first = draw.integers(num_items, size=count)
    second = (first + draw.integers(1, num_items, size=count)) % num_items
    return Votes(draw.integers(num_users, size=count), first, second, num_users, num_items)


def opinions(votes):
    """`{user: {(low, high): sum of votes for low minus votes for high}}`."""
    found = {}
    for user, winner, loser in zip(votes.users, votes.winners, votes.losers, strict=True):
        pair, sign = ((winner, loser), 1) if winner < loser else ((loser, winner), -1)
        found.setdefault(user, {}).setdefault(pair, []).append(sign)
    return found


def test_agreement_equals_counting_every_two_users():
    votes = random_votes(300, 6, 5)
    signs = {u: {p: np.sign(sum(v)) for p, v in pairs.items()} for u, pairs in opinions(votes).items()}
    by_pair = {}
    for a, b in combinations(signs, 2):
        for pair in signs[a].keys() & signs[b].keys():
            if signs[a][pair] and signs[b][pair]:
                by_pair.setdefault(pair, []).append(signs[a][pair] == signs[b][pair])
    rate = agreement_between_users(votes)
    assert rate.count == len(by_pair)
    assert rate.value == pytest.approx(np.mean([np.mean(alike) for alike in by_pair.values()]))


def test_users_who_agree_always_or_never():
    assert agreement_between_users(votes_of([(0, 1, 2), (1, 1, 2), (2, 3, 4)])).value == 1
    assert agreement_between_users(votes_of([(0, 1, 2), (1, 2, 1)])).value == 0
    assert agreement_between_users(votes_of([(0, 1, 2), (0, 1, 2), (1, 3, 2)])).count == 0


def test_random_votes_agree_half_of_the_time():
    rate = agreement_between_users(random_votes(4000, 40, 20))
    assert rate.low < 0.5 < rate.high


def test_contradictions_equal_counting_one_by_one():
    votes = random_votes(300, 6, 5)
    repeated = [v for pairs in opinions(votes).values() for v in pairs.values() if len(v) > 1]
    rate = contradictions(votes)
    assert rate.count == len(repeated)
    assert rate.value == pytest.approx(np.mean([len(set(v)) == 2 for v in repeated]))


def test_cycles_equal_trying_every_triple():
    votes = random_votes(300, 6, 8)
    triples = round_trips = 0
    for pairs in opinions(votes).values():
        beats = {(a, b) if sum(v) > 0 else (b, a) for (a, b), v in pairs.items() if sum(v)}
        for a, b, c in combinations(range(votes.num_items), 3):
            edges = [(x, y) if (x, y) in beats else (y, x) for x, y in ((a, b), (b, c), (a, c))]
            if set(edges) <= beats:
                triples += 1
                round_trips += len({winner for winner, _ in edges}) == 3
    rate = cycles(votes)
    assert triples > 50
    assert (rate.count, rate.value) == (triples, pytest.approx(round_trips / triples))


def test_votes_by_scores_have_no_cycles():
    rows = [
        (u, *((a, b) if (a * 7 + u) % 5 > (b * 7 + u) % 5 else (b, a)))
        for u in range(3)
        for a in range(5)
        for b in range(a)
    ]
    assert cycles(votes_of(rows)).value == 0
    assert np.isnan(cycles(votes_of([(0, 1, 2)])).value)


@pytest.mark.parametrize("spread", [0.0, 0.1, 0.2])
def test_the_spread_of_rates_is_found_again(spread):
    draw = np.random.default_rng(0)
    rates = 0.5 + spread * draw.choice([-1, 1], size=5000)
    totals = draw.integers(1, 40, size=5000).astype(float)
    successes = draw.binomial(totals.astype(int), rates).astype(float)
    assert spread_between_users(successes, totals) == pytest.approx(spread, abs=0.02)
