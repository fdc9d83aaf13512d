"""`puna doctor` on this machine, on planted ones, and on odd ones."""

import json
import math
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from puna import cli, recipe
from puna.doctor import disk, examine, kernels, machine, probes
from puna.doctor.findings import Finding, findings
from puna.doctor.machine import Machine, read_machine, versions
from puna.errors import DataError
from puna.train import hardware
from puna.train.hardware import Hardware, Kernels

SOUND = Machine(
    system="Linux-6.1-x86_64",
    cpu="A CPU",
    flags=("avx2", "avx512f", "avx512_bf16", "avx512_fp16"),
    num_cores=8,
    quota_cores=None,
    memory=64 << 30,
    memory_available=60 << 30,
    load=0.5,
    has_nvidia=False,
    has_compiler=True,
)
INSTALLED = dict.fromkeys(("puna", "python", *machine.PACKAGES), "1.0")
FIGURES = {
    "torch": {"num_threads": 8, "cpu_capability": "AVX512", "cuda": None},
    "devices": [],
    "cpu.matrix_flops.fp32": 1e12,
    "cpu.matrix_flops.bf16": 3e12,
    "cpu.matrix_flops.fp16": 2e12,
    "cpu.memory_bandwidth.fp32": 5e10,
    "cpu.link": {"latency": 5e-5, "bandwidth": 2e9},
    "disk": {"write": 1e9, "read": 2e9, "folder": "/runs"},
}
FREE = 500 << 30
TIMED = {
    "num_processes": 1,
    "num_threads": 1,
    "tables": {"add": {"axes": [[4, 8]], "seconds": [1e-6, 2e-6]}},
    "code_bytes": 3 << 28,
    "runtime_bytes": 1 << 26,
    "slack": 0.5,
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Nothing is written where the user keeps things, and little is written at all."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(disk, "MAX_BYTES", 8 << 20)


def told(changes: dict | None = None, figures: dict | None = None, installed: dict | None = None, free: int = FREE):
    seen = replace(SOUND, **(changes or {}))
    return findings(seen, INSTALLED | (installed or {}), FIGURES | (figures or {}), free)


# --- findings


def test_a_sound_machine_has_none():
    assert told() == []


@pytest.mark.parametrize(
    ("changes", "figures", "installed", "words"),
    [
        ({"flags": ("avx2",)}, {"cpu.matrix_flops.bf16": 2e10}, {}, (
            "warning", "bf16 is slow on this CPU: its matrices multiply at 2.0% of the rate of fp32",
            "the CPU has no instructions for bf16 (such as avx512_bf16), so each product is emulated",
            "puna train RECIPE --train.dtype fp32")),
        ({"flags": ("avx2",)}, {"cpu.matrix_flops.fp16": 1e10}, {}, (
            "warning", "fp16 is slow on this CPU: its matrices multiply at 1.0% of the rate of fp32",
            "the CPU has no instructions for fp16 (such as avx512_fp16), so each product is emulated",
            "puna train RECIPE --train.dtype fp32")),
        ({}, {"cpu.matrix_flops.bf16": 5e11}, {}, ("warning", "bf16 is slow", "the CPU has avx512_bf16, but", "fp32")),
        ({}, {"torch": FIGURES["torch"] | {"num_threads": 1}}, {}, (
            "warning", "torch uses 1 of 8 cores", "mostly by OMP_NUM_THREADS", "unset OMP_NUM_THREADS")),
        ({"quota_cores": 1.5}, {}, {}, (
            "warning", "8 cores are visible, but this container may use 1.5 of them", "wait for one another",
            "export OMP_NUM_THREADS=2")),
        ({"load": 7.5}, {}, {}, ("warning", "kept 8 cores busy", "lower than this machine's own", "ps -eo")),
        ({"memory_available": 1 << 30}, {}, {}, ("warning", "only 1.1 GB of memory are free", "killed", "ps -eo rss")),
        ({}, {"cpu.link": {"latency": 5e-3, "bandwidth": 2e9}}, {}, (
            "warning", "two processes exchange 2,000 MB/s, 5,000 us a message", "loopback", "GLOO_SOCKET_IFNAME=lo")),
        ({}, {"cpu.link": {"latency": 5e-5, "bandwidth": 1e8}}, {}, ("warning", "exchange 100 MB/s", "loopback", "lo")),
        ({}, {"disk": {"write": 5e7, "read": 1e8, "folder": "/runs"}}, {}, (
            "warning", "the disk of /runs writes 50 MB/s", "(16 GB) takes 320 s", "--run.dir /another/disk/run")),
        ({"has_nvidia": True}, {}, {"torch": "2.13.0+cpu"}, (
            "warning", "does not see the NVIDIA device", "+cpu was built for the CPU", "--force-reinstall torch")),
        ({"has_nvidia": True}, {"torch": FIGURES["torch"] | {"cuda": "12.8"}}, {}, (
            "warning", "torch does not see the NVIDIA device", "built for CUDA 12.8", "nvidia-smi")),
        ({"has_compiler": False}, {}, {}, ("note", "no C++ compiler", "--train.compile", "apt-get install g++")),
        ({}, {}, {"transformers": None}, ("note", "transformers is not installed", "puna parity", "puna[demo]")),
        ({}, {}, {"torch": None}, ("error", "torch is not installed", "neither trains", "pip install 'puna[train]'")),
        ({"cpu": None}, {}, {}, ("note", "does not tell which CPU", "/proc/cpuinfo", "mount -t proc")),
    ],
)  # fmt: skip
def test_one_thing_wrong_is_one_finding(changes, figures, installed, words):
    found = told(changes, figures, installed)
    assert len(found) == 1
    severity, what, why, command = words
    assert found[0].severity == severity
    for part, text in ((what, found[0].what), (why, found[0].why), (command, found[0].command)):
        assert part in text


def test_a_disk_that_is_nearly_full():
    found = told(free=3 << 30)
    assert [finding.what for finding in found] == ["only 3.2 GB of disk are free"]


def test_the_worst_comes_first():
    found = told({"has_compiler": False, "load": 9.0}, {}, {"torch": None})
    assert [finding.severity for finding in found] == ["error", "warning", "note"]


def test_every_puna_command_that_is_advised_exists():
    """Verbs and settings, also of the steps that may fail."""
    settings = set(recipe.flat(recipe.load("tiny").recipe))
    machines = [{"flags": ()}, {"has_compiler": False}, {"memory_available": 1}, {"cpu": None}]
    worse = {key: 1.0 for key in FIGURES if key.endswith(("bf16", "fp16"))} | {"disk": {"write": 1.0, "folder": ""}}
    commands = [finding.command for changes in machines for finding in told(changes, worse, {"transformers": None}, 0)]
    commands += [step.command for step in examine.steps(SOUND, INSTALLED, dict(FIGURES), Path())]
    advised = [command.partition("puna ")[2].split() for command in commands if "puna " in command]
    assert len(advised) >= 4
    for verb, *words in advised:
        assert verb in cli.puna.commands
        for word in words:
            assert not word.startswith("--") or word[2:] in settings


# --- odd machines


def test_a_machine_without_proc(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.platform, "processor", lambda: "")
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (_ for _ in ()).throw(OSError("no")))
    seen = read_machine(tmp_path)
    assert (seen.cpu, seen.flags, seen.memory, seen.memory_available, seen.quota_cores, seen.load) == (
        None, (), None, None, None, None
    )  # fmt: skip
    assert "unknown CPU" in "\n".join(examine.about(report(seen)))
    assert any("does not tell which CPU" in finding.what for finding in findings(seen, INSTALLED, FIGURES, FREE))


