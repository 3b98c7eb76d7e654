"""Logging: both libraries in one stream, JSON that parses, standard output untouched."""

import io
import json
import logging
import warnings

import pytest
import structlog

from mentor_serve.errors import ConfigError
from mentor_serve.telemetry import bind_context, clear_context, configure_logging


@pytest.fixture(autouse=True)
def restored_logging():
    root = logging.getLogger()
    before = (root.level, root.handlers[:])
    yield
    clear_context()
    logging.captureWarnings(False)
    for handler in root.handlers:
        if handler not in before[1]:
            handler.close()
    root.setLevel(before[0])
    root.handlers[:] = before[1]
    structlog.reset_defaults()


def last_json(text):
    return json.loads(text.strip().splitlines()[-1])


def test_standard_library_records_become_json_lines(capsys):
    configure_logging("INFO", "json")
    logging.getLogger("mentor_serve.learner").info("step %d done", 7, extra={"loss": 0.5})
    captured = capsys.readouterr()
    line = last_json(captured.err)
    assert line["event"] == "step 7 done"
    assert line["logger"] == "mentor_serve.learner"
    assert line["level"] == "info"
    assert line["loss"] == 0.5
    assert line["timestamp"].endswith("Z")
    assert captured.out == ""


def test_structlog_records_have_the_same_form(capsys):
    configure_logging("INFO", "json")
    structlog.get_logger("gateway").warning("slow", seconds=3)
    line = last_json(capsys.readouterr().err)
    assert (line["event"], line["logger"], line["level"]) == ("slow", "gateway", "warning")
    assert line["seconds"] == 3


def test_bound_fields_reach_every_record(capsys):
    configure_logging("INFO", "json")
    bind_context(policy_version=4)
    logging.getLogger("a").info("one")
    assert last_json(capsys.readouterr().err)["policy_version"] == 4
    clear_context()
    logging.getLogger("a").info("two")
    assert "policy_version" not in last_json(capsys.readouterr().err)


def test_exceptions_are_part_of_the_json_line(capsys):
    configure_logging("INFO", "json")
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("a").exception("failed")
    assert "ValueError: broken" in last_json(capsys.readouterr().err)["exception"]


def test_console_lines_are_plain_text_and_respect_the_level(capsys):
    configure_logging("WARNING", "console")
    logging.getLogger("a").info("hidden")
    logging.getLogger("a").warning("shown")
    text = capsys.readouterr().err
    assert "shown" in text
    assert "hidden" not in text
    assert "\x1b[" not in text


def test_the_file_gets_json_whatever_the_console_shows(tmp_path):
    file = tmp_path / "logs" / "learner.log"
    configure_logging("INFO", "console", file)
    logging.getLogger("a").info("kept")
    assert last_json(file.read_text())["event"] == "kept"


def test_a_second_call_replaces_the_first(capsys):
    configure_logging("INFO", "json")
    configure_logging("INFO", "json")
    logging.getLogger("a").info("once")
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_handlers_of_other_libraries_are_left_open():
    """absl's handler closes its stream when closed, and the stream may be standard error."""

    class Closing(logging.StreamHandler):
        def close(self):
            self.stream.close()
            super().close()

    stream = io.StringIO()
    elsewhere = logging.getLogger("another.library")
    handler = Closing(stream)
    elsewhere.addHandler(handler)
    try:
        configure_logging("INFO", "json")
        elsewhere.warning("still written")
        assert "still written" in stream.getvalue()
    finally:
        elsewhere.removeHandler(handler)


def test_warnings_are_logged(capsys):
    configure_logging("INFO", "json")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old option", stacklevel=1)
    # pytest replaces showwarning inside catch_warnings only when it records, which it does not here
    assert "old option" in capsys.readouterr().err


@pytest.mark.parametrize(("level", "format"), [("LOUD", "json"), ("INFO", "xml")])
def test_unknown_choices_are_refused(level, format):
    with pytest.raises(ConfigError, match="expected"):
        configure_logging(level, format)


def test_a_file_that_cannot_be_written_is_refused(tmp_path):
    blocker = tmp_path / "blocker"
    blocker.write_text("")
    with pytest.raises(ConfigError, match="log file"):
        configure_logging("INFO", "console", blocker / "x.log")
