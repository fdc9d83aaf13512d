"""The lock server's rules, over random schedules of trainers that come, train, die and return."""

import random

import numpy as np
import pytest

from puna.graph.buckets import order_buckets
from puna.graph.locks import Locks

NUM_SCHEDULES = 10_000


def orders():
    """Some of the orders of buckets, of one to five partitions."""
    rng = np.random.default_rng(0)
    kinds = ("inside_out", "outside_in", "affinity", "random")
    return [(parts, order_buckets(kind, parts, rng)) for parts in range(1, 6) for kind in kinds for _ in range(5)]


def play(chance, parts, order, trainers, crash):
    """A round from its first bucket to its last, with every step chosen at random; how many buckets were given up."""
    share = chance.choice([0.3, 0.7, 1.0])
    order = [bucket for bucket in order if chance.random() <= share] or order[:1]  # the others have no edges
    done = order[: chance.randrange(len(order))] if chance.random() < 0.2 else []
    trained = {part for bucket in done for part in bucket}
    locks = Locks(order, done, trained)
    at_work, finished, lost = {}, list(done), 0
    while not locks.over:
        who = chance.randrange(trainers)
        if who not in at_work:
            idle = set(order).difference(finished, at_work.values())
            bucket = locks.acquire(who, {chance.randrange(parts)})
            if bucket is None:
                assert at_work, f"nobody is at work, and {idle} are left: a deadlock"
                continue
            assert bucket in idle
            assert all(set(bucket).isdisjoint(other) for other in at_work.values()), f"{bucket} and {at_work}"
            if trained.isdisjoint(bucket):
                assert not at_work
                assert all(trained.isdisjoint(other) for other in idle), f"{bucket} is tied to nothing that is trained"
            at_work[who] = bucket
        elif chance.random() < crash:
            assert locks.drop(who) == at_work.pop(who)
            lost += 1
        else:
            assert locks.finish(who) == at_work[who]
            trained.update(at_work[who])
            finished.append(at_work.pop(who))
        assert locks.active == at_work
    assert sorted(finished) == sorted(order) == sorted(locks.done)
    return lost


def test_random_schedules():
    """No two active buckets share a partition, every bucket is done once, and nobody waits for nobody."""
    chance, choices, lost = random.Random(0), orders(), 0
    for _ in range(NUM_SCHEDULES):
        parts, order = chance.choice(choices)
        lost += play(chance, parts, order, chance.randrange(1, 5), chance.choice([0, 0.1, 0.6]))
    assert lost > NUM_SCHEDULES


@pytest.mark.parametrize("parts", [4, 8])
def test_as_many_train_as_there_are_pairs_of_partitions(parts):
    """Once all partitions are trained, and not before."""
    order = order_buckets("inside_out", parts, np.random.default_rng(0))
    cross = [(i, j) for i, j in order if i != j]
    locks = Locks(cross)
    assert [locks.acquire(who) is not None for who in range(3)] == [True, False, False]
    locks = Locks(cross, (), range(parts))
    assert sum(locks.acquire(who) is not None for who in range(parts)) == parts // 2


def test_a_bucket_of_partitions_that_are_held_comes_first():
    order = [(0, 1), (2, 3), (3, 2), (1, 1)]
    assert Locks(order, (), range(4)).acquire(0) == (1, 1)
    assert Locks(order[:3], (), range(4)).acquire(0) == (0, 1)
    assert Locks(order, (), range(4)).acquire(0, [2, 3]) == (2, 3)
    locks = Locks(order, (), range(4))
    locks.acquire(1, [2, 3])
    assert locks.acquire(0, [2, 3]) == (1, 1)


def test_a_bucket_that_is_given_up_is_another_ones():
    locks = Locks([(0, 1), (1, 0)])
    assert locks.acquire(7) == (0, 1)
    assert locks.acquire(8) is None
    assert locks.drop(7) == (0, 1)
    assert locks.drop(7) is None
    assert locks.trained == set()
    assert locks.acquire(8) == (0, 1)
    locks.finish(8)
    assert locks.trained == {0, 1}
    assert locks.acquire(7, [1]) == (1, 0)


def moved(parts, trainers, prefers):
    """Partitions that travel in a round, with trainers that finish in turn."""
    rng = np.random.default_rng(0)
    order = order_buckets("random", parts, rng)
    locks, held, travelled = Locks(order, (), range(parts)), {}, 0
    versions = dict.fromkeys(range(parts), 0)
    while not locks.over:
        for who in range(trainers):
            if who in locks.active:
                bucket = locks.finish(who)
                for part in set(bucket):
                    versions[part] += 1
                held[who] = {part: versions[part] for part in bucket}
            current = [part for part, version in held.get(who, {}).items() if versions[part] == version]
            bucket = locks.acquire(who, current if prefers else ())
            travelled += len(set(bucket or ()) - set(current))
    return travelled


def test_preferring_what_is_held_moves_less_than_chance():
    assert moved(8, 2, True) < 0.65 * moved(8, 2, False)
