"""The lock server's rules, over random schedules of trainers that come, train, die and return."""

import numpy as np
import pytest

from puna.graph.buckets import order_buckets
from puna.graph.locks import Locks

NUM_SCHEDULES = 10_000


def some_buckets(rng, parts):
    """Buckets that have edges: all, or some of them, in one of the orders."""
    kind = ("inside_out", "outside_in", "affinity", "random")[int(rng.integers(4))]
    order = order_buckets(kind, parts, rng)
    share = rng.choice([0.3, 0.7, 1.0])
    return [bucket for bucket in order if rng.random() <= share] or order[:1]


def play(rng, parts, trainers, crash):
    """A round from its first bucket to its last, with every step chosen at random; how many were given up."""
    order = some_buckets(rng, parts)
    done = order[: int(rng.integers(len(order)))] if rng.random() < 0.2 else []
    locks = Locks(order, done, {part for bucket in done for part in bucket})
    trained = {part for bucket in done for part in bucket}
    at_work, finished, lost, asked_in_vain = {}, list(done), 0, set()
    while not locks.over:
        who = int(rng.integers(trainers))
        if who not in at_work:
            bucket = locks.acquire(who, rng.integers(parts, size=2).tolist())
            if bucket is None:
                asked_in_vain.add(who)
                assert at_work, f"nobody is at work, and {len(locks.left)} buckets are left: a deadlock"
                continue
            busy = {part for other in at_work.values() for part in other}
            assert not busy & set(bucket), f"{bucket} shares a partition with one of {at_work}"
            assert bucket in order
            assert bucket not in finished
            tied = any(trained & set(other) for other in {*order} - {*finished} - {*at_work.values()})
            assert trained & set(bucket) or not (at_work or tied), f"{bucket} is tied to nothing that is trained"
            at_work[who] = bucket
        elif rng.random() < crash:
            assert locks.drop(who) == at_work.pop(who)
            lost += 1
        else:
            assert locks.finish(who) == at_work[who]
            trained |= set(at_work[who])
            finished.append(at_work.pop(who))
        assert locks.active == at_work
    assert sorted(finished) == sorted(order) == sorted(locks.done)
    return lost


def test_random_schedules():
    """No two active buckets share a partition, every bucket is done once, and nobody waits for nobody."""
    rng = np.random.default_rng(0)
    lost = 0
    for _ in range(NUM_SCHEDULES):
        lost += play(rng, int(rng.integers(1, 6)), int(rng.integers(1, 5)), rng.choice([0, 0.1, 0.6]))
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
