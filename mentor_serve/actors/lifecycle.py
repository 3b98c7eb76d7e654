"""Start, drain and stop the whole service on a Ray cluster."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import signal
import socket
import threading
from types import FrameType

import ray
import structlog
from ray import serve

from mentor_serve.actors import names
from mentor_serve.actors.application import deployment_handle
from mentor_serve.actors.supervisor import stop_supervised
from mentor_serve.errors import ConfigError, ServiceError
from mentor_serve.settings import Settings

log = structlog.get_logger(__name__)


def check_port_is_free(host: str, port: int, *, setting: str) -> None:
    """Raises `ConfigError` when something listens there already."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"{setting} = {port} should be a free port on {host}: {error.strerror}; stop what "
                "listens there or choose another port"
            ) from error


def start_service(settings: Settings, application: serve.Application) -> None:
    """Start Ray (or join the cluster of RAY_ADDRESS), deploy, and wait until it is healthy.

    Raises:
        ServiceError: a deployment does not come up; says why.
    """
    if not ray.is_initialized():
        start_ray()
    serve.start(
        http_options={
            "host": settings.gateway.host,
            "port": settings.gateway.port,
            "request_timeout_s": settings.gateway.request_timeout_s,
        }
    )
    try:
        serve.run(application, name=names.APPLICATION, route_prefix="/")
    except RuntimeError as error:
        raise ServiceError(_why_not_deployed(settings, error)) from error


def _why_not_deployed(settings: Settings, error: RuntimeError) -> str:
    application = serve.status().applications.get(names.APPLICATION)
    messages = [] if application is None else [d.message for d in application.deployments.values()]
    # Serve's message is a traceback; its last line is the reason.
    reasons = [message.strip().splitlines()[-1] for message in messages if message.strip()]
    return (
        f"the service did not start: {'; '.join(reasons) or error}; logs are in {settings.logs_dir}"
    )


def start_ray() -> None:
    """A local cluster for this service alone, or the one that RAY_ADDRESS names."""
    address = os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, namespace=names.NAMESPACE, logging_level=logging.ERROR)
        return
    ray.init(
        namespace=names.NAMESPACE,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        # Replicas book fractions of a CPU that add up to about 2, also on a smaller machine.
        num_cpus=max(4, os.cpu_count() or 1),
    )


def drain_service(settings: Settings) -> None:
    """Refuse new requests, let those in flight finish, store what was collected, end the actors.

    Bounded by `gateway.drain_timeout_s` for each part; a part that does not answer is left to
    the shutdown that follows, which is safe at any moment.
    """
    timeout_s = settings.gateway.drain_timeout_s + 5.0
    asyncio.run(_drain_replicas(timeout_s))
    # After the collectors: their supervisors would start these again.
    stop_supervised(timeout_s)


async def _drain_replicas(timeout_s: float) -> None:
    """Both at once. No thread pool: those are closed when an exiting interpreter gets here."""
    await asyncio.gather(
        _broadcast(names.GATEWAY, "drain", timeout_s),
        _broadcast(names.COLLECTOR, "stop", timeout_s),
    )


async def _broadcast(deployment: str, method: str, timeout_s: float) -> None:
    try:
        response = deployment_handle(deployment).broadcast(method)
        await response.results_async(timeout_s=timeout_s)
    except Exception as error:
        # Shutdown's boundary: whatever failed here, the shutdown that follows is safe.
        log.warning("drain_incomplete", deployment=deployment, error=str(error))


def stop_service() -> None:
    """End the application, and the cluster where this process started it; drain first."""
    if os.environ.get("RAY_ADDRESS"):
        serve.shutdown()
    # A cluster of our own goes as a whole: after the drain no replica has anything to finish.
    ray.shutdown()


def drain_on_exit(settings: Settings) -> None:
    """Make a foreign main program (`serve run`) drain before it shuts Serve down.

    SIGINT: drained here, then raised as KeyboardInterrupt, on which `serve run` shuts down.
    SIGTERM: Ray's handler exits the interpreter; our exit function runs before Ray's own.
    Does nothing where Ray already runs: that is a worker building the app for `serve deploy`.
    """
    if ray.is_initialized() or threading.current_thread() is not threading.main_thread():
        return
    is_drained = threading.Event()

    def drain_once() -> None:
        if not is_drained.is_set() and ray.is_initialized():
            is_drained.set()
            drain_service(settings)

    def on_interrupt(signum: int, frame: FrameType | None) -> None:
        del signum, frame
        drain_once()
        raise KeyboardInterrupt

    def on_exit() -> None:
        # On SIGTERM Ray's handler sets an alarm that would abort this process in three seconds.
        signal.alarm(0)
        drain_once()

    atexit.register(on_exit)
    signal.signal(signal.SIGINT, on_interrupt)
