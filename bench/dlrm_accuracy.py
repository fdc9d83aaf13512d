"""What compressed exchanges do to accuracy: paired runs that differ in the exchange alone.

    python bench/dlrm_accuracy.py --json --out FOLDER [--seeds 5] [--train 5000000] [--test 2000000] [--data SETS]

Arms: raw; forward (rows bounded by the published classes of the Kaggle tables, 0.01, 0.03 and 0.05, without the early
factor); both (gradients too, at the bound `--backward`); wide (rows at a uniform 0.15, which has to show); and if asked
for, nearest (as forward, without dither). Runs are one process with what would be exchanged put through the codec.
planted: clicks of the generator, Kaggle cardinalities up to 200,000 rows, Kaggle networks, one pass of SGD; differences
of AUC in points (hundredths of AUC) over seeds with a 95 % t interval. With --data: Adult, Gowalla (check-ins against
as many random places, three to one) and the Criteo sample, classes by the homogenisation index, differences with 95 %
bootstrap intervals over test samples. FOLDER keeps what is done: a command that is
given again goes on.
"""

import argparse
import hashlib
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch

from puna.recipe import load
from puna.recsys.clicks import Clicks
from puna.recsys.config import DlrmConfig, ExchangeConfig
from puna.recsys.figures import auc, figures
from puna.recsys.generator import KAGGLE_ROWS, generate
from puna.recsys.importing import import_clicks
from puna.recsys.layouts import CRITEO, parse_columns
from puna.recsys.task import DlrmTask
from puna.train.config import ScheduleConfig
from puna.train.task import Cursor

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}
"""Of Student's distribution, by number of seeds."""
ADULT = (
    "dense:age,table:work,dense:weight,table:school,dense:years,table:marriage,table:job,table:role,table:race,table:sex,"
    "dense:gain,dense:loss,dense:hours,table:country,label"
)


def arms(args: argparse.Namespace, classes: tuple[Any, ...]) -> dict[str, ExchangeConfig]:
    """Exchanges by name."""
    common: dict[str, Any] = {"local": True, "decay_steps": 0, "forward": "bounded", "record_every": 1_000_000}
    both: dict[str, Any] = {"backward": "bounded", "backward_bound": args.backward}
    wide: dict[str, Any] = {"tight": 0.15, "base": 0.15, "loose": 0.15}
    return {
        "raw": ExchangeConfig(),
        "forward": ExchangeConfig(**common, classes=classes),
        "both": ExchangeConfig(**common, **both, classes=classes),
        "wide": ExchangeConfig(**common, **wide, classes=classes),
        "nearest": ExchangeConfig(**common, classes=classes, dither=False),
    }


def trained(config: DlrmConfig, exchange: ExchangeConfig, clicks: Clicks, seed: int, kept: Path) -> tuple[Any, Any]:
    """Figures, and logits with labels, (2, N), on the test split; both are kept under the name of the settings."""
    settings = config.model_dump_json() + exchange.model_dump_json()
    kept = kept.with_name(f"{kept.name}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}")
    if kept.with_suffix(".json").is_file():
        return json.loads(kept.with_suffix(".json").read_text()), np.load(kept.with_suffix(".npy"))
    task = DlrmTask(config, exchange, ScheduleConfig(decay="constant"), clicks, seed=seed)
    for unit in task.units(Cursor()):
        task.step(unit)
    logits, labels = task.predict("test", 0, clicks.count("test"))
    found = figures(logits, labels)
    both = np.stack([logits, labels])
    np.save(kept.with_suffix(".npy"), both)
    kept.with_suffix(".json").write_text(json.dumps(found))
    print(f"{kept.name}: auc {found['auc']:.5f} ne {found['ne']:.5f}", file=sys.stderr, flush=True)
    return found, both


def planted(args: argparse.Namespace) -> dict[str, Any]:
    """Differences to the raw arm over seeds, in points of AUC."""
    kaggle = load("dlrm-kaggle-32").recipe
    config = DlrmConfig(dim=16, batch=2048, lr=args.lr, table_lr=args.table_lr, max_rows=200_000)
    found: dict[str, list[dict[str, float]]] = {}
    best = []
    for seed in range(args.seeds):
        folder = args.out / f"planted-{seed}-{args.train}-{args.test}"
        note = folder.with_suffix(".truth")
        if not note.is_file():
            truth = generate(folder, samples=args.train, test=args.test, rows=KAGGLE_ROWS, max_rows=200_000, seed=seed)
            note.write_text(json.dumps(truth))
        best.append(json.loads(note.read_text())["best_auc"])
        clicks = Clicks.open(folder)
        for name, exchange in arms(args, kaggle.exchange.classes).items():
            if name in args.arms.split(","):
                run, _ = trained(config, exchange, clicks, seed, args.out / f"{folder.name}-{name}")
                found.setdefault(name, []).append(run)
    result: dict[str, Any] = {"truth_auc": statistics.fmean(best)}
    for name, runs in found.items():
        result[name] = {
            "auc": statistics.fmean(run["auc"] for run in runs),
            "ne": statistics.fmean(r["ne"] for r in runs),
        }
        if name != "raw":
            gaps = [100 * (run["auc"] - raw["auc"]) for run, raw in zip(runs, found["raw"], strict=True)]
            spread = statistics.stdev(gaps) / len(gaps) ** 0.5 * T_95[len(gaps)] if len(gaps) > 1 else None
            mean = statistics.fmean(gaps)
            result[name] |= {
                "points": mean,
                "interval": [mean - spread, mean + spread] if spread else None,
                "gaps": gaps,
            }
    return result


