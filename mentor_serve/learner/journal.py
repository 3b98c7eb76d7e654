"""Events of the learner: a row in the store and a line in the log, never a second failure."""

from __future__ import annotations

import logging
import traceback

from mentor_serve.errors import MentorError
from mentor_serve.learner.records import LearnerStore

_log = logging.getLogger(__name__)
_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class Journal:
    """Writes events of one run."""

    def __init__(self, store: LearnerStore, *, run_id: str) -> None:
        self._store = store
        self._run_id = run_id

    def add(self, kind: str, severity: str, message: str) -> None:
        """Record an event; where the store itself fails, the log line has to do."""
        _log.log(_LEVELS[severity], "%s: %s", kind, message)
        try:
            self._store.add_event(self._run_id, kind=kind, severity=severity, message=message)
        except MentorError as error:
            _log.warning("the event %s was not stored: %s", kind, error)


def last_line(error: BaseException) -> str:
    """The last line of the error's traceback."""
    return traceback.format_exception_only(error)[-1].strip()
