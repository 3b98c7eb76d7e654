"""How good a model is: pass@k, avg@k, intervals, word shares. See docs/evaluation.md."""

from mentor_serve.evaluation.measures import GREEDY_PREFIX, WORD_PREFIX, Measure
from mentor_serve.evaluation.passk import pass_at_k
from mentor_serve.evaluation.plan import EvaluationPlan, SuiteReport, run_plan
from mentor_serve.evaluation.suite import EvaluationReport, evaluate
from mentor_serve.evaluation.words import FIGURE_3_WORDS, word_shares

__all__ = [
    "FIGURE_3_WORDS",
    "GREEDY_PREFIX",
    "WORD_PREFIX",
    "EvaluationPlan",
    "EvaluationReport",
    "Measure",
    "SuiteReport",
    "evaluate",
    "pass_at_k",
    "run_plan",
    "word_shares",
]
