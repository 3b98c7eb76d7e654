"""Asks a running service over HTTP, on this machine."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

from mentor_serve.errors import ConfigError, ServiceError
from mentor_serve.settings import Settings

PROBE_TIMEOUT_S = 3.0


def base_url(settings: Settings) -> str:
    """Where the service of these settings listens."""
    gateway = settings.gateway
    host = "127.0.0.1" if gateway.host == "0.0.0.0" else gateway.host  # noqa: S104
    return f"http://{host}:{gateway.port}"


def probe_service(settings: Settings) -> dict[str, Any]:
    """What `/health/readiness` says, or that nothing answers."""
    url = f"{base_url(settings)}/health/readiness"
    try:
        with urllib.request.urlopen(url, timeout=PROBE_TIMEOUT_S) as response:  # noqa: S310
            body: dict[str, Any] = json.loads(response.read())
    except urllib.error.HTTPError as error:
        with error:
            body = json.loads(error.read() or b"{}")
    except (OSError, ValueError) as error:
        return {"is_running": False, "url": url, "reason": str(error)}
    return {"is_running": True, "url": url, **body}


def serves_run(settings: Settings, run_id: str) -> bool:
    """Whether the service that answers at the settings' address is this run's.

    Raises:
        ConfigError: it wants a key that the settings do not have.
        ServiceError: it answers, but does not say.
    """
    if not probe_service(settings)["is_running"]:
        return False
    # Another state directory's service may listen on the default port.
    return bool(call_service(settings, "GET", "/v1/training").get("run_id") == run_id)


def call_service(
    settings: Settings, method: str, path: str, body: dict[str, Any] | None = None
) -> dict[str, Any]:
    """One JSON request with the first admin key of the settings (else the first API key).

    Raises:
        ConfigError: the service wants another key, or does not know what the request names.
        ServiceError: it refused or failed otherwise; with its message.
    """
    headers = {"content-type": "application/json"}
    keys = [*settings.gateway.admin_keys, *settings.gateway.api_keys]
    if keys:
        headers["authorization"] = f"Bearer {keys[0].get_secret_value()}"
    request = urllib.request.Request(  # noqa: S310 - http, from the settings
        base_url(settings) + path,
        method=method,
        headers=headers,
        data=None if body is None else json.dumps(body).encode(),
    )
    timeout_s = settings.gateway.request_timeout_s
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:  # noqa: S310
            answer: dict[str, Any] = json.loads(response.read())
            return answer
    except urllib.error.HTTPError as error:
        message = _message(error)
        if error.code in {401, 403}:
            raise ConfigError(
                f"{method} {path}: {message}; set gateway.admin_keys to the service's"
            ) from error
        family = ConfigError if error.code == 404 else ServiceError
        raise family(f"{method} {path}: {message}") from error
    except (OSError, ValueError) as error:
        raise ServiceError(f"{method} {path}: no answer that can be read: {error}") from error


def _message(error: urllib.error.HTTPError) -> str:
    try:
        with error:
            return str(json.loads(error.read())["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"status {error.code}"
