"""Rank tables (HCCL's JSON) and the launch they describe.

Two layouts are read: `group_list` (the older one, a group with its instances) and version "1.0"
(`server_list`). Every fault raises a UserError of one line.
"""

import ipaddress
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError

LOCAL_HOST = "127.0.0.1"
MAX_LISTED = 8  # values that a message lists
MAX_DIGITS = 9  # of a number


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

    @property
    def servers(self) -> tuple[str, ...]:
        """The hosts, in the order of their first ranks."""
        return tuple(dict.fromkeys(device.server for device in self.devices))

    def devices_of(self, server: str) -> list[Device]:
        return [device for device in self.devices if device.server == server]

    def environment(self, rank: int) -> dict[str, str]:
        """Return what torch.distributed reads for a rank, and the number of its NPU as DEVICE_ID.

        MASTER_ADDR is the local host where there is no other, else the host of rank 0.
        """
        device = self.devices[rank]
        local_devices = self.devices_of(device.server)
        master = self.devices[0].server
        if len(self.servers) == 1:
            master = LOCAL_HOST
        return {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(self.devices)),
            "LOCAL_RANK": str(local_devices.index(device)),
            "LOCAL_WORLD_SIZE": str(len(local_devices)),
            "MASTER_ADDR": master,
            "DEVICE_ID": str(device.device_id),
        }

    def to_version_1(self) -> str:
        """Return the table in version "1.0", the layout that HCCL reads on every NPU."""
        server_list = []
        for server in self.servers:
            entries = []
            for device in self.devices_of(server):
                entries.append(
                    {
                        "device_id": str(device.device_id),
                        "device_ip": device.device_ip,
                        "rank_id": str(device.rank),
                    }
                )
            server_list.append({"server_id": server, "device": entries})
        table = {
            "version": "1.0",
            "server_count": str(len(server_list)),
            "server_list": server_list,
            "status": "completed",
        }
        return json.dumps(table, indent=4)


def read_rank_table(path: str | Path) -> RankTable:
    """Read and check the table of a file. Raise UserError for one that cannot be used."""
    try:
        content = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; RANK_TABLE_FILE names the table") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not JSON; copy the rank table again") from None
    try:
        return _parse_table(content)
    except _FaultError as fault:
        raise UserError(f"{path}: {fault}; correct the rank table") from None


class _FaultError(Exception):
    """What is wrong with a table."""


def _parse_table(content: object) -> RankTable:
    table = _require_object(content, "the table")
    status = table.get("status")
    if status != "completed":
        raise _FaultError(f'status is {status!r}, not "completed"')
    if "group_list" in table:
        devices = _devices_of_groups(table)
    elif table.get("version") == "1.0":
        devices = _devices_of_servers(table)
    else:
        raise _FaultError('has neither a group_list nor version "1.0"')
    if not devices:
        raise _FaultError("has no devices")
    devices.sort(key=lambda device: device.rank)
    ranks = [device.rank for device in devices]
    _require_unique(ranks, "rank_id")
    if ranks != list(range(len(ranks))):
        raise _FaultError(f"rank ids are {_listing(ranks)}, not 0 to {len(ranks) - 1}")
    device_names = [(device.server, device.device_id) for device in devices]
    _require_unique(device_names, "server_id and device_id")
    _require_unique([device.device_ip for device in devices], "device_ip")
    return RankTable(tuple(devices))


def _devices_of_groups(table: dict) -> list[Device]:
    groups = _list_of(table, "group_list")
    _check_count(table, "group_count", len(groups))
    devices = []
    for group in groups:
        group = _require_object(group, "a group")
        devices += _devices_of_group(group)
    return devices


def _devices_of_group(group: dict) -> list[Device]:
    instances = []
    for instance in _list_of(group, "instance_list"):
        instances.append(_require_object(instance, "an instance"))
    num_devices = sum(len(_list_of(instance, "devices")) for instance in instances)
    servers = {_text_of(instance, "server_id") for instance in instances}
    _check_count(group, "instance_count", len(instances))
    _check_count(group, "device_num", num_devices)
    _check_count(group, "server_num", len(servers))
    devices = []
    for instance in instances:
        if len(instance["devices"]) != 1:
            raise _FaultError("an instance has not one device")
        device = _require_object(instance["devices"][0], "a device")
        rank = _number_of(instance, "rank_id")
        devices.append(_parse_device(device, rank, _text_of(instance, "server_id")))
    return devices


def _devices_of_servers(table: dict) -> list[Device]:
    servers = _list_of(table, "server_list")
    _check_count(table, "server_count", len(servers))
    devices = []
    for server in servers:
        server = _require_object(server, "a server")
        for device in _list_of(server, "device"):
            device = _require_object(device, "a device")
            rank = _number_of(device, "rank_id")
            devices.append(_parse_device(device, rank, _text_of(server, "server_id")))
    return devices


def _parse_device(device: dict, rank: int, server: str) -> Device:
    device_ip = _text_of(device, "device_ip")
    try:
        ipaddress.ip_address(device_ip)
    except ValueError:
        raise _FaultError(f"device_ip {device_ip!r} is not an address") from None
    return Device(rank, server, _number_of(device, "device_id"), device_ip)


def _require_object(value: object, name: str) -> dict:
    if not isinstance(value, dict):
        raise _FaultError(f"{name} is not an object")
    return value


def _list_of(parent: dict, key: str) -> list:
    value = parent.get(key)
    if not isinstance(value, list):
        raise _FaultError(f"{key} is not a list")
    return value


def _text_of(parent: dict, key: str) -> str:
    value = parent.get(key)
    if not isinstance(value, str) or not value.strip():
        raise _FaultError(f"{key} is {value!r}, not a text")
    return value


def _number_of(parent: dict, key: str) -> int:
    text = _text_of(parent, key)
    if not text.isascii() or not text.isdigit() or len(text) > MAX_DIGITS:
        raise _FaultError(f"{key} is {text!r}, not a number")
    return int(text)


def _check_count(parent: dict, key: str, count: int) -> None:
    """Raise where the table states another number of its own entries; it need not state one."""
    if key in parent and _number_of(parent, key) != count:
        raise _FaultError(f"{key} is {parent[key]}, but there are {count}")


def _require_unique(values: list, name: str) -> None:
    value, times = Counter(values).most_common(1)[0]
    if times > 1:
        raise _FaultError(f"{name} {value!r} comes {times} times")


def _listing(values: list[int]) -> str:
    text = ", ".join(str(value) for value in values[:MAX_LISTED])
    if len(values) > MAX_LISTED:
        text += ", ..."
    return text
