"""Verifiers: what a response is worth. `VerifierPool` runs them in processes of their own."""

from mentor_serve.rollout.verifiers.base import Verifier, VerifierSpec, build_verifier
from mentor_serve.rollout.verifiers.format import boxed_answer, has_required_format
from mentor_serve.rollout.verifiers.pool import VerifierPool

__all__ = [
    "Verifier",
    "VerifierPool",
    "VerifierSpec",
    "boxed_answer",
    "build_verifier",
    "has_required_format",
]
