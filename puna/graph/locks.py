"""Which trainer trains which bucket: no two at work share a partition. Plain logic, without processes or a clock.

The rules are PyTorch-BigGraph's lock server's (sheet, section 10): of the buckets whose partitions are free the one is
given for which fewest partitions must travel, and the first of them in the round's order. Where vectors begin at
random, partitions must come to lie in one space: a bucket begins only if one of its partitions is trained, or if
no bucket that is left has such a one and nobody is at work.
"""

from collections.abc import Collection, Sequence

from puna.graph.buckets import Bucket


class Locks:
    """The buckets of one round: left, active (by who holds them), done."""

    def __init__(self, order: Sequence[Bucket], done: Collection[Bucket] = (), trained: Collection[int] = ()) -> None:
        """order: all of the round's. done: those that were done before. trained: partitions, in earlier rounds too."""
        self.places = {bucket: place for place, bucket in enumerate(order)}
        self.done = list(done)
        self.left = set(order) - set(done)
        self.active: dict[int, Bucket] = {}
        self.trained = set(trained)

    @property
    def over(self) -> bool:
        """Whether every bucket is done."""
        return not self.left and not self.active

    def acquire(self, holder: int, held: Collection[int] = ()) -> Bucket | None:
        """A bucket for a holder without one; None where it has to wait for others, or where none is left.

        held: partitions that need not travel, because the holder has them as they are now.
        """
        assert holder not in self.active
        locked = {part for bucket in self.active.values() for part in bucket}
        free = [bucket for bucket in self.left if locked.isdisjoint(bucket)]
        tied = [bucket for bucket in self.left if not self.trained.isdisjoint(bucket)]
        if tied:
            free = [bucket for bucket in free if not self.trained.isdisjoint(bucket)]
        elif self.active:
            return None
        if not free:
            return None
        bucket = min(free, key=lambda bucket: (len(set(bucket).difference(held)), self.places[bucket]))
        self.left.remove(bucket)
        self.active[holder] = bucket
        return bucket

    def finish(self, holder: int) -> Bucket:
        """The holder's bucket is done, and its partitions are free."""
        bucket = self.active.pop(holder)
        self.done.append(bucket)
        self.trained.update(bucket)
        return bucket

    def drop(self, holder: int) -> Bucket | None:
        """The holder is gone; its bucket, if it had one, is left for others."""
        bucket = self.active.pop(holder, None)
        if bucket:
            self.left.add(bucket)
        return bucket
