"""`VllmEngine`: the policy, and the expert beside it, in stock vLLM (docs/vllm.md).

`rows` and `draws` hold what is sampled; `samplers`, `worker` and `draft_length` put it into vLLM
and alone touch its internals; `cores` starts vLLM; `samples` and `engine` turn its steps into
rollouts. Importing `mentor_serve.engines` does not import vLLM.
"""
