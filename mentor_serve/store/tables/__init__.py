"""Trajectories in bulk: numpy arrays, Arrow tables, Parquet and JSONL files (docs/export.md)."""

from mentor_serve.store.tables.files import ExportReport, FileFormat, export_trajectories
from mentor_serve.store.tables.reader import TrajectoryFilter, TrajectoryReader

__all__ = [
    "ExportReport",
    "FileFormat",
    "TrajectoryFilter",
    "TrajectoryReader",
    "export_trajectories",
]
