"""One file a benchmark; each prints JSON with `--json` and compares within one run.

`mixed_rollouts` (sampling from pi_mix: the engine against the obvious samplers), `policy_rollouts`
(the policy alone, against transformers), `long_responses` (cost against length).
"""