def test_what_proc_and_cgroups_tell(tmp_path):
    for name, text in {
        "proc/cpuinfo": "processor\t: 0\nmodel name\t: One\nflags\t\t: fpu avx2 amx_bf16\n\nmodel name\t: Two\n",
        "proc/meminfo": "MemTotal:       2048 kB\nMemAvailable:   1024 kB\nOdd:\n",
        "proc/driver/nvidia/version": "NVRM",
        "sys/fs/cgroup/cpu.max": "150000 100000\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    seen = read_machine(tmp_path)
    assert (seen.cpu, seen.flags, seen.memory, seen.memory_available) == ("One", ("avx2", "amx_bf16"), 2 << 20, 1 << 20)
    assert (seen.quota_cores, seen.has_nvidia) == (1.5, True)
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text("max 100000\n")
    assert read_machine(tmp_path).quota_cores is None


def report(seen: Machine, **others) -> dict:
    nested = examine.nested(FIGURES)
    plain = {key: getattr(seen, key) for key in seen.__dataclass_fields__}
    told = {"versions": INSTALLED, "machine": plain, "figures": nested, "findings": [], "written": None, "seconds": 1.0}
    return told | others


def test_without_torch_the_rest_is_still_told(monkeypatch):
    monkeypatch.setattr(examine, "versions", lambda: INSTALLED | {"torch": None})
    found = examine.examine()
    assert found["healthy"] is False
    assert found["findings"][0]["what"] == "torch is not installed"
    assert found["figures"].keys() == {"disk"}
    assert found["hardware"]["matrix_flops"] == {}
    assert "error: torch is not installed" in examine.text(found)


def test_a_torch_that_cannot_be_imported_is_a_finding(monkeypatch):
    def broken():
        raise OSError("libtorch_cpu.so: cannot open shared object file\nmore")

    monkeypatch.setattr(examine, "torch_facts", broken)
    found = examine.examine()
    assert found["healthy"] is False
    assert found["findings"][0] == {
        "severity": "error",
        "what": "torch: could not be measured",
        "why": "OSError: libtorch_cpu.so: cannot open shared object file",
        "command": "pip install --force-reinstall torch",
    }


def test_each_measurement_that_fails_is_a_finding_and_the_others_go_on(monkeypatch):
    def broken(*words):
        raise RuntimeError("no")

    for name in ("flops", "bandwidth", "link"):
        monkeypatch.setattr(probes, name, broken)
    monkeypatch.setattr(kernels, "measure", broken)
    monkeypatch.setattr(examine, "disk_rates", broken)
    monkeypatch.setattr(probes, "devices", list)
    found = examine.examine()
    labels = [finding["what"].partition(":")[0] for finding in found["findings"] if finding["severity"] == "error"]
    rates = [f"cpu {what} in {dtype}" for dtype in examine.DTYPES for what in ("matrices", "memory")]
    timed = [f"the trainer's kernels, {count} at a time" for count in (1, 2)]
    assert labels == ["disk", *rates, *timed, "two cpu processes"]
    assert found["figures"].keys() == {"torch", "devices"}
    examine.text(found)


def test_a_disk_without_room(monkeypatch, tmp_path):
    monkeypatch.setattr(disk, "SPARE_BYTES", 1 << 60)
    with pytest.raises(OSError, match="too little free space"):
        disk.disk_rates(tmp_path)


# --- measurements


def test_disk_rates_and_nothing_is_left(tmp_path):
    rates = disk.disk_rates(tmp_path)
    assert rates.keys() == {"write", "read"}
    assert all(1e5 < rate < 1e12 for rate in rates.values())
    assert list(tmp_path.iterdir()) == []


def test_memory_counts_what_is_read_and_written(monkeypatch):
    monkeypatch.setattr(probes, "best_of", lambda rounds, work: work() or 2.0)
    assert probes.bandwidth("cpu", "bf16", 1_000) == 1_000.0


def test_two_processes_talk():
    figures = probes.link("cpu")
    assert 1e-7 < figures["latency"] < 1
    assert 1e6 < figures["bandwidth"] < 1e12


def test_on_this_machine(tmp_path, monkeypatch, capsys):
    """The whole command, its parts shrunk; the entry it writes is the one it tells of."""
    monkeypatch.setattr(examine, "ARRAY_BYTES", 8 << 20)
    monkeypatch.setattr(probes, "flops", lambda kind, dtype: {"fp32": 1e11, "bf16": 1e10, "fp16": 1e9}[dtype])
    monkeypatch.setattr(probes, "link", lambda kind: {"latency": 1e-4, "bandwidth": 1e9})
    monkeypatch.setattr(kernels, "measure", lambda count, threads: TIMED | {"num_processes": count})
    status, out = run(capsys, monkeypatch, "doctor", "--json")
    found = json.loads(out)
    assert status == (0 if found["healthy"] else 1)
    assert found["figures"]["cpu"]["matrix_flops"] == {"fp32": 1e11, "bf16": 1e10, "fp16": 1e9}
    assert {finding["what"][:4] for finding in found["findings"]} >= {"bf16", "fp16"}
    path = tmp_path / "config" / "puna" / "hardware" / "this-machine.toml"
    assert found["written"] == str(path)
    assert hardware.read(path).model_dump(mode="json") == found["hardware"]
    assert found["seconds"] < 20
    timed = hardware.read(path).kernels
    assert [(one.num_processes, one.tables["add"].seconds) for one in timed] == [(1, (1e-6, 2e-6)), (2, (1e-6, 2e-6))]
    status, out = run(capsys, monkeypatch, "doctor", "--write", "here.toml")
    assert hardware.read(tmp_path / "here.toml").name == "this machine"
    assert "hardware entry written to here.toml" in out
    assert "cpu  matrices  fp32 100.0  bf16 10.0  fp16 1.0  GFLOP/s" in out
    (tmp_path / "here.toml").unlink()
    path.unlink()
    status, out = run(capsys, monkeypatch, "doctor", "--no-write")
    assert "hardware entry left as it is" in out
    assert not path.exists()
    assert not (tmp_path / "here.toml").exists()


def test_kernels_are_timed_at_every_size(monkeypatch):
    """The real kernels, at small sizes."""
    monkeypatch.setattr(kernels, "MAX_ROUNDS", 3)
    monkeypatch.setattr(kernels, "ELEMENTS", (1 << 12, 1 << 20))
    monkeypatch.setattr(kernels, "PRODUCTS", ((64, 512), (64, 256), (64, 256)))
    monkeypatch.setattr(kernels, "LENGTHS", (32, 256))
    monkeypatch.setattr(kernels, "TABLES", (1 << 12, 1 << 16))
    monkeypatch.setattr(kernels, "OPTIMIZED", (1 << 8, 1 << 14))
    monkeypatch.setattr(kernels, "FRESH", (1 << 16, 1 << 20))
    monkeypatch.setattr(kernels, "PROBES", (kernels.PROBES[0], replace(kernels.PROBES[1], num_layers=2, tokens=256)))
    found = {name: (axes, seconds) for name, axes, seconds in kernels.tables(None)}
    for axes, seconds in found.values():
        assert len(seconds) == math.prod(map(len, axes))
        assert 0 < min(seconds) <= max(seconds) < 10
    for name in ("product", "product_back", "attention", "attention_back", "add", "gate_back"):
        assert found[name][1][-1] > found[name][1][0], name


def test_what_grows_beside_the_count_is_told_apart():
    small, large = (kernels.Memory(100, 100, 200, 0, 0, 0, k, 2 * k, k, 0) for k in (10, 50))
    grown = [one.total + 1000 + 0.25 * one.transient for one in (small, large)]
    assert kernels.beside_counted(grown, [small, large]) == (1000, 0.25)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_kernels_and_memory_in_processes_of_their_own(count):
    found = Kernels(**kernels.measure(count, 1))
    assert ("unit" in found.tables) == (count > 1)
    assert 1e8 < found.code_bytes < 1e9
    assert 0 < found.runtime_bytes < 3e8
    assert 0.1 < found.slack < 1.5
    assert found.tables["product"].seconds[-1] > 100 * found.tables["product"].seconds[0]


def run(capsys, monkeypatch, *words: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["puna", *words])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return left.value.code, capsys.readouterr().out


def test_installed_versions():
    found = versions()
    assert found["torch"] is not None
    assert found["python"].startswith("3.")


# --- the entry


def test_an_entry_names_units_and_survives(tmp_path):
    entry = examine.hardware_entry(SOUND, INSTALLED, FIGURES)
    hardware.write(entry, tmp_path / "entry.toml")
    assert hardware.read(tmp_path / "entry.toml") == entry
    values = tomllib.loads((tmp_path / "entry.toml").read_text())
    assert values["units"]["matrix_flops"] == "FLOP/s"
    assert set(values) - set(values["units"]) == {
        "format_version", "name", "software", "device", "device_name", "units"
    }  # fmt: skip
    assert (entry.matrix_flops, entry.link_bandwidth, entry.disk_write, entry.num_cores) == (
        {"fp32": 1e12, "bf16": 3e12, "fp16": 2e12}, 2e9, 1e9, 8
    )  # fmt: skip


def test_an_entry_of_a_machine_with_accelerators():
    cards = [{"name": "Card", "memory": 80 << 30}] * 2
    figures = {"devices": cards, "cuda.matrix_flops.bf16": 9e14, "cuda.link": {"latency": 1e-5, "bandwidth": 4e11}}
    entry = examine.hardware_entry(SOUND, INSTALLED, FIGURES | figures)
    assert (entry.device, entry.device_name, entry.num_devices, entry.memory) == ("cuda", "Card", 2, 80 << 30)
    assert (entry.matrix_flops, entry.memory_bandwidth, entry.link_latency) == ({"bf16": 9e14}, {}, 1e-5)
    assert "Card, 85.9 GB" in "\n".join(examine.about(report(SOUND, figures=examine.nested(FIGURES | figures))))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "There is no hardware entry .*e.toml. Write it: puna doctor"),
        ("name = ", "e.toml is not TOML"),
        ("colour = 1\n", "e.toml: colour: Extra inputs are not permitted"),
        ('num_cores = "two"\n', "e.toml: num_cores: Input should be a valid integer"),
        ("[matrix_flops]\nfp32 = true\n", "e.toml: matrix_flops.fp32: Input should be a valid number"),
    ],
)
def test_an_entry_that_is_wrong_names_file_and_key(tmp_path, content, words):
    if content is not None:
        (tmp_path / "e.toml").write_text(content)
    with pytest.raises(DataError, match=words):
        hardware.read(tmp_path / "e.toml")


def test_where_entries_are_kept(monkeypatch, tmp_path):
    assert hardware.default_path() == tmp_path / "config" / "puna" / "hardware" / "this-machine.toml"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    assert hardware.default_path() == Path.home() / ".config" / "puna" / "hardware" / "this-machine.toml"


def test_a_finding_says_what_why_and_how():
    finding = Finding("note", "a", "b", "c")
    page = examine.text(report(SOUND, findings=[finding.__dict__]))
    assert "note: a\n  why   b\n  mend  c\n" in page
    assert "nothing is slow or missing" in examine.text(report(SOUND))
    assert Hardware().link_latency is None
