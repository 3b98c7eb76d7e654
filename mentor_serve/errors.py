"""The error families of mentor-serve.

Every message says what was expected, what came, and what to do. Each class also inherits the
standard-library type that a caller would naturally catch. They are caught only at boundaries: the
HTTP handler, the collector's group, the learner's loop and the command line.
"""


class MentorError(Exception):
    """Base of everything this package raises on purpose."""


class ConfigError(MentorError, ValueError):
    """A setting, file or model directory that the user gave cannot be used."""


class VocabularyMismatch(ConfigError):
    """Policy and expert do not share one vocabulary, so their distributions cannot be mixed."""


class StoreError(MentorError, RuntimeError):
    """The trajectory store refused or failed an operation."""


class StoreUnavailable(StoreError):
    """The database is away, busy or full: the same call may work later.

    Where it comes from a commit, the commit may have happened all the same.
    """


class RunClaimed(StoreError):
    """Another learner trains the run; the message names it."""


class SchemaOutOfDate(StoreError):
    """The database schema is behind or ahead of the code."""


class LeaseLost(StoreError):
    """A group was to be consumed under a lease that its owner no longer holds."""


class EngineError(MentorError, RuntimeError):
    """The generation engine cannot go on with a request."""


class InvalidRequest(EngineError, ValueError):
    """A request that no engine could serve: too long, out of vocabulary, contradictory."""


class ExpertUnavailable(EngineError):
    """The expert did not answer in time; the caller goes on with the policy alone."""


class VerifierError(MentorError, RuntimeError):
    """A verifier raised or ran out of time; the rollout becomes a `failed` row."""


class LearnerWorkerLost(MentorError, RuntimeError):
    """A rank of the training backend died or did not answer; `load` starts new ranks."""


class WeightsError(MentorError, RuntimeError):
    """A weight snapshot is missing, damaged or was not taken by a replica."""


class StalePolicyError(MentorError, RuntimeError):
    """Data or a request belongs to a policy version that is no longer accepted."""


class ServiceError(MentorError, RuntimeError):
    """The service could not be started on the cluster."""
