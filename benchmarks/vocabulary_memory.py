"""Peak memory of one update of ours against the size of the vocabulary.

One random Llama, the same in everything but its vocabulary, makes one step on the same lengths in a
process of its own. What must grow with the vocabulary is taken off: parameters and AdamW's moments
exist before the step and are not counted, the step itself allocates gradients as large as the
parameters. The rest (`beyond_bytes`) is activations, logits and temporaries; its ratio to that of
the smallest vocabulary says how well the logits are bounded.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.machine import Machine, report_progress
from benchmarks.memory import peak_growth
from benchmarks.pairs import num_parameters
from benchmarks.update_batches import BatchShape, random_batch
from benchmarks.updates import our_step

VOCABULARIES = (32, 1_024, 32_768, 150_000)
_SHAPE = BatchShape(num_groups=1)
_MAX_TOKENS = 4096
_FLOAT_BYTES = 4
_MEBIBYTE = 2**20


def vocabulary_model(vocab_size: int, *, device: str = "cpu") -> Any:
    """A random float32 Llama with a tied head and 1.3 million parameters beside its table."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(device).eval()


def peak_beyond_gradients(vocab_size: int, *, device: str, max_tokens: int = _MAX_TOKENS) -> int:
    """Bytes at the peak of a step beyond parameters, moments and gradients."""
    model = vocabulary_model(vocab_size, device=device)
    make_step = our_step(model, max_tokens=max_tokens)
    make_step(random_batch(model, BatchShape(num_groups=1, longest=16)))
    batch = random_batch(model, _SHAPE)
    gradients = num_parameters(model) * _FLOAT_BYTES
    return peak_growth(lambda: make_step(batch), device=device) - gradients


def measure_vocabularies(machine: Machine) -> dict[str, Any]:
    """Every vocabulary in a process of its own, as JSON."""
    beyond = {}
    for vocab_size in VOCABULARIES:
        report_progress(f"memory with a vocabulary of {vocab_size}")
        command = [sys.executable, "-m", "benchmarks.vocabulary_memory", str(vocab_size)]
        command += [machine.device, str(machine.threads)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        beyond[vocab_size] = int(done.stdout)
    smallest = beyond[VOCABULARIES[0]]
    return {
        "micro_batch_tokens": _MAX_TOKENS,
        "beyond_mib": {str(size): round(value / _MEBIBYTE, 1) for size, value in beyond.items()},
        "ratio_to_smallest": {
            str(size): round(value / smallest, 3) for size, value in beyond.items()
        },
    }


def main() -> None:
    """One vocabulary, for `measure_vocabularies`: prints bytes."""
    vocab_size, device, threads = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(threads)
    print(peak_beyond_gradients(vocab_size, device=device))


if __name__ == "__main__":
    main()
