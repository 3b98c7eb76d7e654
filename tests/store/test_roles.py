"""The roles of `mentor-serve db roles` on a real server: the service writes, people only read."""

import inspect
import re
import uuid
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import postgres_server
import pytest
from databases import postgres_database
from sqlalchemy import create_engine, make_url, text
from store_samples import demonstration, group, task, trajectory, update_record, version_record

from mentor_serve.errors import ConfigError, StoreError
from mentor_serve.store import TrajectoryStore, database_check, upgrade
from mentor_serve.store.prune import PrunePlan, prune
from mentor_serve.store.roles import roles_script
from mentor_serve.store.size import database_stats
from mentor_serve.store.stats import StatsReader
from mentor_serve.types import TrajectoryKind

GUIDE = Path(__file__).parents[2] / "docs" / "sql.md"
QUERIES = re.findall(r"```sql\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
PASSWORD = "of-a-role"
needs_postgres = [
    pytest.mark.postgres,
    pytest.mark.skipif(not postgres_server.is_available(), reason=postgres_server.ABSENT),
]
pytestmark = needs_postgres


@contextmanager
def executing(url):
    location = make_url(url).set(drivername="postgresql+psycopg")
    engine = create_engine(location, isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


class Roles:
    """A migrated database of an owner's, with a writer and a reader beside."""

    def __init__(self, owner_url):
        suffix = uuid.uuid4().hex[:12]
        self.writer, self.reader = f"writer_{suffix}", f"reader_{suffix}"
        self.owner_url = owner_url

    def apply(self):
        with executing(self.owner_url) as connection:
            # As psql sends it: many statements, no parameters.
            script = roles_script(writer=self.writer, reader=self.reader)
            connection.connection.driver_connection.execute(script)
            for name in (self.writer, self.reader):
                connection.exec_driver_sql(f"ALTER ROLE {name} PASSWORD '{PASSWORD}'")

    def url(self, name):
        location = make_url(self.owner_url).set(username=name, password=PASSWORD)
        return location.render_as_string(hide_password=False)

    @property
    def writer_url(self):
        return self.url(self.writer)

    @property
    def reader_url(self):
        return self.url(self.reader)


@pytest.fixture(params=["migrated before", "migrated after"])
def roles(request, postgres_url):
    """The script comes before or after the migrations: default privileges do the rest."""
    with postgres_database(postgres_url) as (_, url):
        made = Roles(url)
        if request.param == "migrated before":
            upgrade(url)
            made.apply()
            made.apply()  # again, which changes nothing
        else:
            made.apply()
            upgrade(url)
        yield made
    with executing(postgres_url) as connection:
        for name in (made.writer, made.reader):
            connection.exec_driver_sql(f"DROP ROLE {name}")


@pytest.fixture
def filled(roles):
    """What a service does, done as the writer; the id of the run."""
    with TrajectoryStore(roles.writer_url) as store:
        run_id = store.open_run("test", {})
        store.add_version(run_id, version_record(0))
        for number in range(3):
            store.add_group(run_id, group(number=number))
        leased = store.lease_groups(run_id, num_groups=2, owner="a", lease_s=60)
        store.renew_leases("a", 60)
        store.commit_update(
            run_id,
            owner="a",
            group_ids=[item.group_id for item in leased],
            update=update_record(1),
            version=version_record(1),
        )
        store.set_live(run_id, 1)
        store.add_demonstrations(run_id, task(7), [demonstration()])
        store.add_served(run_id, trajectory(TrajectoryKind.SERVED), trajectory_id="served")
        store.add_event(run_id, kind="test", severity="warning", message="x")
    return run_id


def test_the_writer_prunes_but_makes_and_drops_nothing(roles, filled):
    done = prune(roles.writer_url, PrunePlan(what="groups", keep_days=0, pause_s=0))
    assert (done.num_groups, done.num_served) == (2, 1)
    with executing(roles.writer_url) as connection:
        for statement in (
            "CREATE TABLE mine (id int)",
            "DROP TABLE runs",
            "ALTER TABLE runs ADD COLUMN mine int",
            "TRUNCATE runs CASCADE",
        ):
            with pytest.raises(Exception, match=r"permission denied|must be owner"):
                connection.exec_driver_sql(statement)


@pytest.mark.usefixtures("filled")
def test_the_reader_asks_every_question_of_the_guide(roles):
    assert len(QUERIES) >= 8
    with executing(roles.reader_url) as connection:
        for query in QUERIES:
            connection.execute(text(query)).all()
        assert connection.exec_driver_sql("SELECT COUNT(*) FROM runs").scalar_one() == 1


def arguments(run_id):
    """What each query of the dashboard is called with."""
    return {
        "runs": {},
        "by_version": {"run_id": run_id, "kind": TrajectoryKind.MIXED},
        "throughput": {"run_id": run_id, "now": datetime.now(UTC)},
        "trajectory": {"trajectory_id": "served"},
    }


def test_the_reader_runs_every_query_of_the_dashboard(roles, filled):
    reader = StatsReader(roles.reader_url)
    names = {
        name
        for name, _ in inspect.getmembers(StatsReader, inspect.isfunction)
        if not name.startswith("_") and name not in ("close", "connection")
    }
    assert len(names) >= 12
    for name in sorted(names):
        getattr(reader, name)(**arguments(filled).get(name, {"run_id": filled}))
    assert reader.runs()[0]["name"] == "test"
    assert reader.trajectory("served") is not None
    reader.close()


@pytest.mark.usefixtures("filled")
def test_the_reader_may_check_and_measure(roles):
    assert database_check(roles.reader_url)["problems"] == []
    assert database_stats(roles.reader_url)["tables"]["trajectories"]["num_rows"] == 11


@pytest.mark.usefixtures("filled")
def test_the_reader_cannot_write(roles):
    with TrajectoryStore(roles.reader_url) as store, pytest.raises(StoreError) as caught:
        store.open_run("mine", {})
    assert PASSWORD not in str(caught.value)
    with executing(roles.reader_url) as connection:
        with pytest.raises(Exception, match="read-only transaction"):
            connection.exec_driver_sql("DELETE FROM events")
        # Not the setting alone, which anybody may change, but the privileges.
        connection.exec_driver_sql("SET default_transaction_read_only = off")
        for table in ("runs", "events", "version_stats", "alembic_version"):
            for statement in (f"DELETE FROM {table}", f"INSERT INTO {table} DEFAULT VALUES"):
                with pytest.raises(Exception, match="permission denied"):
                    connection.exec_driver_sql(statement)
        with pytest.raises(Exception, match="permission denied"):
            connection.exec_driver_sql("CREATE TABLE mine (id int)")


def test_tables_of_later_migrations_are_readable(roles):
    with executing(roles.owner_url) as connection:
        connection.exec_driver_sql("CREATE TABLE later (id int)")
        connection.exec_driver_sql("CREATE VIEW v_later AS SELECT * FROM later")
    with executing(roles.writer_url) as connection:
        connection.exec_driver_sql("INSERT INTO later VALUES (1)")
    with executing(roles.reader_url) as connection:
        assert connection.exec_driver_sql("SELECT COUNT(*) FROM v_later").scalar_one() == 1


def test_readers_have_time_outs_and_a_bound(roles):
    with executing(roles.reader_url) as connection:
        found = {
            name: connection.exec_driver_sql(f"SHOW {name}").scalar_one()
            for name in ("statement_timeout", "idle_in_transaction_session_timeout")
        }
        bound = connection.execute(
            text("SELECT rolconnlimit FROM pg_roles WHERE rolname = current_user")
        ).scalar_one()
    assert found == {"statement_timeout": "1min", "idle_in_transaction_session_timeout": "1min"}
    assert bound == 20


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("page", ["overview", "guidance", "learner", "trajectories"])
def test_the_dashboard_works_with_the_readers_url(roles, page, monkeypatch, tmp_path):
    import streamlit as st
    from streamlit.testing.v1 import AppTest

    from mentor_dashboard import source

    monkeypatch.setenv("MENTOR_SERVE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MENTOR_SERVE_STORE__URL", roles.reader_url)
    st.cache_data.clear()
    st.cache_resource.clear()
    script = f"from mentor_dashboard.pages import {page}\n{page}.page()\n"
    app = AppTest.from_string(script, default_timeout=60).run()
    assert not app.exception, app.exception
    assert app.selectbox[0].value == "test"
    shown = " ".join(str(element.value) for element in (*app.caption, *app.markdown, *app.info))
    assert PASSWORD not in shown
    source._reader(roles.reader_url).close()  # the page's own, which outlives it
    st.cache_resource.clear()


def test_names_that_sql_would_want_quoted_are_refused():
    for name in ("", "Mentor", 'x"', "pg_reader", "a" * 64, "x; DROP TABLE runs"):
        with pytest.raises(ConfigError, match="expected a role name"):
            roles_script(reader=name)
    with pytest.raises(ConfigError, match="expected two roles"):
        roles_script(writer="same", reader="same")
