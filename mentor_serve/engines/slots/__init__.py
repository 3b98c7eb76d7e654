"""Models whose sequences live in key-value slots: the forward passes and their memory.

`slot_model.SlotModel` is what engines use. Beneath it: `fused` (models of the Llama family) or
`padded` (any other), which `probe` chooses between; `flat_pass` and `read_plan` lay out ragged
reads; `kv_cache` holds the keys and values.
"""
