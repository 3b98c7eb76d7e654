"""The SQL trajectory store: SQLite by default, PostgreSQL in production.

`TrajectoryStore` reads and writes, `upgrade` and `require_current` take care of the schema,
`stats` holds the aggregates of the dashboard. No other package writes SQL.
"""

from mentor_serve.store.evaluations import EvaluationRecord, MeasureRecord
from mentor_serve.store.health import database_check
from mentor_serve.store.history import RunHistory
from mentor_serve.store.records import (
    DemonstrationAttempt,
    EventRecord,
    LeasedGroup,
    LeasedTrajectory,
    NewDemonstration,
    NewGroup,
    NewTrajectory,
    StoredDemonstration,
    StoredTask,
    TrainingStatus,
    TrajectoryRecord,
    UpdateRecord,
    VersionRecord,
    new_id,
)
from mentor_serve.store.schema import SchemaState, require_current, upgrade
from mentor_serve.store.schema import check as schema_state
from mentor_serve.store.store import TrajectoryStore
from mentor_serve.store.tables import (
    ExportReport,
    TrajectoryFilter,
    TrajectoryReader,
    export_trajectories,
)

__all__ = [
    "DemonstrationAttempt",
    "EvaluationRecord",
    "EventRecord",
    "ExportReport",
    "LeasedGroup",
    "LeasedTrajectory",
    "MeasureRecord",
    "NewDemonstration",
    "NewGroup",
    "NewTrajectory",
    "RunHistory",
    "SchemaState",
    "StoredDemonstration",
    "StoredTask",
    "TrainingStatus",
    "TrajectoryFilter",
    "TrajectoryReader",
    "TrajectoryRecord",
    "TrajectoryStore",
    "UpdateRecord",
    "VersionRecord",
    "database_check",
    "export_trajectories",
    "new_id",
    "require_current",
    "schema_state",
    "upgrade",
]
