"""TCP ports for the servers that tests start."""

from __future__ import annotations

import os
import random
import socket

# Below the range from which Linux takes the ports of outgoing and unnamed listening sockets
# (ip_local_port_range, 32768 and up), and above Ray's worker ports (10002-19999): a port asked of
# the system itself may be some other process's before the server under test binds it.
_PORTS = range(20_000, 32_000)
_order = random.Random(os.getpid()).sample(_PORTS, len(_PORTS))


def free_port() -> int:
    """A port of 127.0.0.1 where nothing listens; never the same one twice in a process.

    Raises:
        RuntimeError: every port is taken.
    """
    while _order:
        port = _order.pop()
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"no free port in {_PORTS}")
