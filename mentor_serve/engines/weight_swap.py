"""Replacing a model's weights in place, all or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mentor_serve.errors import WeightsError


def check_weights(model: Any, state_dict: Mapping[str, Tensor]) -> None:
    """Return if `state_dict` holds every weight of the model, in its shape, and nothing else.

    Of weights that the model ties together (usually lm_head and the embedding) one is enough; if
    both are given they must agree.

    Raises:
        WeightsError: naming the first weight that is missing, unknown, misshapen or at odds.
    """
    own = model.state_dict(keep_vars=True)
    for name in state_dict:
        if name not in own:
            raise WeightsError(
                f"weight {name!r}: the policy has none of that name; expected names such as "
                f"{next(iter(own))!r} (the old weights stay)"
            )
    for names in _tied_groups(own):
        given = [name for name in names if name in state_dict]
        if not given:
            raise WeightsError(f"weight {names[0]!r} is missing (the old weights stay)")
        for name in given:
            expected, got = tuple(own[name].shape), tuple(state_dict[name].shape)
            if expected != got:
                raise WeightsError(
                    f"weight {name!r}: expected shape {expected}, got {got} (the old weights stay)"
                )
        first = state_dict[given[0]]
        for name in given[1:]:
            other = state_dict[name]
            if other.data_ptr() != first.data_ptr() and not torch.equal(other, first):
                raise WeightsError(
                    f"weights {given[0]!r} and {name!r} are one tensor in the policy, but their "
                    "new values differ (the old weights stay)"
                )


def copy_weights(model: Any, state_dict: Mapping[str, Tensor]) -> None:
    """Copy checked weights into the model's own tensors (dtype and device are the model's)."""
    own = model.state_dict()
    with torch.no_grad():
        for name, value in state_dict.items():
            own[name].copy_(value)


def _tied_groups(own: Mapping[str, Tensor]) -> list[list[str]]:
    groups: dict[tuple[int, torch.Size], list[str]] = {}
    for name, value in own.items():
        has_memory = value.numel() > 0 and not value.is_meta
        key = (value.data_ptr() if has_memory else id(value), value.shape)
        groups.setdefault(key, []).append(name)
    return list(groups.values())
