"""Finds the running application: `serve run` gives it a name of its own choice."""

from __future__ import annotations

from typing import Any

from ray import serve

from mentor_serve.actors import names
from mentor_serve.errors import ServiceError


def deployment_handle(deployment: str) -> Any:
    """Handle of one of our deployments, whatever the application is called.

    Raises:
        ServiceError: no application of this cluster has a policy deployment.
    """
    for name, application in serve.status().applications.items():
        if names.POLICY in application.deployments:
            return serve.get_deployment_handle(deployment, name)
    raise ServiceError(
        f"expected an application with a deployment {names.POLICY!r} on this cluster, found none"
    )
