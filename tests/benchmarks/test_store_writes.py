"""The benchmark of writing, at its smallest: every contender stores every group."""

from benchmarks.store_writes import measure

CONTENDERS = {"driver", "rows", "groups", "writer", "single"}


def test_every_contender_stores_the_same_groups(url):
    result = measure(url, rounds=1, num_groups=3, batch=2, num_threads=2)
    assert result["database"] in {"sqlite", "postgresql"}
    assert set(result["groups_per_s"]) == set(result["share_of_driver"]) == CONTENDERS
    assert result["share_of_driver"]["driver"] == 1.0
    assert all(speed > 0 for speed in result["groups_per_s"].values())
