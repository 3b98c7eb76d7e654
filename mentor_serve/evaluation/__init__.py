"""How good a model is: pass@k, avg@k, and which words its reasoning uses."""

from mentor_serve.evaluation.passk import pass_at_k
from mentor_serve.evaluation.suite import EvaluationReport, evaluate
from mentor_serve.evaluation.words import FIGURE_3_WORDS, word_shares

__all__ = ["FIGURE_3_WORDS", "EvaluationReport", "evaluate", "pass_at_k", "word_shares"]
