"""What GGUF files call tensors, beside the names of Hugging Face's tables."""

from __future__ import annotations

import re

from checkpoints.hf_table import Slot

__all__ = ["LONG_FACTORS", "ROPE_FACTORS", "SHORT_FACTORS", "gguf_name"]

# The factors of RoPE's frequencies, and those of LongRoPE; see `ropes`.
ROPE_FACTORS = "rope_freqs.weight"
SHORT_FACTORS, LONG_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"

_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}

# By what follows the number of the layer.
_INNER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",  # of Phi 3: gate and up in one
    "mlp.down_proj": "ffn_down",
}

# Of one name Hugging Face makes two uses, so that these go by our array.
_NORMS = {
    "layers.attn_norm": "attn_norm",
    "layers.mlp_norm": "ffn_norm",
    "layers.attn_post_norm": "post_attention_norm",
    "layers.mlp_post_norm": "post_ffw_norm",
}


def gguf_name(slot: Slot) -> str:
    """What GGUF calls the tensor of a place."""
    if (outer := _OUTER.get(slot.theirs)) is not None:
        return outer
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", slot.theirs)
    assert found, f"A tensor of no layer: {slot.theirs}."
    layer, inner, kind = found.groups()
    return f"blk.{layer}.{_NORMS.get(slot.ours) or _INNER[inner]}.{kind}"
