"""Graph embeddings in buckets: a bucket of edges needs two partitions of entities in memory; others wait on disk."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Epoch:
    """Seconds of one pass: training, reading and writing partitions; and the most bytes in memory."""

    train: float
    swap: float
    memory_bytes: float

    @property
    def seconds(self) -> float:
        """Training and swapping do not overlap."""
        return self.train + self.swap


def epoch(
    entities: int, edges: int, dim: int, partitions: int, *, edges_per_s: float, disk_bytes_per_s: float
) -> Epoch:
    """One pass over P x P buckets, inside out: every bucket but P + 1 of them changes one partition (PBG, section 4.1).

    A partition is rows of dim float32 and one float32 of Adagrad state each.
    """
    partition = entities / partitions * (dim + 1) * 4
    loads = partitions if partitions == 1 else partitions * partitions - partitions + 2
    moved = 0.0 if partitions == 1 else 2 * loads * partition
    return Epoch(edges / edges_per_s, moved / disk_bytes_per_s, min(2, partitions) * partition)
