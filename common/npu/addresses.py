"""Addresses and ports of this host, found without the program `ip`, which not every image has.

Run as a program, it prints a free port for the ranks of one host to meet at.
"""

import fcntl
import ipaddress
import socket
from pathlib import Path

PORTS_OF_HCCL = range(60000, 60016)
SIOCGIFADDR = 0x8915  # Linux, linux/sockios.h: the IPv4 address of an interface
REQUEST_BYTES = 40  # of a struct ifreq: a name of 16 bytes, then a union
ADDRESS_IN_REQUEST = slice(20, 24)  # after the name, a family and a port
IPV6_INTERFACES = Path("/proc/net/if_inet6")


def free_port() -> int:
    """Return a TCP port that nothing on this host uses at the moment, nor HCCL by default."""
    while True:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        if port not in PORTS_OF_HCCL:
            return port


def is_local(address: str) -> bool:
    """Return whether an interface of this host has an address, given as a number or a name."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def local_addresses() -> dict[str, str]:
    """Return the interface of each IP address of this host: {"127.0.0.1": "lo"}.

    Of an interface with several IPv4 addresses only the first is there.
    """
    interfaces = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, interface in socket.if_nameindex():
            request = interface.encode().ljust(REQUEST_BYTES, b"\0")
            try:
                reply = fcntl.ioctl(probe, SIOCGIFADDR, request)
            except OSError:  # it has none
                continue
            interfaces[socket.inet_ntoa(reply[ADDRESS_IN_REQUEST])] = interface
    if IPV6_INTERFACES.exists():
        for line in IPV6_INTERFACES.read_text().splitlines():
            digits, *_, interface = line.split()
            address = ipaddress.IPv6Address(int(digits, base=16))
            interfaces[str(address)] = interface
    return interfaces


if __name__ == "__main__":
    print(free_port())
