"""The HTTP face: OpenAI's wire format, streaming, errors and keys over any `Backend`.

`create_app` builds a FastAPI application; what generates, trains and stores is behind the
`Backend` protocol. Nothing here knows Ray, SQL or a model.
"""

from mentor_serve.serving.app import create_app
from mentor_serve.serving.backend import (
    Backend,
    Generation,
    ModelCard,
    NotFoundError,
    OverloadedError,
    Readiness,
    UnknownModelError,
)

__all__ = [
    "Backend",
    "Generation",
    "ModelCard",
    "NotFoundError",
    "OverloadedError",
    "Readiness",
    "UnknownModelError",
    "create_app",
]
