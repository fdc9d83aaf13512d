"""Settings of recipe social that the benchmarks of partitions and of scale share."""

SETTINGS = {
    "graph.dim": 100,
    "graph.operator": "none",
    "graph.comparator": "dot",
    "graph.loss": "softmax",
    "graph.init_scale": 0.1,
    "graph.batch_edges": 1000,
    "graph.num_batch_negs": 50,
    "graph.num_uniform_negs": 50,
    "graph.lr": 0.1,
}