def real(args: argparse.Namespace) -> dict[str, Any]:
    """The same on real sets, one seed, with bootstrap intervals."""
    result = {}
    for name, (files, layout, config) in sets(args).items():
        folder = args.out / name
        if not (folder / "clicks.json").is_file():
            import_clicks(files, folder, layout)
        clicks = Clicks.open(folder)
        logits = {}
        for arm in args.arms.split(","):
            exchange = arms(args, ())[arm]
            _, (logits[arm], labels) = trained(config, exchange, clicks, 0, args.out / f"{name}-{arm}")
        result[name] = {arm: compared(logits["raw"], found, labels) for arm, found in logits.items() if arm != "raw"}
        result[name]["raw"] = {"auc": auc(logits["raw"], labels)}
    return result


def compared(raw: Any, other: Any, labels: Any, draws: int = 300) -> dict[str, Any]:
    """Points of AUC by which the other one differs, and where 95 % of resampled test sets put it."""
    rng, gaps = np.random.default_rng(0), []
    for _ in range(draws):
        chosen = rng.integers(len(labels), size=len(labels))
        gaps.append(100 * (auc(other[chosen], labels[chosen]) - auc(raw[chosen], labels[chosen])))
    low, high = np.percentile(gaps, [2.5, 97.5])
    return {"points": 100 * (auc(other, labels) - auc(raw, labels)), "interval": [float(low), float(high)]}


def sets(args: argparse.Namespace) -> dict[str, tuple[dict[str, list[Path]], Any, DlrmConfig]]:
    """Files by split, layout, model."""
    data = Path(args.data)
    adult, criteo = data / "ctr-adult-census", data / "ctr-criteo"
    small = DlrmConfig(dim=16, bottom=(64,), top=(64,), batch=128, lr=0.1, table_lr=0.5, epochs=5)
    return {
        "adult": (
            {"train": [adult / "adult-train.csv.gz"], "test": [labelled(adult / "adult-test.csv.gz", args.out)]},
            parse_columns(ADULT, ",", ">50K", None),
            small,
        ),
        "criteo": (
            {
                "train": [criteo / "kaggle_train.tsv.gz"],
                "test": [criteo / "kaggle_dev.tsv.gz", criteo / "kaggle_test.tsv.gz"],
            },
            CRITEO,
            small.model_copy(update={"epochs": 3}),
        ),
        "gowalla": (
            {split: [checkins(data / "rec-gowalla" / f"{split}.txt.gz", args.out)] for split in ("train", "test")},
            parse_columns("label,table:user,table:place", ",", "1", "0"),
            small.model_copy(update={"batch": 1024, "epochs": 2, "table_lr": 2.0}),
        ),
    }


def labelled(path: Path, out: Path) -> Path:
    """Adult's test file with the labels of its training file: without the dot at the end."""
    import gzip

    target = out / "adult-test.csv"
    target.write_text(gzip.decompress(path.read_bytes()).decode().replace(".\n", "\n"))
    return target


def checkins(path: Path, out: Path) -> Path:
    """Gowalla's check-ins as clicks among random places, in a random order."""
    import gzip

    rng = np.random.default_rng(0)

    def rows() -> Iterator[str]:
        for line in gzip.decompress(path.read_bytes()).decode().splitlines():
            user, *places = line.split()
            for place in places:
                yield f"1,{user},{place}\n"
                yield from (f"0,{user},{n}\n" for n in rng.integers(40_981, size=3))

    target = out / f"gowalla-{path.name.removesuffix('.txt.gz')}.csv"
    lines = list(rows())
    target.write_text("".join(lines[n] for n in rng.permutation(len(lines))))
    return target


def main() -> None:
    """Train what is not trained yet; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON only on stdout")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--train", type=int, default=5_000_000)
    parser.add_argument("--test", type=int, default=2_000_000)
    parser.add_argument("--arms", default="raw,forward,both,wide")
    parser.add_argument("--backward", type=float, default=0.01, help="bound of gradients")
    parser.add_argument("--lr", type=float, default=0.1, help="of networks, planted")
    parser.add_argument("--table-lr", type=float, default=20.0, help="of tables, planted")
    parser.add_argument("--data", help="folder of real sets")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"planted": planted(args)} if args.seeds else {}
    if args.data:
        result["real"] = real(args)
    result |= {"train": args.train, "test": args.test, "seeds": args.seeds, "backward_bound": args.backward}
    print(json.dumps(result | machine.facts()))


if __name__ == "__main__":
    main()
