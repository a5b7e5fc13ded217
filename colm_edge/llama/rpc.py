"""Put a model's weights on other machines, through llama.cpp's RPC backend.

Each machine runs llama.cpp's ggml-rpc-server, of the same version as here. A model's layers are
sent there when its weights are loaded; after that only activations are sent.
"""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import Sequence
from typing import Any

import llama_cpp as llama

from colm_edge.errors import ModelError
from colm_edge.llama import ggml

CONNECT_TIMEOUT = 5.0  # seconds
HELLO, HELLO_BYTES = 14, 24  # the command's number, in all versions, and its argument's size
_greeted: set[str] = set()  # servers that have answered this process


def check_servers(servers: Sequence[str]) -> None:
    """Raise ModelError if this llama.cpp has no RPC, or a server does not answer.

    llama.cpp itself aborts the process when it cannot connect.
    """
    if not llama.llama_supports_rpc():
        raise ModelError(
            "this llama.cpp was built without its RPC backend; build it with "
            "CMAKE_ARGS=-DGGML_RPC=on, or leave --rpc out"
        )
    for server in servers:
        host, _, port = server.rpartition(":")
        if not host or not (port.isascii() and port.isdigit()):
            raise ModelError(f"{server!r} is not the address of an RPC server; expected HOST:PORT")
        if server in _greeted:  # it serves one client at a time, and that is this process
            continue
        try:
            with socket.create_connection((host, int(port)), CONNECT_TIMEOUT) as connection:
                _greet(connection)
            _greeted.add(server)
        except (OSError, OverflowError, ValueError) as e:
            reason = getattr(e, "strerror", None) or e
            raise ModelError(
                f"{server}: no RPC server answers there ({reason}); start llama.cpp's "
                "ggml-rpc-server, or check the address"
            ) from e


def _greet(connection: socket.socket) -> None:
    """Send the greeting of llama.cpp's protocol (ggml-rpc.cpp).

    Raises ValueError for no answer, or an unexpected one.
    """
    connection.sendall(struct.pack("<BQ", HELLO, HELLO_BYTES) + bytes(HELLO_BYTES))
    try:
        answer = connection.recv(64)
    except TimeoutError as e:
        raise ValueError(
            "it does not answer: it may be serving another client, or is not an RPC server"
        ) from e
    # 8 bytes for the length of the rest: 4 bytes of version and HELLO_BYTES of capabilities.
    if answer[:8] != struct.pack("<Q", 4 + HELLO_BYTES):
        raise ValueError("its answer is not that of this llama.cpp's version")


def device_list(servers: Sequence[str]) -> Any:
    """Return all devices of the servers as a C array, for llama.cpp's model parameters.

    Raises ModelError as `check_servers` does.
    """
    check_servers(servers)
    devices: list[int] = []
    for server in servers:
        registry = ggml.function("backend_rpc_add_server")(server.encode())
        if not registry:
            raise ModelError(f"{server}: this RPC server has no devices")
        count = ggml.function("backend_reg_dev_count")(registry)
        devices += [ggml.function("backend_reg_dev_get")(registry, i) for i in range(count)]
    return (ctypes.c_void_p * (len(devices) + 1))(*devices, None)
