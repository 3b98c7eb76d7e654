"""What has to be true of a database and its spools, whatever happened to the processes."""

from collections import Counter

from fault_processes import GROUPS_A_STEP
from sqlalchemy import text

from mentor_serve.store.connection import open_engine, reading
from mentor_serve.store.group_files import decode_group

TRAJECTORIES_A_GROUP = 3


class Books:
    """Counts what is stored, and compares it with what was acknowledged."""

    def __init__(self, url, run_id, spools):
        self._url = url
        self._run_id = run_id
        self._spools = spools
        self._engine = open_engine(url)

    def close(self):
        self._engine.dispose()

    def _rows(self, query):
        with reading(self._engine, self._url, doing="checking the books") as connection:
            return connection.execute(text(query), {"run_id": self._run_id}).all()

    def spooled(self):
        """Ids of the groups on disk."""
        paths = [path for spool in self._spools for path in spool.glob("*.group")]
        return [decode_group(path.read_bytes()).group.group_id for path in paths]

    def stored(self):
        """Group id -> (status, step)."""
        rows = self._rows("SELECT id, status, consumed_by_step FROM rollout_groups")
        return {row[0]: (row[1], row[2]) for row in rows}

    def check(self, acknowledged, *, is_settled=False):
        """Nothing acknowledged is lost, nothing is there twice; returns a summary."""
        # Spools first: what leaves them meanwhile is then found in the database.
        spooled = set(self.spooled())
        stored = self.stored()
        lost = set(acknowledged) - stored.keys() - spooled
        consumed = Counter(step for status, step in stored.values() if status == "consumed")
        steps = [row[0] for row in self._rows("SELECT step FROM updates ORDER BY step")]
        rejected = [path for spool in self._spools for path in spool.glob("rejected/*")]
        summary = (
            f"{len(acknowledged)} acknowledged, {len(stored)} stored, {len(spooled)} in spools, "
            f"{sum(consumed.values())} consumed by {len(steps)} updates, {len(lost)} lost, "
            f"{len(rejected)} rejected"
        )
        assert not lost, summary
        assert not rejected, summary
        assert len(acknowledged) == len(set(acknowledged)), summary
        assert steps == list(range(1, len(steps) + 1)), summary
        assert consumed == dict.fromkeys(steps, GROUPS_A_STEP), summary
        assert self._odd_groups() == [], summary
        assert self._counted() == len(stored) * TRAJECTORIES_A_GROUP, summary
        if is_settled:
            assert not spooled, summary
            assert set(acknowledged) <= stored.keys(), summary
        return summary

    def _odd_groups(self):
        """Groups without exactly their trajectories, each with its tokens."""
        return self._rows(
            "SELECT g.id FROM rollout_groups g LEFT JOIN trajectories t ON t.group_id = g.id "
            "LEFT JOIN trajectory_tokens k ON k.trajectory_id = t.id GROUP BY g.id "
            f"HAVING COUNT(t.id) <> {TRAJECTORIES_A_GROUP} "
            f"OR COUNT(k.trajectory_id) <> {TRAJECTORIES_A_GROUP}"
        )

    def _counted(self):
        """Trajectories in the running sums: a group stored twice would count twice."""
        ((total,),) = self._rows(
            "SELECT COALESCE(SUM(num_trajectories), 0) FROM version_stats WHERE run_id = :run_id"
        )
        return int(total)
