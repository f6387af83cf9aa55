"""Addresses and ports of this host."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from common.npu import addresses

SCRIPT = Path(addresses.__file__)


def test_the_interface_of_the_loopback_address_is_found():
    interfaces = addresses.local_addresses()
    names = {name for _, name in socket.if_nameindex()}
    assert interfaces["127.0.0.1"] in names
    assert set(interfaces.values()) <= names
    assert all(addresses.is_local(address) for address in interfaces if ":" not in address)


def test_ipv6_addresses_are_read(tmp_path, monkeypatch):
    table = tmp_path / "if_inet6"
    table.write_text("20010db8000000000000000000000007 02 40 00 80     eth1\n")
    monkeypatch.setattr(addresses, "IPV6_INTERFACES", table)
    assert addresses.local_addresses()["2001:db8::7"] == "eth1"


@pytest.mark.parametrize("address", ["192.0.2.77", "300.1.1.1", "no such host"])
def test_an_address_of_another_host_is_not_local(address):
    assert not addresses.is_local(address)


def test_a_free_port_is_none_of_hccls(monkeypatch):
    offered = [60000, 60015, 41000]

    class Probe(socket.socket):
        def getsockname(self):
            return ("0.0.0.0", offered.pop(0))

    monkeypatch.setattr(addresses.socket, "socket", Probe)
    assert addresses.free_port() == 41000


def test_the_launch_scripts_read_a_free_port():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=True)
    with socket.socket() as server:
        server.bind(("", int(done.stdout)))
