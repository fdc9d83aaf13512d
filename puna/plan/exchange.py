"""Does compressing the exchange of a recommendation model pay? By table, from codecs timed on this machine.

A slice of every table as one rank sends it to another: ids of the first batch of clicks, fresh rows, or sums of them
where the table is of bags. Trained rows are more alike, so that ratios get better than this in the course of a run.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from puna.recsys.adapt import factor
from puna.recsys.clicks import Clicks
from puna.recsys.codec.api import Codec, Slice
from puna.recsys.codec.choose import measure, pick, speedup
from puna.recsys.config import DlrmConfig, ExchangeConfig

CODECS = ("fixed", "rans")


def pays(
    config: DlrmConfig, exchange: ExchangeConfig, clicks: Clicks, *, link_gbps: float, ranks: int, step: int = 0
) -> dict[str, Any]:
    """For each table: rows of a slice (distinct ones; of bags a sum a sample), class, bound, and of the best codec its
    name ("plain": none pays), ratio and speedup (1 / (1 / ratio + B (1 / encode + 1 / decode)), Feng et al. 2024).
    speedup: of all together.

    link_gbps: of one rank's way out, in Gbit/s. step: of the run, for the factor on bounds.
    """
    rng, link = np.random.default_rng(0), link_gbps * 1e9 / 8
    size = max(1, config.batch // ranks)
    ids = clicks.take("train", np.arange(min(size, clicks.count("train")))).ids
    classes: Sequence[str] = exchange.classes or ("base",) * len(clicks.rows)
    of = {"tight": exchange.tight, "base": exchange.base, "loose": exchange.loose}
    times = factor(exchange.decay, step, exchange.decay_steps, exchange.factor)
    tables = []
    plain = sent = 0.0
    with Codec(check_ids=False) as codec:
        columns = np.split(ids, np.cumsum(clicks.hots)[:-1], axis=1)
        for n, (name, count, own) in enumerate(zip(clicks.tables, clicks.rows, columns, strict=True)):
            used, places = np.unique(own, return_inverse=True)
            scale = np.sqrt(1 / min(count, config.max_rows or count))
            rows = rng.uniform(-scale, scale, size=(len(used), config.dim)).astype(np.float32)
            bound, is_bags = min(0.5, of[classes[n]] * times), own.shape[1] > 1
            if is_bags:
                rows[used < 0] = 0
                rows = rows[places.reshape(own.shape)].sum(axis=1)
            found = measure(codec, Slice(rows, None if is_bags else used, bound), CODECS)
            best = pick(found, link)
            gain = speedup(found[best], link) if best in found else 1.0
            facts = {"name": name, "rows": len(rows), "class": classes[n], "bound": bound, "codec": best}
            tables.append(facts | {"ratio": found[best].ratio if best in found else 1.0, "speedup": gain})
            plain, sent = plain + rows.nbytes, sent + rows.nbytes / gain
    return {"link_gbps": link_gbps, "ranks": ranks, "speedup": plain / sent, "tables": tables}


def lines(found: dict[str, Any]) -> list[str]:
    """The same as a table."""
    told = [f"{found['link_gbps']:g} Gbit/s, {found['ranks']} ranks: the exchange gets {found['speedup']:.2f}x as fast"]
    told.append(f"{'table':<16} {'rows':>7} {'class':<6} {'bound':>7} {'codec':<6} {'ratio':>7} {'speedup':>8}")
    for t in found["tables"]:
        told.append(
            f"{t['name']:<16} {t['rows']:>7,} {t['class']:<6} {t['bound']:>7.4f} {t['codec']:<6} {t['ratio']:>6.1f}x "
            f"{t['speedup']:>7.2f}x"
        )
    return told
