"""The interface that leads to the meeting place."""

import os

import pytest

from puna.train import network


def test_a_loopback_address_is_on_lo() -> None:
    assert network.interface_to("127.0.0.1") == "lo"
    assert network.interface_to("localhost") == "lo"


@pytest.mark.parametrize(
    ("given", "chosen"),
    [({}, None), ({"MASTER_ADDR": "127.0.0.1"}, "lo"), ({"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "x"}, "x")],
)
def test_the_users_choice_stands(given: dict[str, str], chosen: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("MASTER_ADDR", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(key, raising=False)
    for key, value in given.items():
        monkeypatch.setenv(key, value)
    network.choose_interface()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == chosen
    if not given.get("GLOO_SOCKET_IFNAME"):
        os.environ.pop("GLOO_SOCKET_IFNAME", None)
