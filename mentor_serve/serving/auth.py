"""Bearer keys: optional for everything, separate for routes that change training.

Keys are compared in constant time. An admin key opens every route; without admin keys the API
keys open the admin routes too; without any keys all routes are open.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Sequence
from typing import Annotated, Final

from fastapi import Depends
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from mentor_serve.errors import ConfigError
from mentor_serve.serving.errors import ApiError

_bearer: Final = HTTPBearer(auto_error=False, description="a key of gateway.api_keys")
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


def _is_one_of(token: str, keys: Sequence[bytes]) -> bool:
    given = token.encode("utf-8", "surrogateescape")
    # Every key is compared, so that the time does not tell which one it was.
    return sum(hmac.compare_digest(given, key) for key in keys) > 0


def _unauthorized(message: str) -> ApiError:
    headers = {"www-authenticate": "Bearer"}
    return ApiError(401, message, code="invalid_api_key", headers=headers)


class KeyRing:
    """The keys of a service and the route dependencies that check them."""

    def __init__(self, *, api_keys: Sequence[str], admin_keys: Sequence[str]) -> None:
        admins = [key.encode() for key in admin_keys]
        users = [key.encode() for key in api_keys]
        if b"" in [*admins, *users]:
            raise ConfigError("gateway: expected keys that are not empty, got an empty one")
        self._api_keys = [*users, *admins] if users else []
        self._admin_keys = admins or users

    def require_api_key(self) -> Callable[[Credentials], None]:
        """Dependency of routes that read or generate."""
        keys = self._api_keys

        def check(credentials: Credentials) -> None:
            if not keys:
                return
            if credentials is None:
                raise _unauthorized("expected 'Authorization: Bearer KEY', got none")
            if not _is_one_of(credentials.credentials, keys):
                raise _unauthorized("the API key is not valid here")

        return check

    def require_admin_key(self) -> Callable[[Credentials], None]:
        """Dependency of routes that change training."""
        keys = self._admin_keys
        others = self._api_keys

        def check(credentials: Credentials) -> None:
            if not keys:
                return
            if credentials is None:
                raise _unauthorized("expected 'Authorization: Bearer ADMIN_KEY', got none")
            if _is_one_of(credentials.credentials, keys):
                return
            if _is_one_of(credentials.credentials, others):
                message = "this route needs an admin key; the API key given is none"
                raise ApiError(403, message, code="admin_key_required")
            raise _unauthorized("the API key is not valid here")

        return check
