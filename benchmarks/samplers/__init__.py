"""Samplers that are compared: the engine's lazy one, and what one would write without it.

Reference samplers use the engine's own forward (`SlotModel`), softmax and draws, so that what is
compared are algorithms. They keep no records (log-probabilities, sources) that the engine keeps,
and every row gets the same number of tokens, which spares them scheduling.
"""

from benchmarks.samplers.algorithm1 import Algorithm1
from benchmarks.samplers.engine import EngineSampler
from benchmarks.samplers.floor import Floor
from benchmarks.samplers.generate import GenerateSampler
from benchmarks.samplers.naive import Naive
from benchmarks.samplers.workload import Sampler, SamplerRun, Workload

__all__ = [
    "Algorithm1",
    "EngineSampler",
    "Floor",
    "GenerateSampler",
    "Naive",
    "Sampler",
    "SamplerRun",
    "Workload",
]
