"""The paper as pure functions on tensors: no I/O, no models, no global state, torch only.

Refuses to know about requests, storage or processes. Equation numbers are those of "Selective
Expert Guidance for Effective and Diverse Exploration in Reinforcement Learning of LLMs"
(arXiv 2510.04140).
"""
