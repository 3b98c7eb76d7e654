"""A lean forward pass over key-value slots for models of the Llama family.

It computes what the Hugging Face forward computes, from the same parameters, with a third of the
operations: fused projections, one rotation for queries and keys, keys and values in one tensor, no
padding outside attention, logits of the wanted tokens only. Nothing in it waits for the device.
Weights may change in place at any time; parameters that are replaced or moved are refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mentor_serve.engines.slots.flat_pass import FlatPass, PassBuilder
from mentor_serve.engines.slots.fused_weights import LayerWeights, layer_linears
from mentor_serve.engines.slots.kv_cache import SlotStorage
from mentor_serve.engines.slots.read_plan import Ragged
from mentor_serve.errors import EngineError

_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Those whose angles do not depend on the length of the sequence."""
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MIN_MATMUL_ROWS = 16
_MAX_MATMUL_QUERIES = 8


class FusedForward:
    """Passes of a supported model over a `SlotStorage`; fuses the model's weights in place.

    Raises:
        EngineError: the model is not supported; ask `supports` first.
    """

    max_padding = 2048
    """Padding that one pass may hold before splitting it pays: only attention computes it."""

    def __init__(
        self, model: Any, storage: SlotStorage, *, max_slots: int, max_tokens: int
    ) -> None:
        reason = self.supports(model)
        if reason is not None:
            raise EngineError(f"fused forward: {reason}; use the model's own forward")
        config, base = model.config, model.model
        weight = base.embed_tokens.weight
        self._storage = storage
        self._layers = [LayerWeights.of(layer) for layer in base.layers]
        self._embedding = weight.detach()
        self._norm = base.norm.weight.detach()
        self._head = model.lm_head.weight.detach()
        self._head_bias = None if model.lm_head.bias is None else model.lm_head.bias.detach()
        self._anchors = [
            (module, module.weight.data_ptr())
            for module in (base.embed_tokens, base.layers[-1].self_attn.k_proj)
        ]
        self._eps = float(config.rms_norm_eps)
        self._heads = int(config.num_attention_heads)
        self._kv_heads = int(config.num_key_value_heads)
        self._dim = int(base.layers[0].self_attn.head_dim)
        self._rotations = _rotations(base.rotary_emb, weight, max_tokens)
        self._builder = PassBuilder(
            max_slots=max_slots, max_tokens=max_tokens, dtype=weight.dtype, device=weight.device
        )
        self._mean: Tensor | None = None
        self._eps_row = torch.full((1,), self._eps)
        if weight.device.type == "cpu" and weight.dtype == torch.float32:
            self._mean = torch.full((weight.shape[1], 1), 1.0 / weight.shape[1])
        self._prefers_matmul = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
        for _ in self._layers:
            # Keys in the first half of the heads, values in the second.
            storage.add(
                heads=2 * self._kv_heads, dim=self._dim, dtype=weight.dtype, device=weight.device
            )

    @staticmethod
    def supports(model: Any) -> str | None:
        """None if this forward can stand in for the model's own, else the reason why not."""
        name, config = type(model).__name__, model.config
        if name not in _ARCHITECTURES:
            return f"{name} is none of {', '.join(_ARCHITECTURES)}"
        if config.hidden_act != "silu":
            return f"activation {config.hidden_act} is not silu"
        rotary, attention = model.model.rotary_emb, model.model.layers[0].self_attn
        if rotary.rope_type not in _ROPE_TYPES:
            return f"rope type {rotary.rope_type} depends on the sequence length"
        if 2 * rotary.inv_freq.shape[-1] != attention.head_dim:
            return "rope rotates a part of each head"
        return _unusual_modules(model)

    def max_cells(self, length: int) -> int:
        """Padded tokens that one pass may hold over a history of `length` tokens."""
        group = self._heads // self._kv_heads
        return max(16, min(8192, 2**25 // (group * length)))

    def decode(self, token_ids: Tensor, positions: Tensor, *, length: int) -> Tensor:
        """Read [n] tokens at [n] positions of slots 0 .. n-1 -> float32 logits [n, V].

        `length` is the longest history, the new token included.
        """
        return self._forward(self._builder.decode(token_ids, positions, length=length))

    def read(self, ragged: Ragged) -> Tensor:
        """Read one pass -> float32 logits of the wanted tokens [m, V]."""
        return self._forward(self._builder.read(ragged))

    def _forward(self, flat: FlatPass) -> Tensor:
        self._check_anchors()
        self._storage.grow(flat.num_slots, flat.length)
        hidden = functional.embedding(flat.token_ids, self._embedding)
        cos, sin = self._rotations.index_select(0, flat.positions).unbind(1)
        mask = self._group_mask(flat)
        last = len(self._layers) - 1
        for index, layer in enumerate(self._layers):
            mixed = self._project(layer, hidden, cos, sin)
            # The view is [slots, tokens, heads, dim]: its first two indices name a token.
            self._storage.tensors[index].transpose(1, 2).index_put_(
                (flat.slots, flat.positions), mixed[:, self._heads :]
            )
            if index == last and flat.wanted is not None:
                if not len(flat.wanted):
                    return hidden.new_empty((0, self._head.shape[0]), dtype=torch.float32)
                attended = self._attend(flat, index, mixed, mask)[flat.wanted]
                hidden = hidden[flat.wanted]
            else:
                attended = self._attend(flat, index, mixed, mask)
            hidden = self._finish(layer, hidden, attended)
        return functional.linear(
            self._normed(hidden, self._norm), self._head, self._head_bias
        ).float()

    def _project(self, layer: LayerWeights, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[M, hidden] -> [M, heads + 2 kv_heads, dim]: rotated queries and keys, values."""
        heads, rotated = self._heads, self._heads + self._kv_heads
        mixed = functional.linear(
            self._normed(hidden, layer.attention_norm), layer.qkv, layer.qkv_bias
        )
        mixed = mixed.view(-1, rotated + self._kv_heads, self._dim)
        if layer.query_norm is not None and layer.key_norm is not None:
            mixed[:, :heads] = self._normed(mixed[:, :heads], layer.query_norm)
            mixed[:, heads:rotated] = self._normed(mixed[:, heads:rotated], layer.key_norm)
        both = mixed[:, :rotated]
        swapped = both.roll(self._dim // 2, -1)
        both.mul_(cos).addcmul_(swapped, sin)
        return mixed

    def _attend(self, flat: FlatPass, index: int, mixed: Tensor, mask: Tensor) -> Tensor:
        """Attention of the new tokens over their slots: [M, heads dim]."""
        keys, values = self._history(flat, index)
        rows, width, kv_heads, dim = flat.num_rows, flat.width, self._kv_heads, self._dim
        queries = mixed[:, : self._heads]
        if flat.padded is not None:
            queries = queries[flat.padded]
        if width == 1:
            queries = queries.view(rows, kv_heads, -1, dim)
        else:
            queries = queries.reshape(rows, width, kv_heads, -1, dim).permute(0, 2, 3, 1, 4)
            queries = queries.reshape(rows, kv_heads, -1, dim)
        attended = self._attention(queries, keys, values, mask)
        if width > 1:
            attended = attended.view(rows, kv_heads, -1, width, dim).permute(0, 3, 1, 2, 4)
        attended = attended.reshape(rows * width, -1)
        return attended if flat.unpadded is None else attended[flat.unpadded]

    def _attention(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """[R, K, Q, dim] over [R, K, L, dim] -> [R, K, Q, dim]."""
        rows, kv_heads, num_queries, dim = queries.shape
        if (
            self._prefers_matmul
            and rows * kv_heads >= _MIN_MATMUL_ROWS
            and num_queries <= _MAX_MATMUL_QUERIES
        ):
            # PyTorch's bfloat16 attention on a CPU is slow for many rows of few queries.
            scores = torch.matmul(keys, (queries * dim**-0.5).transpose(2, 3)).transpose(2, 3)
            return torch.matmul(torch.softmax(scores + mask, -1), values)
        return functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)

    def _finish(self, layer: LayerWeights, hidden: Tensor, attended: Tensor) -> Tensor:
        """The rest of a layer, added into `hidden` [M, hidden] in place."""
        hidden.addmm_(attended, layer.out_transposed)
        if layer.out_bias is not None:
            hidden.add_(layer.out_bias)
        normed = self._normed(hidden, layer.mlp_norm)
        gate, up = functional.linear(normed, layer.gate_up, layer.gate_up_bias).chunk(2, -1)
        hidden.addmm_(functional.silu(gate).mul_(up), layer.down_transposed)
        if layer.down_bias is not None:
            hidden.add_(layer.down_bias)
        return hidden

    def _history(self, flat: FlatPass, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values [R, K, L, dim] that a layer's attention looks at."""
        if flat.gathered is not None:
            history = self._storage.tensors[index][:, :, : flat.length].index_select(
                0, flat.gathered
            )
            return history[:, : self._kv_heads], history[:, self._kv_heads :]
        return self._storage.halves(
            index, first_slot=flat.first_slot, num_slots=flat.num_rows, num_tokens=flat.length
        )

    def _group_mask(self, flat: FlatPass) -> Tensor:
        """[R, 1, W, L] -> [R, 1, Q, L]: queries of one key head are stacked, group by group."""
        group = self._heads // self._kv_heads
        if flat.width == 1 or group == 1:
            return flat.mask
        return flat.mask.repeat(1, 1, group, 1)

    def _normed(self, hidden: Tensor, weight: Tensor) -> Tensor:
        if self._mean is not None and hidden.ndim == 2:
            # Half the time of rms_norm on a CPU: the mean of squares is a product with a vector.
            scale = torch.addmm(self._eps_row, hidden * hidden, self._mean).rsqrt_()
            return (hidden * scale).mul_(weight)
        return functional.rms_norm(hidden, weight.shape, weight, self._eps)

    def _check_anchors(self) -> None:
        if any(module.weight.data_ptr() != address for module, address in self._anchors):
            raise EngineError(
                "expected the model's parameters where they were when the engine was built, got "
                "them moved or replaced; write new weights in place, or build a new engine"
            )


def _rotations(rotary: Any, like: Tensor, max_tokens: int) -> Tensor:
    """[max_tokens, 2, 1, dim]: cosines, and sines signed for `roll` in place of `rotate_half`."""
    positions = torch.arange(max_tokens, device=like.device).unsqueeze(0)
    with torch.no_grad():
        cos, sin = (table[0] for table in rotary(like, positions))
    half = sin.shape[-1] // 2
    return torch.stack([cos, torch.cat([-sin[:, :half], sin[:, half:]], -1)], 1).unsqueeze(2)


def _unusual_modules(model: Any) -> str | None:
    """What about the modules keeps them from being fused, if anything."""
    linears = [module for layer in model.model.layers for module in layer_linears(layer)]
    for module in (*linears, model.lm_head):
        if type(module) is not nn.Linear:
            return f"a projection is {type(module).__name__}, not a plain linear layer"
    weights = [module.weight for module in linears]
    if len({id(weight) for weight in weights}) < len(weights):
        return "layers share weights"
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return "a module has forward hooks, which would not be called"
    kinds = {(parameter.dtype, parameter.device) for parameter in model.parameters()}
    if len(kinds) > 1 or next(iter(kinds))[0] not in _DTYPES:
        return f"parameters are of several or unusual kinds: {sorted(map(str, kinds))}"
    return None
