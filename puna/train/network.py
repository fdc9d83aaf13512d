"""Which address and interface of this machine lead to another one. No torch here."""

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
    """The name of the interface that packets to `host` leave from; None where IPv4 does not lead there."""
    ends = addresses_to(host)
    if ends is None:
        return None
    if ends[0].startswith("127."):
        return "lo"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        names = [name for _, name in socket.if_nameindex()]
        return next((name for name in names if _address(probe, name) == ends[0]), None)


def addresses_to(host: str) -> tuple[str, str] | None:
    """This machine's IPv4 address towards `host`, and the host's own; the same where `host` is this machine."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # nothing is sent
            return probe.getsockname()[0], probe.getpeername()[0]
    except OSError:
        return None


def _address(probe: socket.socket, name: str) -> str:
    try:
        answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
    except OSError:  # it has none
        return ""
    return socket.inet_ntoa(answer[20:24])
