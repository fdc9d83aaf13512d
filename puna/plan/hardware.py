"""Accelerators and clusters: what data sheets say, each figure with its source; users add their own in TOML."""

import difflib
import tomllib
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from puna.errors import UserError
from puna.train.hardware import Hardware, default_path, read

TABLE = Path(__file__).parent / "hardware.toml"
UNKNOWN_ACHIEVABLE = 0.8
THIS_MACHINE = "this-machine"


class HardwareError(UserError):
    """An accelerator or cluster that no table has, or an entry that is not one."""


@dataclass(frozen=True)
class Gpu:
    """One accelerator as a job sees it; the units are in the comments of hardware.toml."""

    name: str
    flops: dict[str, float]
    memory: float
    bandwidth: float
    link: float
    network: float
    power: float
    domain: int = 8
    achievable: float = UNKNOWN_ACHIEVABLE
    ampere_attention: float = 1.0
    processors: int = 100
    full_power: float = 0.0
    price: float = 0.0
    aliases: tuple[str, ...] = ()
    sources: str = ""

    def peak(self, precision: str) -> float:
        """TFLOPS of a number format. Raises HardwareError where the device has no unit for it."""
        if precision not in self.flops:
            raise HardwareError(
                f"{self.name} has no {precision} matrix units", f"Choose one of {', '.join(sorted(self.flops))}."
            )
        return self.flops[precision]

    @property
    def throttle(self) -> float:
        """The power limit over that of the part whose achievable share was measured."""
        return self.power / self.full_power if self.full_power else 1.0


@dataclass(frozen=True)
class Cluster:
    """`gpus` accelerators in nodes of `gpus_per_node`, each with `network` Gb/s of its own between nodes."""

    gpu: Gpu
    gpus: int
    gpus_per_node: int = 8
    network: float = 0.0

    def __post_init__(self) -> None:
        for name in ("gpus", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise HardwareError(f"{name} is {getattr(self, name)}", "Give a whole number of at least 1.")
        if self.network < 0:
            raise HardwareError(f"network is {self.network} Gb/s", "Give the Gb/s of one accelerator, above 0.")

    @property
    def domain(self) -> int:
        """Devices that the fast links join: a node, or a rack where links go beyond it."""
        return self.gpu.domain if self.gpu.domain > self.gpus_per_node else self.gpus_per_node

    @property
    def network_gbps(self) -> float:
        """Gb/s between nodes, the accelerator's usual where the cluster does not say."""
        return self.network or self.gpu.network


def user_folder() -> Path:
    """Where users put tables of their own, and `puna doctor` the entry of this machine."""
    return default_path().parent


def gpus() -> dict[str, Gpu]:
    """Every accelerator known: the table that ships, then those of `user_folder`."""
    return _gpus(_stamp())


def find(name: str) -> Gpu:
    """The accelerator of that name or alias, in any case. Raises HardwareError, which names the nearest."""
    known = {key.lower(): gpu for gpu in gpus().values() for key in (gpu.name, *gpu.aliases)}
    if name.lower() in known:
        return known[name.lower()]
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.0)
    raise HardwareError(
        f"no accelerator named {name!r}", f"Did you mean {known[close[0]].name}? `puna plan hardware` lists them."
    )


def cluster(name: str, num_gpus: int) -> Cluster:
    """A cluster preset, or an accelerator in its usual nodes."""
    presets = _table(TABLE)["cluster"]
    if name not in presets:
        gpu = find(name)
        return Cluster(gpu, num_gpus, min(8, gpu.domain) if gpu.domain <= 8 else 4)
    entry = presets[name]
    return Cluster(find(entry["gpu"]), num_gpus, entry["gpus_per_node"], entry["network"])


def clusters() -> dict[str, dict[str, Any]]:
    """The cluster presets as they stand in the table."""
    return dict(_table(TABLE)["cluster"])


def measured(gpu: Gpu) -> Hardware | None:
    """What `puna doctor` left of this machine, if `gpu` is its CPU and the trainer's kernels were timed there."""
    path = default_path()
    if gpu.name != THIS_MACHINE or not path.is_file():
        return None
    found = read(path)
    return found if found.device == "cpu" and found.kernels else None


def _stamp() -> tuple[tuple[str, float], ...]:
    files = [TABLE, *sorted(user_folder().glob("*.toml"))]
    return tuple((str(path), path.stat().st_mtime) for path in files)


@cache
def _gpus(stamp: tuple[tuple[str, float], ...]) -> dict[str, Gpu]:
    found: dict[str, Gpu] = {}
    for path, _ in stamp:
        table = _table(Path(path))
        entries = table.get("gpu", {}) if "device" not in table else {THIS_MACHINE: _measured(read(Path(path)), path)}
        for name, entry in entries.items():
            found[name] = _gpu(name, entry, found, path)
    return found


def _measured(machine: Hardware, path: str) -> dict[str, Any]:
    """What `puna doctor` left, in the terms of the table. Raises HardwareError where it could not measure enough."""
    if not machine.matrix_flops or not machine.memory_bandwidth:
        raise HardwareError(f"{path} holds no rate of matrices or of memory", "Run `puna doctor` again, or remove it.")
    bandwidth = max(machine.memory_bandwidth.values())
    link = machine.link_bandwidth or bandwidth / 10
    return {
        "aliases": [machine.name],
        "flops": {dtype: rate / 1e12 for dtype, rate in machine.matrix_flops.items()},
        "achievable": 1.0,
        "memory": (machine.memory or 0) / 1e9,
        "bandwidth": bandwidth / 1e12,
        "link": link / 1e9,
        "network": link * 8 / 1e9,
        "power": 0.0,
        "domain": machine.num_devices,
        "processors": machine.num_cores,
        "sources": "measured by `puna doctor`",
    }


def _gpu(name: str, entry: dict[str, Any], known: dict[str, Gpu], path: str) -> Gpu:
    """One entry of a table. Raises HardwareError, which names the file, the entry and the key."""
    where = f"{path}: gpu.{name}"
    values = dict(entry)
    base = values.pop("extends", None)
    names = {f.name for f in fields(Gpu)} - {"name"}
    for key in values:
        if key not in names:
            close = difflib.get_close_matches(key, names, n=1, cutoff=0.0)[0]
            raise HardwareError(f"{where}.{key} is no such key", f"Did you mean {close}?")
    values["aliases"] = tuple(values.get("aliases", ()))
    numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
    for key, value in numbers.items():
        if value < 0:
            raise HardwareError(f"{where}.{key} is {value}", "Give a number of at least 0.")
    if base is not None:
        if base not in known:
            raise HardwareError(f"{where} extends {base!r}, which no table has", "Put the base first.")
        return replace(known[base], name=name, **values)

    missing = [key for key in ("flops", "memory", "bandwidth", "link", "network", "power") if key not in values]
    if missing:
        raise HardwareError(f"{where} lacks {', '.join(missing)}", "Set them, or begin from another with `extends`.")
    return Gpu(name=name, **values)


def _table(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise HardwareError(f"{path} is not TOML: {error}", "Mend that place.") from error
