"""One local Ray cluster for all backends with ranks of their own."""

from __future__ import annotations

import gc
import os
import warnings

# Read when ray is imported first.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray starts its workers at niceness 15: beside other tests on two cores, ranks then get next to no
# time to start in.
os.environ.setdefault("RAY_worker_niceness", "0")

import pytest


@pytest.fixture(scope="module")
def ray_cluster():
    """A cluster of this process's own, on loopback.

    Not for the whole session: its idle processes would take time from all tests that follow.
    """
    import ray

    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=200 * 2**20,
        _node_ip_address="127.0.0.1",
    )
    yield ray
    with warnings.catch_warnings():
        # Ray waits a second for a process of its own that it has killed, and then forgets it.
        warnings.simplefilter("ignore", ResourceWarning)
        ray.shutdown()
        gc.collect()
