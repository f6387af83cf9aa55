"""Rank tables: both forms, their mapping to a launch, faults, arbitrary input."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from ssd_resnet34.tfrecord.rank_table import read_rank_table


def group_form(servers=("0.0.0.0",) * 8):
    instances = [
        {
            "devices": [{"device_id": str(rank % 8), "device_ip": f"192.168.{rank // 8}.{rank}"}],
            "rank_id": str(rank),
            "server_id": server,
        }
        for rank, server in enumerate(servers)
    ]
    group = {
        "device_num": str(len(servers)),
        "server_num": str(len(set(servers))),
        "instance_count": str(len(servers)),
        "group_name": "",
        "instance_list": instances,
    }
    return {
        "board_id": "0x0000",
        "chip_info": "910",
        "deploy_mode": "lab",
        "group_count": "1",
        "group_list": [group],
        "para_plane_nic_location": "device",
        "para_plane_nic_name": ["eth0"],
        "para_plane_nic_num": "1",
        "status": "completed",
    }


@pytest.fixture
def read(tmp_path):
    """`read(table)`: the table read back from a file."""

    def from_file(table):
        path = tmp_path / "8p.json"
        path.write_text(table if isinstance(table, str) else json.dumps(table))
        return read_rank_table(path)

    return from_file


def test_eight_devices_of_one_host(read):
    table = read(group_form())
    assert len(table.devices) == 8
    for rank in range(8):
        assert table.environment(rank) == {
            "RANK": str(rank),
            "WORLD_SIZE": "8",
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": "8",
            "MASTER_ADDR": "127.0.0.1",
            "DEVICE_ID": str(rank),
        }


def test_two_hosts_and_the_to_version_1_says_the_same(read):
    table = read(group_form(("10.0.0.1",) * 8 + ("10.0.0.2",) * 8))
    environment = table.environment(11)
    assert environment["LOCAL_RANK"] == environment["DEVICE_ID"] == "3"
    assert environment["LOCAL_WORLD_SIZE"] == "8"
    assert environment["MASTER_ADDR"] == "10.0.0.1"
    version = json.loads(table.to_version_1())
    assert version["server_count"] == "2"
    assert read(version) == table


def test_device_ids_need_not_be_local_ranks(read):
    table = group_form(("host",) * 2)
    for instance, device_id in zip(table["group_list"][0]["instance_list"], "64", strict=True):
        instance["devices"][0]["device_id"] = device_id
    found = read(table)
    assert [found.environment(rank)["LOCAL_RANK"] for rank in (0, 1)] == ["0", "1"]
    assert [found.environment(rank)["DEVICE_ID"] for rank in (0, 1)] == ["6", "4"]


def faults():
    def group(table):
        return table["group_list"][0]

    def instance(table):
        return group(table)["instance_list"][3]

    return {
        "status is 'initializing'": lambda t: t.update(status="initializing"),
        "device_num is 7, but there are 8": lambda t: group(t).update(device_num="7"),
        "instance_count is 9": lambda t: group(t).update(instance_count="9"),
        "server_num is 2": lambda t: group(t).update(server_num="2"),
        "group_count is 2": lambda t: t.update(group_count="2"),
        "rank_id 2 comes 2 times": lambda t: instance(t).update(rank_id="2"),
        "rank ids are .*, not 0 to 7": lambda t: instance(t).update(rank_id="8"),
        "rank_id is 'x', not a number": lambda t: instance(t).update(rank_id="x"),
        "rank_id is 3, not a text": lambda t: instance(t).update(rank_id=3),
        "server_id and device_id": lambda t: instance(t)["devices"][0].update(device_id="2"),
        "device_ip '192.168.0.2' comes 2": lambda t: instance(t)["devices"][0].update(
            device_ip="192.168.0.2"
        ),
        "device_ip '192.168.0.300' is not an address": lambda t: instance(t)["devices"][0].update(
            device_ip="192.168.0.300"
        ),
        "has not one device": lambda t: (
            instance(t)["devices"].append({}),
            group(t).pop("device_num"),
        ),
        "devices is not a list": lambda t: instance(t).pop("devices"),
        "neither a group_list nor version": lambda t: t.pop("group_list"),
        "has no devices": lambda t: t.update(group_list=[], group_count="0"),
    }


@pytest.mark.parametrize("complaint", faults())
def test_a_fault_is_named_in_one_line(read, complaint):
    table = group_form()
    faults()[complaint](table)
    with pytest.raises(UserError, match=rf"8p\.json: .*{complaint}.*; correct"):
        read(table)


def test_a_missing_file_and_one_that_is_no_json(tmp_path, read):
    with pytest.raises(UserError, match="RANK_TABLE_FILE"):
        read_rank_table(tmp_path / "none.json")
    for text in ("", "{", "[" * 100_000):
        with pytest.raises(UserError, match="not JSON"):
            read(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


def paths(value, prefix=()):
    """Every place of a nested JSON value."""
    children = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in children:
        yield (*prefix, key)
        if isinstance(child, (dict, list)):
            yield from paths(child, (*prefix, key))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_value_anywhere_is_read_right_or_refused(tmp_path_factory, data):
    version = data.draw(st.booleans())
    good = group_form(("a",) * 2)
    path = tmp_path_factory.mktemp("table") / "table.json"
    path.write_text(json.dumps(good))
    expected = read_rank_table(path)
    table = json.loads(expected.to_version_1()) if version else copy.deepcopy(good)
    place = data.draw(st.sampled_from(list(paths(table))))
    parent = table
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = data.draw(JSON)
    path.write_text(json.dumps(table))
    try:
        found = read_rank_table(path)
    except UserError as error:
        message = str(error)
    else:
        message = ""
        assert [device.rank for device in found.devices] == [0, 1]
        assert all(device.server and device.device_ip for device in found.devices)
    assert "\n" not in message
