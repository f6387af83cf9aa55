"""Rank tables (HCCL's JSON) and the launch they describe.

Two forms are read: `group_list` (older, one group with its instances) and version "1.0"
(`server_list`). Every fault raises a UserError of one line.
"""

import ipaddress
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError


@dataclass(frozen=True)
class Device:
    """A rank and its NPU."""

    rank: int
    server: str  # the host's address, or any name of it
    device_id: int  # number of the NPU inside the host
    device_ip: str  # address of the NPU's own network port


@dataclass(frozen=True)
class RankTable:
    devices: tuple[Device, ...]  # by rank

    def environment(self, rank: int) -> dict[str, str]:
        """What torch.distributed reads of a rank, and the number of its device as DEVICE_ID.

        MASTER_ADDR is this host where there is no other, else the host of rank 0.
        """
        own = self.devices[rank]
        neighbours = [device.rank for device in self.devices if device.server == own.server]
        alone = len(neighbours) == len(self.devices)
        return {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(self.devices)),
            "LOCAL_RANK": str(neighbours.index(rank)),
            "LOCAL_WORLD_SIZE": str(len(neighbours)),
            "MASTER_ADDR": "127.0.0.1" if alone else self.devices[0].server,
            "DEVICE_ID": str(own.device_id),
        }

    def version_form(self) -> str:
        """The table as version "1.0", the form that HCCL takes on every device."""
        servers = dict.fromkeys(device.server for device in self.devices)
        table = {
            "version": "1.0",
            "server_count": str(len(servers)),
            "server_list": [
                {
                    "server_id": server,
                    "device": [
                        {
                            "device_id": str(device.device_id),
                            "device_ip": device.device_ip,
                            "rank_id": str(device.rank),
                        }
                        for device in self.devices
                        if device.server == server
                    ],
                }
                for server in servers
            ],
            "status": "completed",
        }
        return json.dumps(table, indent=4)


def read_rank_table(path: str | Path) -> RankTable:
    """The table of a file, checked. Raises UserError for one that cannot be used."""
    try:
        content = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; RANK_TABLE_FILE names the table") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not JSON; copy the rank table again") from None
    try:
        return _checked(content)
    except _FaultError as fault:
        raise UserError(f"{path}: {fault}; correct the rank table") from None


class _FaultError(Exception):
    """What is wrong with a table."""


def _checked(content: object) -> RankTable:
    table = _object(content, "the table")
    if table.get("status") != "completed":
        raise _FaultError(f'status is {table.get("status")!r}, not "completed"')
    if "group_list" in table:
        devices = list(_of_groups(table))
    elif table.get("version") == "1.0":
        devices = list(_of_servers(table))
    else:
        raise _FaultError('has neither a group_list nor version "1.0"')
    if not devices:
        raise _FaultError("has no devices")
    devices.sort(key=lambda device: device.rank)
    ranks = [device.rank for device in devices]
    _unique(ranks, "rank_id")
    if ranks != list(range(len(ranks))):
        raise _FaultError(f"rank ids are {_few(ranks)}, not 0 to {len(ranks) - 1}")
    _unique([(device.server, device.device_id) for device in devices], "server_id and device_id")
    _unique([device.device_ip for device in devices], "device_ip")
    return RankTable(tuple(devices))


def _of_groups(table: dict) -> Iterator[Device]:
    groups = _list(table, "group_list")
    _count(table, "group_count", len(groups))
    for group in groups:
        group = _object(group, "a group")
        instances = [_object(one, "an instance") for one in _list(group, "instance_list")]
        _count(group, "instance_count", len(instances))
        _count(group, "device_num", sum(len(_list(one, "devices")) for one in instances))
        _count(group, "server_num", len({_text(one, "server_id") for one in instances}))
        for instance in instances:
            if len(instance["devices"]) != 1:
                raise _FaultError("an instance has not one device")
            device = _object(instance["devices"][0], "a device")
            yield _device(device, instance, _text(instance, "server_id"))


def _of_servers(table: dict) -> Iterator[Device]:
    servers = _list(table, "server_list")
    _count(table, "server_count", len(servers))
    for server in servers:
        server = _object(server, "a server")
        for device in _list(server, "device"):
            device = _object(device, "a device")
            yield _device(device, device, _text(server, "server_id"))


def _device(device: dict, ranked: dict, server: str) -> Device:
    ip = _text(device, "device_ip")
    try:
        ipaddress.ip_address(ip)
    except ValueError:
        raise _FaultError(f"device_ip {ip!r} is not an address") from None
    return Device(_number(ranked, "rank_id"), server, _number(device, "device_id"), ip)


def _object(value: object, what: str) -> dict:
    if not isinstance(value, dict):
        raise _FaultError(f"{what} is not an object")
    return value


def _list(parent: dict, key: str) -> list:
    if not isinstance(parent.get(key), list):
        raise _FaultError(f"{key} is not a list")
    return parent[key]


def _text(parent: dict, key: str) -> str:
    value = parent.get(key)
    if not (isinstance(value, str) and value.strip()):
        raise _FaultError(f"{key} is {value!r}, not a text")
    return value


def _number(parent: dict, key: str) -> int:
    text = _text(parent, key)
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise _FaultError(f"{key} is {text!r}, not a number")
    return int(text)


def _count(parent: dict, key: str, found: int) -> None:
    """A number that the table gives of its own entries, where it gives one."""
    if key in parent and _number(parent, key) != found:
        raise _FaultError(f"{key} is {parent[key]}, but there are {found}")


def _unique(values: list, what: str) -> None:
    value, times = Counter(values).most_common(1)[0]
    if times > 1:
        raise _FaultError(f"{what} {value!r} comes {times} times")


def _few(values: list) -> str:
    return ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")
