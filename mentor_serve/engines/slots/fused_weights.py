"""Weights of Llama-like layers, laid out so that one product does the work of several.

The projections to queries, keys and values lie one after the other in one tensor, and so do those
of the gate and the up-projection. No memory is added: the model's own parameters become views of
the joint tensors, stay the same objects, and are written to, saved and trained as before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One decoder layer; H heads, K of them with keys of their own."""

    attention_norm: Tensor
    """[hidden]"""
    qkv: Tensor
    """[(H + 2 K) dim, hidden]"""
    qkv_bias: Tensor | None
    """[(H + 2 K) dim]"""
    query_norm: Tensor | None
    """[dim] Norm of each query head, where the model has one."""
    key_norm: Tensor | None
    """[dim] Norm of each key head, where the model has one."""
    out_transposed: Tensor
    """[H dim, hidden] As `addmm` takes it."""
    out_bias: Tensor | None
    """[hidden]"""
    mlp_norm: Tensor
    """[hidden]"""
    gate_up: Tensor
    """[2 intermediate, hidden]"""
    gate_up_bias: Tensor | None
    """[2 intermediate]"""
    down_transposed: Tensor
    """[intermediate, hidden] As `addmm` takes it."""
    down_bias: Tensor | None
    """[hidden]"""

    @classmethod
    def of(cls, layer: Any) -> LayerWeights:
        """Fuse the weights of a decoder layer in place."""
        attention, mlp = layer.self_attn, layer.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        gates = (mlp.gate_proj, mlp.up_proj)
        query_norm = getattr(attention, "q_norm", None)
        key_norm = getattr(attention, "k_norm", None)
        return cls(
            attention_norm=layer.input_layernorm.weight.detach(),
            qkv=fuse([module.weight for module in projections]),
            qkv_bias=_fused_biases(projections),
            query_norm=None if query_norm is None else query_norm.weight.detach(),
            key_norm=None if key_norm is None else key_norm.weight.detach(),
            out_transposed=attention.o_proj.weight.detach().t(),
            out_bias=_bias(attention.o_proj),
            mlp_norm=layer.post_attention_layernorm.weight.detach(),
            gate_up=fuse([module.weight for module in gates]),
            gate_up_bias=_fused_biases(gates),
            down_transposed=mlp.down_proj.weight.detach().t(),
            down_bias=_bias(mlp.down_proj),
        )


def layer_linears(layer: Any) -> Iterator[Any]:
    """The linear modules that `LayerWeights.of` reads."""
    attention, mlp = layer.self_attn, layer.mlp
    yield from (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    yield from (mlp.gate_proj, mlp.up_proj, mlp.down_proj)


def fuse(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The parameters stacked along their first dimension, as one tensor whose views they become.

    Parameters that are stacked already are left where they are.
    """
    shape = (sum(parameter.shape[0] for parameter in parameters), *parameters[0].shape[1:])
    # Parameters stay trainable even if this runs in inference mode. Those that were made in it
    # never were, and cannot be views of tensors that were not.
    with torch.inference_mode(any(map(torch.is_inference, parameters))), torch.no_grad():
        if _are_stacked(parameters):
            first = parameters[0].detach()
            return first.as_strided(shape, first.stride(), first.storage_offset())
        joint = parameters[0].new_empty(shape)
        end = 0
        for parameter in parameters:
            begin, end = end, end + parameter.shape[0]
            joint[begin:end] = parameter
            parameter.data = joint[begin:end]
        return joint


def _are_stacked(parameters: Sequence[nn.Parameter]) -> bool:
    first = parameters[0]
    offset = first.storage_offset()
    for parameter in parameters:
        is_next = (
            parameter.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            and parameter.storage_offset() == offset
            and parameter.is_contiguous()
        )
        if not is_next:
            return False
        offset += parameter.numel()
    return True


def _fused_biases(modules: Sequence[Any]) -> Tensor | None:
    biases = [module.bias for module in modules]
    return None if biases[0] is None else fuse(biases)


def _bias(module: Any) -> Tensor | None:
    return None if module.bias is None else module.bias.detach()
