import hashlib
import io
import sqlite3
import subprocess
import sys

import pytest
from alembic import command
from alembic.util import CommandError
from pytest_alembic.tests import (
    test_model_definitions_match_ddl as check_model_definitions_match_ddl,
)
from pytest_alembic.tests import test_single_head_revision as check_single_head_revision
from pytest_alembic.tests import test_up_down_consistency as check_up_down_consistency
from pytest_alembic.tests import test_upgrade as check_upgrade
from sqlalchemy import inspect, text
from store_samples import group, update_record, version_record

from mentor_serve.errors import SchemaOutOfDate, StoreError
from mentor_serve.store import (
    TrajectoryStore,
    database_check,
    require_current,
    schema,
    schema_state,
    upgrade,
    views,
)
from mentor_serve.store.connection import open_engine, writing
from mentor_serve.store.models import Base


@pytest.fixture
def alembic_config():
    return schema.alembic_config()


@pytest.fixture
def alembic_engine(empty_url):
    engine = open_engine(empty_url)
    yield engine
    engine.dispose()


@pytest.mark.parametrize(
    "check",
    [
        check_single_head_revision,
        check_upgrade,
        check_up_down_consistency,
        check_model_definitions_match_ddl,
    ],
    ids=lambda check: check.__name__,
)
def test_history_is_sound(alembic_runner, check):
    check(alembic_runner)


def run_alembic(url, function, *arguments):
    """An Alembic command over our own connection and lock."""
    config = schema.alembic_config()
    engine = open_engine(url)
    try:
        with schema.migrating(engine) as connection:
            config.attributes["connection"] = connection
            function(config, *arguments)
    finally:
        engine.dispose()


def test_metadata_equals_migrations(url):
    run_alembic(url, command.check)


def test_a_forgotten_migration_is_noticed(url):
    with writing(engine := open_engine(url), url, doing="x") as connection:
        connection.execute(text("ALTER TABLE runs ADD COLUMN forgotten INTEGER"))
    engine.dispose()
    with pytest.raises(CommandError, match="forgotten"):
        run_alembic(url, command.check)


def test_every_table_of_the_design_is_there(url):
    engine = open_engine(url)
    found = inspect(engine)
    assert set(found.get_table_names()) == set(Base.metadata.tables) | {"alembic_version"}
    assert set(found.get_view_names()) == set(views.VIEWS)
    engine.dispose()


PUBLISHED_VIEWS = {
    "0001": "e0276b6951ef29307f6df34ff9992f4aaac8e1ff526136adbe4de07012738fa8",
    "0002": "119b1f09018fd85f478b4516cc3d77e1ef53447ddca8c7a18c7c4989d3b21497",
    "0003": "4070d29a0ef33fede45a66f3ff84a1e5bd2dc6234b3a4fd97fa3427184deb279",
}


@pytest.mark.parametrize("revision", PUBLISHED_VIEWS)
def test_published_views_never_change(revision):
    """Migrations import these texts: an edit would change history. Add a new set instead."""
    published = getattr(views, f"VIEWS_{revision}")
    digest = hashlib.sha256(repr(sorted(published.items())).encode()).hexdigest()
    assert digest == PUBLISHED_VIEWS[revision]


def test_a_view_of_two_texts_asks_which_database():
    with pytest.raises(ValueError, match="one of sqlite, postgresql as dialect of view v_through"):
        views.create_statement("v_throughput")


