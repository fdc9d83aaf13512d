"""What a graph run adds to its report: held-out ranks over time, swaps, and a map of the nodes."""

from typing import Any

import numpy as np
import numpy.typing as npt

from puna.chart import Line, chart, cloud
from puna.graph.config import GraphConfig
from puna.graph.graph import Graph
from puna.graph.names import names_of
from puna.graph.ranking import Scorer
from puna.graph.trained import load
from puna.report import Panel, Records, absent, number, points, resume_marks
from puna.train.checkpoint import complete_steps

MOST_NODES = 900
"""Nodes on the map, of all types together."""
STYLES = "abc"


def ranks(records: Records) -> str:
    """Filtered MRR and hits of the held-out edges over time."""
    scored = [event for event in records.of("eval") if number(event, "mrr") is not None]
    if not scored:
        return absent("No held-out edge was ranked; import some with --valid, and set eval.every.")
    named = {"mrr": "MRR", "hits10": "hits at 10", "hits1": "hits at 1"}
    lines = [Line(word, points(scored, key), style) for (key, word), style in zip(named.items(), STYLES, strict=True)]
    note = "Filtered, among all nodes of the type or those drawn. A step is a bucket of edges, a token an edge."
    return chart(lines, unit="share", marks=resume_marks(records)) + f'<p class="note">{note}</p>'


def swaps(records: Records) -> str:
    """Partitions read in each step, and the share of the time that training waited for them."""
    if records.fact("num_partitions") == 1:
        return absent("One partition: nothing is swapped.")
    waits, steps = dict(records.series("swap_s")), dict(records.series("step_s"))
    share = [(x, wait / steps[x]) for x, wait in waits.items() if steps.get(x)]
    lines = [Line("partitions read", records.series("swaps")), Line("share of the time waited", share, "b")]
    return chart(lines, unit="partitions; share", marks=resume_marks(records))


def nodes(records: Records) -> str:
    """Directions of the vectors of some nodes on the two axes along which they differ most."""
    if not complete_steps(records.folder):
        return absent("There is no checkpoint yet.")
    keys = [key for key in records.recipe if key.startswith("graph.")]
    config = GraphConfig.model_validate({key.removeprefix("graph."): _frozen(records.setting(key)) for key in keys})
    graph = Graph.open(str(records.setting("data.path")))
    chosen = [sample(count, graph.num_nodes) for count in graph.counts]
    vectors = _vectors(load(records.folder, config, graph)[0], chosen)
    places, shares = project(vectors[:, int(config.bias) :])
    groups: list[tuple[str, list[tuple[float, float, str]]]] = []
    before = 0
    for kind, own in zip(graph.types, chosen, strict=True):
        names = names_of(graph.folder / kind.file, own.tolist())
        rows = places[before : before + len(own)].tolist()
        groups.append((kind.name, [(x, y, names[n]) for (x, y), n in zip(rows, own.tolist(), strict=True)]))
        before += len(own)
    note = (
        f"{before:,} of {graph.num_nodes:,} nodes, vectors of length 1; the two axes (principal components) hold "
        f"{shares[0]:.0%} and {shares[1]:.0%} of their variance."
    )
    return cloud(groups) + f'<p class="note">{note}</p>'


def sample(count: int, total: int) -> npt.NDArray[np.int64]:
    """A type's nodes on the map: evenly spread over its numbers, in proportion to how many it has."""
    size = min(count, max(1, round(MOST_NODES * count / total)))
    return np.linspace(0, count - 1, size).astype(np.int64)


def project(vectors: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Vectors (N, D), made of length 1, on their first two principal components (N, 2); the components' share of the
    variance (2,)."""
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    centred = np.pad((unit - unit.mean(0)).astype(np.float64), ((0, 0), (0, max(0, 2 - unit.shape[1]))))
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    variance = sizes**2 / max(1e-12, float((sizes**2).sum()))
    both = np.pad(left * sizes, ((0, 0), (0, max(0, 2 - len(sizes)))))[:, :2]
    return both, np.pad(variance, (0, max(0, 2 - len(sizes))))[:2]


GRAPH_PANELS = [
    Panel("Held-out ranks", ranks, wide=False),
    Panel("Swaps", swaps, wide=False),
    Panel("Map of the nodes", nodes, wide=True),
]
"""What `puna report` adds to the page of a graph run."""


def _vectors(scorer: Scorer, chosen: list[npt.NDArray[np.int64]]) -> npt.NDArray[np.float32]:
    return np.concatenate([scorer.vectors(own, kind) for kind, own in enumerate(chosen)])


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
