"""What reference samplers do with key-value slots, where row i lives in slot i at first."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.samplers.workload import Workload
from mentor_serve.engines.slots.slot_model import SlotModel


def read_prompts(model: SlotModel, workload: Workload) -> None:
    """Empty the slots, then give each row its prompt but for the last token.

    A prompt is read once, all prompts in one ragged call, and copied to its other rows. The last
    token is left for the first decode step, whose logits follow the whole prompt.
    """
    for slot in range(workload.num_rows):
        model.truncate(slot, 0)
    leaders = range(0, workload.num_rows, workload.samples_per_prompt)
    parts = [
        (slot, prompt[:-1])
        for slot, prompt in zip(leaders, workload.prompts, strict=True)
        if len(prompt) > 1
    ]
    if not parts:
        return
    slots, tokens = [slot for slot, _ in parts], [list(part) for _, part in parts]
    model.read(slots, tokens, [()] * len(parts))
    for slot, part in parts:
        others = range(slot + 1, slot + workload.samples_per_prompt)
        model.copy(slot, list(others), num_tokens=len(part))


def last_prompt_tokens(workload: Workload, *, device: torch.device) -> Tensor:
    """[n], what the first decode step reads."""
    return torch.tensor([prompt[-1] for prompt in workload.row_prompts], device=device)
