"""One local Ray cluster for all backends with ranks of their own."""

from __future__ import annotations

import os

# Read when ray is imported first.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import pytest


@pytest.fixture(scope="session")
def ray_cluster():
    """A cluster of this process's own, on loopback."""
    import ray

    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=200 * 2**20,
        _node_ip_address="127.0.0.1",
    )
    yield ray
    ray.shutdown()
