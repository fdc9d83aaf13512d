"""`--size auto`: settings from a graph's number of nodes, of edges, and the memory of the machine.

dim                 32 below 1,000 nodes, 64 below 10,000, 128 below 100,000, 200 below 10 million, then 100
batch_edges         a 500th of the edges, in whole hundreds, from 100 to 5,000
num_batch_negs      50
num_uniform_negs    500 below 100,000 nodes, 200 below a million, then 50; never more than the nodes
epochs              30 million edges in all, from 3 to 100 times each
lr                  0.1, of row-wise Adagrad
num_partitions      the fewest that fit half of the memory, where graph.memory does not say how much
"""

from typing import Any

from puna.graph import budget
from puna.graph.budget import Sizes
from puna.graph.config import GraphConfig

DIMS = ((1_000, 32), (10_000, 64), (100_000, 128), (10_000_000, 200))
DIM_OF_MORE = 100
UNIFORM = ((100_000, 500), (1_000_000, 200))
UNIFORM_OF_MORE = 50
TRAINED_EDGES = 30_000_000
BATCH = (100, 5_000)
EPOCHS = (3, 100)


def sized(config: GraphConfig, sizes: Sizes, available: int, num_workers: int, evaluates: bool) -> dict[str, Any]:
    """The settings above by name, for a machine with so many bytes of memory. Raises RecipeError where nothing fits."""
    nodes, edges = sizes.num_nodes, sizes.num_edges
    found: dict[str, Any] = {
        "dim": next((dim for most, dim in DIMS if nodes < most), DIM_OF_MORE),
        "batch_edges": _within(BATCH, 100 * round(edges / 500 / 100)),
        "num_batch_negs": 50,
        "num_uniform_negs": min(nodes, next((count for most, count in UNIFORM if nodes < most), UNIFORM_OF_MORE)),
        "epochs": _within(EPOCHS, TRAINED_EDGES // max(1, edges)),
        "lr": 0.1,
    }
    if config.memory:
        return found
    tried = config.model_copy(update=found | {"memory": f"{available // 2} B"})
    fitted = budget.fitted(tried, sizes, num_workers, evaluates)
    return found | {key: fitted.model_dump()[key] for key in budget.DERIVED}


def _within(limits: tuple[int, int], number: int) -> int:
    return min(max(number, limits[0]), limits[1])
