"""Which network interface the ranks of several machines meet on. No torch here."""

import fcntl
import os
import socket
import struct

SIOCGIFADDR = 0x8915  # netdevice(7)


def choose_interface() -> None:
    """Have gloo use the interface that leads to MASTER_ADDR, unless GLOO_SOCKET_IFNAME is set.

    Left to itself gloo binds to whatever the host's name resolves to, which may be a loopback address that no other
    machine can reach, or nothing.
    """
    host = os.environ.get("MASTER_ADDR")
    if host and "GLOO_SOCKET_IFNAME" not in os.environ and (name := interface_to(host)):
        os.environ["GLOO_SOCKET_IFNAME"] = name


def interface_to(host: str) -> str | None:
    """The name of the interface whose address packets to `host` leave from; None where IPv4 does not lead there."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # nothing is sent
            address = probe.getsockname()[0]
            addresses = {name: _address(probe, name) for _, name in socket.if_nameindex()}
    except OSError:
        return None
    if address.startswith("127."):
        return "lo"
    return next((name for name, own in addresses.items() if own == address), None)


def _address(probe: socket.socket, name: str) -> str:
    try:
        answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
    except OSError:  # it has none
        return ""
    return socket.inet_ntoa(answer[20:24])
