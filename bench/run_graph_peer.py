"""Trains a peer's graph embeddings, with the peer's Python; `graph_speed.py` runs this.

    PYTHON bench/run_graph_peer.py pbg CHECKOUT JOB.json
    PYTHON bench/run_graph_peer.py pykeen - JOB.json

JOB: edges (an .npz of heads, relations, tails), num_nodes, num_relations, settings (the peer's own words), epochs, out
(an .npz to write the model to, or null). The last line of stdout is JSON: seconds, of each epoch, by the peer's own
clock: no start, no import, no checkpoint. The model is written as nodes (N, D), real parts before imaginary ones, and
the parameters of relations (R, D) for guessing tails and for guessing heads. Nothing of Puna is imported: the peer's
environment need not have it.

pbg needs torch, h5py, attrs and tqdm, and is left as it is; pykeen is the installed package.
"""

import json
import logging
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

Job = dict[str, Any]


class Clock(logging.Handler):
    """Keeps the seconds of training that PyTorch-BigGraph logs for each pass over the edges."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def emit(self, record: logging.LogRecord) -> None:
        found = re.search(r"Trained \d+ edges in ([\d.]+) s", record.getMessage())
        if found:
            self.seconds.append(float(found[1]))


def pbg(job: Job) -> list[float]:
    """One partition, one relation template; as its FB15k example is laid out."""
    import h5py
    import torch
    from torchbiggraph.config import parse_config
    from torchbiggraph.train import train

    logger, clock = logging.getLogger("torchbiggraph"), Clock()
    logger.setLevel(logging.INFO)
    logger.addHandler(clock)
    edges = np.load(job["edges"])
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "edges").mkdir()
        (root / "entity_count_all_0.txt").write_text(f"{job['num_nodes']}\n")
        (root / "dynamic_rel_count.txt").write_text(f"{job['num_relations']}\n")
        with h5py.File(root / "edges" / "edges_0_0.h5", "w") as file:
            file.attrs["format_version"] = 1
            for name, column in (("lhs", "heads"), ("rel", "relations"), ("rhs", "tails")):
                file[name] = edges[column].astype(np.int64)
        relation = {"name": "all_edges", "lhs": "all", "rhs": "all", "operator": job["operator"]}
        config = {
            "entity_path": str(root),
            "edge_paths": [str(root / "edges")],
            "checkpoint_path": str(root / "model"),
            "entities": {"all": {"num_partitions": 1}},
            "relations": [relation],
            "dynamic_relations": True,
            "global_emb": False,
            "eval_fraction": 0,
            "num_epochs": job["epochs"],
        }
        torch.manual_seed(job["seed"])
        train(parse_config(config | job["settings"]))
        if job["out"]:
            _keep_pbg(root / "model", job)
    return clock.seconds


def _keep_pbg(folder: Path, job: Job) -> None:
    """Its lhs operator turns heads, and so guesses tails; its rhs operator the other way."""
    import h5py

    version = int((folder / "checkpoint_version.txt").read_text())
    with h5py.File(folder / f"embeddings_all_0.v{version}.h5", "r") as file:
        nodes = file["embeddings"][...]
    names = ("real", "imag") if job["operator"] == "complex_diagonal" else ("translations",)
    tables: dict[str, Any] = {}
    with h5py.File(folder / f"model.v{version}.h5", "r") as file:
        for guessed, side in (("tail", "lhs"), ("head", "rhs")):
            parts = file[f"model/relations/0/operator/{side}"]
            tables[guessed] = np.concatenate([parts[name][...] for name in names], axis=1)
    np.savez(job["out"], nodes=nodes, **tables)


def pykeen(job: Job) -> list[float]:
    """Its ComplEx under its training loop with negatives that it draws for each edge."""
    import torch
    from pykeen.models import ComplEx
    from pykeen.training import SLCWATrainingLoop, TrainingCallback
    from pykeen.triples import CoreTriplesFactory

    seconds: list[float] = []
    began = time.perf_counter()

    class Epochs(TrainingCallback):
        def post_epoch(self, *args: Any, **kwargs: Any) -> None:
            nonlocal began
            now = time.perf_counter()
            seconds.append(now - began)
            began = now

    edges, settings = np.load(job["edges"]), job["settings"]
    triples = torch.from_numpy(np.stack([edges[name] for name in ("heads", "relations", "tails")], axis=1)).long()
    factory = CoreTriplesFactory(triples, num_entities=job["num_nodes"], num_relations=job["num_relations"])
    model = ComplEx(triples_factory=factory, embedding_dim=settings["embedding_dim"], random_seed=job["seed"])
    loop = SLCWATrainingLoop(
        model=model,
        triples_factory=factory,
        optimizer=torch.optim.Adam(model.parameters(), lr=settings["lr"]),
        negative_sampler_kwargs={"num_negs_per_pos": settings["num_negs_per_pos"]},
    )
    began = time.perf_counter()
    loop.train(factory, num_epochs=job["epochs"], batch_size=settings["batch_size"], use_tqdm=False, callbacks=Epochs())
    if job["out"]:
        with torch.no_grad():
            nodes, relations = (
                torch.view_as_real(found[0](indices=None).detach())
                for found in (model.entity_representations, model.relation_representations)
            )
        flat: dict[str, Any] = {
            name: torch.cat(x.unbind(-1), dim=1).numpy() for name, x in (("nodes", nodes), ("tail", relations))
        }
        conjugate = torch.cat([relations[..., 0], -relations[..., 1]], dim=1).numpy()
        np.savez(job["out"], head=conjugate, **flat)
    return seconds


PEERS = {"pbg": pbg, "pykeen": pykeen}


def main(name: str, checkout: str, path: str) -> None:
    """Do the job; JSON on stdout."""
    if name == "pbg":
        sys.path.insert(0, checkout)
    seconds = PEERS[name](json.loads(Path(path).read_text(encoding="utf-8")))
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
