"""From tasks to scored groups in the store: sources, prompts, verifiers, the collector.

Importing this package pulls in neither torch nor ray, so that verifier processes start fast.
"""
