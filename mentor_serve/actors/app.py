"""Builds the Serve application `mentor` from settings: which deployments, wired how."""

from __future__ import annotations

from typing import Any

from ray import serve

from mentor_serve.actors.collector import collector_deployment
from mentor_serve.actors.expert import expert_deployment
from mentor_serve.actors.gateway import gateway_deployment
from mentor_serve.actors.policy import policy_deployment
from mentor_serve.actors.runtime import open_run, open_store, prepare_state
from mentor_serve.actors.workload import task_source
from mentor_serve.models.loading import load_logits_width, load_tokenizer
from mentor_serve.models.vocabulary import check_models_share_vocabulary
from mentor_serve.settings import Settings


def check_settings(settings: Settings) -> None:
    """Find what can be found wrong before any process starts.

    Raises:
        ConfigError: a model directory is missing, the state directory cannot be written, a task
            file is malformed.
        VocabularyMismatch: policy and expert cannot be mixed.
        SchemaOutOfDate, StoreError: the database cannot be used.
    """
    policy, expert = settings.policy.model, settings.expert.model
    if expert == "none":
        load_tokenizer(policy)
        load_logits_width(policy)
    else:
        check_models_share_vocabulary(policy, expert)
    task_source(settings)
    prepare_state(settings)


def build_application(settings: Settings) -> serve.Application:
    """The application; checks the settings first (see `check_settings` for what it raises)."""
    check_settings(settings)
    with open_store(settings) as store:
        open_run(settings, store, announce=True)
    # Replicas have other working directories: paths travel resolved.
    settings = settings.model_copy(update={"home": settings.home.resolve()})
    expert = None
    if settings.expert.model != "none" and settings.expert.placement == "remote":
        expert = expert_deployment(settings).bind(settings)
    policy = policy_deployment(settings).bind(settings, expert)
    collector = collector_deployment(settings).bind(settings, policy, expert)
    application: Any = gateway_deployment(settings).bind(settings, policy, collector, expert)
    return application
