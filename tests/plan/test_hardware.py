"""Accelerators: figures with sources, names, tables of users."""

from pathlib import Path

import pytest

from puna.plan import hardware
from puna.plan.hardware import HardwareError
from puna.train.hardware import Hardware, default_path, write

WANTED = (  # noqa: SIM905
    "v100-16 a100-40 a100-80 h100-pcie h100-sxm h100-nvl h100-500w h200 b200 b300 gb200 mi250x mi300x mi355x l40s "
    "rtx3090 rtx4090"
).split()


@pytest.fixture(autouse=True)
def _config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


def _write(text: str, name: str = "mine.toml") -> None:
    hardware.user_folder().mkdir(parents=True, exist_ok=True)
    (hardware.user_folder() / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("name", WANTED)
def test_every_accelerator_has_figures_and_a_source(name: str) -> None:
    gpu = hardware.find(name)
    assert gpu.sources
    assert gpu.peak("fp16") > 0
    assert min(gpu.memory, gpu.bandwidth, gpu.link, gpu.network, gpu.power) > 0
    assert 0.4 < gpu.achievable <= 1


def test_an_alias_in_any_case_is_found() -> None:
    assert hardware.find("h100-SXM-80gb").name == "h100-sxm"


def test_an_unknown_accelerator_names_the_nearest() -> None:
    with pytest.raises(HardwareError, match=r"no accelerator named 'h100-smx'.*Did you mean h100-sxm"):
        hardware.find("h100-smx")


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(HardwareError, match="a100-80 has no fp8 matrix units"):
        hardware.find("a100-80").peak("fp8")


@pytest.mark.parametrize("gpus", [0, -8])
def test_a_cluster_below_one_is_refused(gpus: int) -> None:
    with pytest.raises(HardwareError, match=f"gpus is {gpus}"):
        hardware.cluster("h100-sxm", gpus)


def test_a_user_adds_an_accelerator_on_the_base_of_another() -> None:
    _write('[gpu.mine]\nextends = "h100-sxm"\nmemory = 120\nsources = "measured"\n')
    assert hardware.find("mine").memory == 120
    assert hardware.find("mine").bandwidth == hardware.find("h100-sxm").bandwidth


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[gpu.mine]\nextends = "h100-sxm"\nmemroy = 1\n', r"gpu\.mine\.memroy is no such key.*memory"),
        ('[gpu.mine]\nextends = "nothing"\n', "extends 'nothing'"),
        ('[gpu.mine]\nextends = "h100-sxm"\nmemory = -1\n', r"gpu\.mine\.memory is -1"),
        ("[gpu.mine]\nmemory = 1\n", r"gpu\.mine lacks flops"),
        ("[gpu.mine\n", "is not TOML"),
    ],
)
def test_a_bad_entry_is_named(text: str, words: str) -> None:
    _write(text)
    with pytest.raises(HardwareError, match=words):
        hardware.gpus()


def test_what_doctor_measured_is_an_accelerator() -> None:
    rates = {"matrix_flops": {"fp32": 1e11, "bf16": 5e10}, "memory_bandwidth": {"fp32": 1e10}}
    write(Hardware(num_cores=2, memory=24_000_000_000, link_bandwidth=2e9, **rates), default_path())
    gpu = hardware.find("this machine")
    assert gpu.flops == {"fp32": 0.1, "bf16": 0.05}
    assert (gpu.memory, gpu.bandwidth, gpu.link, gpu.network, gpu.processors) == (24.0, 0.01, 2.0, 16.0, 2)


def test_an_entry_without_rates_is_told() -> None:
    write(Hardware(memory=24_000_000_000), default_path())
    with pytest.raises(hardware.HardwareError, match=r"this-machine.toml holds no rate of matrices.*puna doctor"):
        hardware.gpus()


def test_a_rack_is_one_domain() -> None:
    assert hardware.cluster("gb200-nvl72", 144).domain == 72
    assert hardware.cluster("dgx-h100", 16).domain == 8
