"""Where ranks and engines listen: loopback's name and address, found and not assumed."""

from __future__ import annotations

import logging
import os
import socket

import psutil
import pytest

from megatron_rlhfuse import network
from megatron_rlhfuse.rollout.child import child_environment
from tests.unit.test_rollout_child_environment import OPTIONS

VARIABLES = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that what a test sets is undone, too
        monkeypatch.delenv(name)


@pytest.fixture
def one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")


def test_the_loopback_interface_has_a_loopback_address() -> None:
    name = network.loopback_interface()
    assert name is not None
    assert network.loopback_address() in {each.address for each in psutil.net_if_addrs()[name]}


def test_a_job_of_one_node_stays_there(one_node: None) -> None:
    network.keep_ranks_local()
    name = network.loopback_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == name
    assert os.environ["NCCL_SOCKET_IFNAME"] == f"={name}"


def test_what_the_user_has_chosen_stays(one_node: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    network.keep_ranks_local()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"
    assert os.environ["NCCL_SOCKET_IFNAME"] == f"={network.loopback_interface()}"


@pytest.mark.parametrize("local", [None, "2"])
def test_a_job_of_several_nodes_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, local: str | None
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    if local is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    network.keep_ranks_local()
    assert "GLOO_SOCKET_IFNAME" not in os.environ and "NCCL_SOCKET_IFNAME" not in os.environ


def test_without_a_loopback_nothing_is_chosen_and_nothing_fails(
    one_node: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(7, "no-such-one")])
    network.keep_ranks_local()
    assert "GLOO_SOCKET_IFNAME" not in os.environ and "NCCL_SOCKET_IFNAME" not in os.environ
    assert "no loopback interface is up" in caplog.text


def refuse(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    """Makes it impossible to listen on addresses."""
    listen = network._listen

    def only_others(address: str, backlog: int) -> socket.socket:
        if address in addresses:
            raise OSError(99, "Cannot assign requested address")
        return listen(address, backlog)

    monkeypatch.setattr(network, "_listen", only_others)


def test_loopback_is_ipv6_where_there_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    if not socket.has_ipv6 or not any(
        each.address == "::1" for found in psutil.net_if_addrs().values() for each in found
    ):
        pytest.skip("this machine has no IPv6 loopback")
    refuse(monkeypatch, "127.0.0.1")
    assert network.loopback_address() == "::1"
    assert network.engine_variables()["VLLM_HOST_IP"] == "::1"


def test_engines_start_without_a_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "127.0.0.1", "::1")
    assert network.loopback_address() is None
    assert network.engine_variables() == {}
    assert "VLLM_HOST_IP" not in child_environment(OPTIONS, {})


def test_an_engine_stays_on_its_machine_whatever_ranks_do(caplog: pytest.LogCaptureFixture) -> None:
    given = {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "ib0", "VLLM_HOST_IP": "10.0.0.7"}
    with caplog.at_level(logging.WARNING):
        environment = child_environment(OPTIONS, given)
    name, address = network.loopback_interface(), network.loopback_address()
    assert environment["GLOO_SOCKET_IFNAME"] == name
    assert environment["NCCL_SOCKET_IFNAME"] == f"={name}"
    assert environment["VLLM_HOST_IP"] == environment["VLLM_LOOPBACK_IP"] == address
    assert not caplog.records


@pytest.mark.parametrize(
    ("known", "common"),
    [
        ([], []),
        ([["10.0.0.1"]], ["10.0.0.1"]),
        ([["10.0.0.1", "fd00::1"], ["fd00::1", "10.0.0.1"]], ["10.0.0.1", "fd00::1"]),
        ([["10.0.0.1"], ["10.0.0.2", "10.0.0.1"]], ["10.0.0.1"]),
        ([["10.0.0.1"], []], []),
    ],
)
def test_an_address_must_be_known_to_all(known: list[list[str]], common: list[str]) -> None:
    assert network.common_addresses(known) == common


def test_names_are_resolved_without_addresses_of_one_machine_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert network._resolve("127.0.0.1") == ["127.0.0.1"]
    assert network._resolve("no.such.host.invalid") == []
    found = [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, 0, 0, 2))
        for address in ("fe80::1%eth0", "fd00::1", "fd00::1")
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: found)
    assert network._resolve("a-name") == ["fd00::1"]
