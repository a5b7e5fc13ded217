"""Weights on other machines, by llama.cpp's RPC backend.

Each of them runs llama.cpp's own ggml-rpc-server, of the version that is here; a model's layers are
sent there when its weights are loaded, and only activations travel after that.
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
HELLO, HELLO_BYTES = 14, 24  # the command's number, which never changes, and its argument's length
_known: set[str] = set()  # servers that have answered this process


def check_servers(servers: Sequence[str]) -> None:
    """Raise ModelError where this llama.cpp cannot use RPC, or a server is not there.

    llama.cpp itself ends the process when it cannot connect.
    """
    if not llama.llama_supports_rpc():
        raise ModelError(
            "this llama.cpp was built without its RPC backend; build it with "
            "CMAKE_ARGS=-DGGML_RPC=on, or leave --rpc out"
        )
    for server in servers:
        host, _, port = server.rpartition(":")
        if not host or not (port.isascii() and port.isdigit()):
            raise ModelError(f"{server!r} is no RPC server; expected HOST:PORT")
        if server in _known:  # it serves one client at a time, and that is this process
            continue
        try:
            with socket.create_connection((host, int(port)), CONNECT_TIMEOUT) as connection:
                _greet(connection)
            _known.add(server)
        except (OSError, OverflowError, ValueError) as e:
            reason = getattr(e, "strerror", None) or e
            raise ModelError(
                f"{server}: no RPC server answers there ({reason}); start llama.cpp's "
                "ggml-rpc-server, or check the address"
            ) from e


def _greet(connection: socket.socket) -> None:
    """Say hello in llama.cpp's protocol (ggml-rpc.cpp). Raises ValueError for another answer."""
    connection.sendall(struct.pack("<BQ", HELLO, HELLO_BYTES) + bytes(HELLO_BYTES))
    try:
        answer = connection.recv(64)
    except TimeoutError as e:
        raise ValueError("it is silent: another client has it, or it is none") from e
    # The length of what follows, 8 bytes, and the version with as many bytes of capabilities.
    if answer[:8] != struct.pack("<Q", 4 + HELLO_BYTES):
        raise ValueError("its greeting is not that of this llama.cpp's version")


def device_list(servers: Sequence[str]) -> Any:
    """Return all devices of the servers as llama.cpp's model parameters take them, a C array.

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