def test_views_in_the_database_are_the_current_ones(url):
    if not url.startswith("sqlite"):
        pytest.skip("PostgreSQL stores views parsed")
    connection = sqlite3.connect(url.removeprefix("sqlite:///"))
    found = dict(connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'view'"))
    connection.close()
    current = {name: views.create_statement(name, dialect="sqlite") for name in views.VIEWS}
    assert found == current


def test_check_creates_nothing(tmp_path):
    path = tmp_path / "new.db"
    assert schema_state(f"sqlite:///{path}").status == "empty"
    assert not path.exists()


def test_an_empty_database_names_the_command(empty_url):
    with pytest.raises(SchemaOutOfDate, match="found no schema; run: mentor-serve db upgrade"):
        require_current(empty_url)
    report = database_check(empty_url)
    assert report["ok"] is False
    assert "mentor-serve db upgrade" in report["problems"][0]


def test_upgrade_is_repeatable(empty_url):
    assert upgrade(empty_url).status == "ok"
    assert upgrade(empty_url) == require_current(empty_url) == schema_state(empty_url)


def set_revision(url, revision):
    with writing(engine := open_engine(url), url, doing="x") as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = :r"), {"r": revision})
    engine.dispose()


def test_a_database_of_a_newer_version_is_left_alone(url):
    set_revision(url, "9999")
    assert schema_state(url).status == "ahead"
    for action in (require_current, upgrade):
        with pytest.raises(SchemaOutOfDate, match="written by a newer mentor-serve"):
            action(url)
    assert schema_state(url).current == "9999"


def test_a_database_behind_names_the_command(url, monkeypatch):
    older = schema_state(url).current
    monkeypatch.setattr(schema, "_head", lambda: "9999")
    assert schema_state(url).status == "behind"
    with pytest.raises(SchemaOutOfDate, match=f"found schema {older}; run: mentor-serve db upg"):
        require_current(url)


def test_downgrade_and_upgrade_again_with_data(url):
    with TrajectoryStore(url) as store:
        run_id = store.open_run("test", {})
        store.add_version(run_id, version_record(0))
        store.add_group(run_id, group())
        (leased,) = store.lease_groups(run_id, num_groups=1, owner="a", lease_s=60)
        store.commit_update(
            run_id,
            owner="a",
            group_ids=[leased.group_id],
            update=update_record(1),
            version=version_record(1),
        )
    run_alembic(url, command.downgrade, "base")
    assert schema_state(url).status == "empty"
    assert upgrade(url).status == "ok"
    with TrajectoryStore(url) as store:
        assert store.find_run("test") is None


def test_a_failed_upgrade_changes_nothing(empty_url, monkeypatch):
    broken = dict(views.VIEWS_0001) | {"v_staleness": "SELECT no such syntax"}
    monkeypatch.setattr(views, "VIEWS_0001", broken)
    with pytest.raises(StoreError, match="upgrading the schema failed"):
        upgrade(empty_url)
    assert schema_state(empty_url).status == "empty"
    engine = open_engine(empty_url)
    assert set(inspect(engine).get_table_names()) <= {"alembic_version"}
    engine.dispose()
    monkeypatch.undo()
    assert upgrade(empty_url).status == "ok"


def test_a_migration_that_orphans_rows_is_refused(url):
    if not url.startswith("sqlite"):
        pytest.skip("PostgreSQL checks foreign keys during migrations too")
    with TrajectoryStore(url) as store:
        run_id = store.open_run("test", {})
        store.add_group(run_id, group())
    engine = open_engine(url)
    refused = pytest.raises(StoreError, match="rows without parents")
    with refused, schema.migrating(engine) as connection:
        connection.execute(text("DELETE FROM runs"))
    engine.dispose()
    with TrajectoryStore(url) as store:
        assert store.find_run("test") == run_id
    assert database_check(url)["ok"]


def test_foreign_keys_hold_again_after_an_upgrade(url):
    engine = open_engine(url)
    with pytest.raises(StoreError, match="x failed"), writing(engine, url, doing="x") as connection:
        connection.execute(
            text("INSERT INTO interventions VALUES ('no', 0, 1, '', 2, '', 0, 0, 0, 0)")
        )
    engine.dispose()


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE rollout_groups SET status = 'new'",
        "UPDATE trajectories SET kind = 'guess'",
        "UPDATE trajectories SET status = 'new'",
        "UPDATE events SET severity = 'fatal'",
    ],
)
def test_the_database_refuses_unknown_words(url, change):
    with TrajectoryStore(url) as store:
        run_id = store.open_run("test", {})
        store.add_group(run_id, group())
        store.add_event(run_id, kind="test", severity="info", message="")
    engine = open_engine(url)
    with pytest.raises(StoreError, match="x failed"), writing(engine, url, doing="x") as connection:
        connection.execute(text(change))
    engine.dispose()


UPGRADER = """
import sys
from mentor_serve.store import upgrade
print("started", flush=True)
sys.stdin.readline()
print(upgrade(sys.argv[1]).status)
"""


def test_processes_that_start_together_upgrade_once(empty_url):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", UPGRADER, empty_url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout.readline() == "started\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    results = [process.communicate(timeout=60) for process in processes]
    assert [out for out, _ in results] == ["ok\n"] * 3, [err for _, err in results]
    require_current(empty_url)


def test_the_plain_alembic_command_reads_the_settings(empty_url, monkeypatch):
    monkeypatch.setenv("MENTOR_SERVE_STORE__URL", empty_url)
    command.upgrade(schema.alembic_config(), "head")
    assert schema_state(empty_url).status == "ok"
    command.check(schema.alembic_config())


def test_sql_can_be_written_without_a_database(empty_url, monkeypatch):
    monkeypatch.setenv("MENTOR_SERVE_STORE__URL", empty_url)
    config = schema.alembic_config()
    config.output_buffer = written = io.StringIO()
    command.upgrade(config, "head", sql=True)
    assert "CREATE TABLE trajectory_tokens" in written.getvalue()
    assert "CREATE VIEW v_staleness" in written.getvalue()


def test_migrations_are_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(schema, "_PACKAGE", tmp_path / "mentor_serve")
    with pytest.raises(StoreError, match="reinstall mentor-serve"):
        schema.migrations_path()
    for folder in (tmp_path / "migrations", tmp_path / "mentor_serve" / "_migrations"):
        folder.mkdir(parents=True)
        (folder / "env.py").touch()
        # The wheel's copy wins over a folder that happens to lie beside the package.
        assert schema.migrations_path() == folder
