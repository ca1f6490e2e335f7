"""The store of a job listens where other ranks look for it, and nowhere else."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from megatron_rlhfuse import network
from tests.distributed.conftest import RunRanks


def own_address() -> str | None:
    """One of this machine that is not loopback's."""
    loopback = network.loopback_interface()
    for name, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            if name != loopback and each.family.name == "AF_INET":
                return str(each.address)
    return None


def connect() -> dict[str, Any]:
    """Where rank 0's new store listens, and whether all ranks reach it."""
    before = listening()
    store = network.connect_store(timedelta(seconds=30))
    store.add("ranks", 1)
    dist.barrier()
    result = {"listens": sorted(listening() - before), "ranks": store.add("ranks", 0)}
    dist.barrier()  # rank 0's store ends with this function
    return result


def listening() -> set[str]:
    connections = psutil.Process().net_connections("tcp")
    return {f"{c.laddr.ip} {c.laddr.port}" for c in connections if c.status == "LISTEN"}


def check_one_node() -> dict[str, Any]:
    os.environ["MASTER_ADDR"] = "no.such.host.invalid"  # nobody needs it
    return connect()


def check_nodes(resolved: list[list[str]], name: str) -> dict[str, Any]:
    """Every rank as on a machine of its own, on which rank 0's has these addresses."""
    os.environ["LOCAL_WORLD_SIZE"], os.environ["MASTER_ADDR"] = "1", name
    network._resolve = lambda host: resolved[dist.get_rank()]
    return connect()


def assert_listens(results: list[dict[str, Any]], *addresses: str) -> None:
    assert [each["ranks"] for each in results] == [len(results)] * len(results)
    assert all(not each["listens"] for each in results[1:])
    assert [each.split()[0] for each in results[0]["listens"]] == list(addresses)


def test_on_one_node_it_listens_on_loopback(run_ranks: RunRanks) -> None:
    assert_listens(run_ranks(check_one_node, 2), str(network.loopback_address()))


def test_on_several_nodes_it_listens_on_the_address_that_others_know(run_ranks: RunRanks) -> None:
    address = own_address()
    if address is None:
        pytest.skip("this machine has no address but loopback's")
    # Many systems resolve a machine's own name to a loopback address, but only for itself.
    known = [["127.0.1.1"], ["192.0.2.254", address], [address]]
    assert_listens(run_ranks(check_nodes, 3, known, address), address)


def test_nodes_on_one_machine_may_meet_on_loopback(run_ranks: RunRanks) -> None:
    known = [["127.0.0.1"]] * 2
    assert_listens(run_ranks(check_nodes, 2, known, "127.0.0.1"), "127.0.0.1")


@pytest.mark.parametrize("known", [[["127.0.0.1"], ["192.0.2.254"]], [["127.0.0.1"], []]])
def test_behind_a_translation_it_listens_everywhere(
    run_ranks: RunRanks, known: list[list[str]]
) -> None:
    assert_listens(run_ranks(check_nodes, 2, known, "127.0.0.1"), "::")
