"""Where a job listens: on loopback while it fits one machine, else on one address.

Invariants
- a job of one node opens no port of its own outside loopback, and neither does an engine, which
  never spans nodes; what a user has set for Gloo or NCCL wins on ranks;
- a machine whose loopback cannot be used runs as torch would run it: nothing here fails for that.

torchrun's own store is not this project's: it listens everywhere (docs/security.md).
"""

from __future__ import annotations

import array
import fcntl
import json
import logging
import os
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_rlhfuse import platform
from megatron_rlhfuse.pipeline.broadcast import broadcast_messages

logger = logging.getLogger(__name__)

_SIOCGIFFLAGS = 0x8913
_IFF_UP, _IFF_LOOPBACK = 0x1, 0x8

_ADDRESSES_BYTES = 512
"""Of the message in which a rank tells how it resolves the name of rank 0's machine."""


def loopback_interface() -> str | None:
    """The name of the loopback interface, or None where none is up."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            request = array.array("B", struct.pack("16s16x", name.encode()))
            with suppress(OSError):  # it has just gone
                fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request)
                (flags,) = struct.unpack_from("H", request, 16)
                if flags & _IFF_LOOPBACK and flags & _IFF_UP:
                    return name
    return None


def loopback_address() -> str | None:
    """127.0.0.1 or, on a machine with IPv6 only, ::1; None where neither can be listened on."""
    for address in ("127.0.0.1", "::1"):
        with suppress(OSError):
            _listen(address, 1).close()
            return address
    return None


def is_one_node() -> bool:
    """Whether torchrun has started all ranks of the job on this machine."""
    world = os.environ.get("WORLD_SIZE")
    return world is not None and os.environ.get("LOCAL_WORLD_SIZE") == world


def keep_ranks_local() -> None:
    """Makes Gloo and NCCL of this rank use loopback, where all ranks are on one machine.

    Call before torch.distributed starts. An interface that the user has chosen stays.
    """
    if not is_one_node():
        return
    for name, value in _interface_variables().items():
        os.environ.setdefault(name, value)


def engine_variables() -> dict[str, str]:
    """The environment that keeps an engine on loopback: it and its workers are on one machine."""
    address = loopback_address()
    if address is None:
        return {}
    return {
        **_interface_variables(),
        "VLLM_HOST_IP": address,
        "VLLM_LOOPBACK_IP": address,
    }


def _interface_variables() -> dict[str, str]:
    name = loopback_interface()
    if name is None:
        logger.warning("no loopback interface is up: Gloo and NCCL choose where they listen")
        return {}
    # NCCL takes a plain name for a prefix.
    return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"}


def connect_store(wait: timedelta) -> dist.TCPStore:
    """A store for all ranks. COLLECTIVE: rank 0 hosts it, the others connect to it.

    It listens on loopback where all ranks are on one machine. Else it listens on the one address
    by which the ranks of other machines know the machine of rank 0 (torchrun's MASTER_ADDR), or on
    all addresses where none of this machine is known to them: behind a network translation.

    wait: of every request to the store
    """
    rank = dist.get_rank()
    if is_one_node():
        address = loopback_address()
        addresses = [address] if address is not None else []
    else:
        known = _gather(_resolve(os.environ["MASTER_ADDR"]))
        addresses = common_addresses(known[int(os.environ.get("LOCAL_WORLD_SIZE", 1)) :])
    if rank == 0:
        store = _host_store(addresses, wait)
        where = [store.host.encode(), str(store.port).encode()]
    host, port = broadcast_messages(where if rank == 0 else None, 0)
    return store if rank == 0 else dist.TCPStore(host.decode(), int(port), None, False, wait)


def common_addresses(known: Sequence[Sequence[str]]) -> list[str]:
    """Addresses that all ranks of other machines know, in the order of the first."""
    return [each for each in known[0] if all(each in others for others in known)] if known else []


def _host_store(addresses: Sequence[str], wait: timedelta) -> dist.TCPStore:
    """A store that listens on the first of the addresses that is one of this machine."""
    for address in addresses:
        with suppress(OSError):
            listener = _listen(address, max(128, dist.get_world_size()))
            port = listener.getsockname()[1]
            return dist.TCPStore(
                address,
                port,
                None,
                True,
                wait,
                wait_for_workers=False,
                master_listen_fd=listener.detach(),
            )
    host = os.environ["MASTER_ADDR"]
    logger.warning(
        "the job's store listens on all addresses: none of %s, by which other ranks know %s, can "
        "be listened on here; see docs/security.md",
        list(addresses) or "no address",
        host,
    )
    return dist.TCPStore(host, 0, None, True, wait, wait_for_workers=False)


def _listen(address: str, backlog: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, 0), family=family, backlog=backlog)


def _resolve(host: str) -> list[str]:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    addresses = dict.fromkeys(str(entry[4][0]) for entry in found)
    # Of a link-local address the part after % names an interface of this machine only.
    return [address for address in addresses if "%" not in address]


def _gather(addresses: Sequence[str]) -> list[list[str]]:
    """What every rank has resolved. COLLECTIVE."""
    kept = list(addresses)
    while len(text := json.dumps(kept).encode()) > _ADDRESSES_BYTES:
        kept.pop()
    mine = torch.tensor(list(text.ljust(_ADDRESSES_BYTES)), dtype=torch.uint8)
    mine = mine.to(platform.device())
    all_of_them = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(all_of_them, mine)
    return [json.loads(bytes(each.tolist())) for each in all_of_them]
