"""What a field of config.json does in each family: data for `hf_fields`.

Decided by what transformers reads (`TRANSFORMERS`): `configuration_*.py` and `modeling_*.py` of
the families, and what these share (`configuration_utils.py`, `modeling_utils.py`,
`modeling_rope_utils.py`, `masking_utils.py`, `cache_utils.py`). Fields that other models know, or
that models with code of their own have, are judged by their meaning there.

A field is understood, harmless, guarded, or else unknown:

- understood: it becomes a part of our configuration, or its value is refused;
- harmless: whatever it says, logits of trained weights are the same;
- guarded: it changes them, unless it has one of a few values;
- unknown: nothing is known to read it.
"""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple

from checkpoints.hf_families import FAMILIES, NUMBERS

__all__ = [
    "GUARDS",
    "HARMLESS",
    "HARMLESS_PATTERNS",
    "TRANSFORMERS",
    "Guard",
    "guards",
    "is_harmless",
    "understood",
]

TRANSFORMERS = "5.24.0"

# By the reason: what such fields are about.
HARMLESS: dict[str, frozenset[str]] = {
    reason: frozenset(names.split())
    for reason, names in {
        "names, versions, where a file comes from": """
            _commit_hash _from_model_config _model_name_or_path _name_or_path
            base_model_name_or_path finetuning_task is_llama_config language license model_name
            model_name_or_path name_or_path tokenizer_class tokenizer_name transformers.js_config
            transformers_version unsloth_fixed
        """,
        "tokens and labels": """
            begin_suppress_tokens bos_token_id decoder_start_token_id id2label label2id
            num_labels pad_token_id prefix problem_type sep_token_id task_specific_params
            unk_token_id
        """,
        "how texts are generated": """
            assistant_confidence_threshold assistant_early_exit assistant_lookbehind bad_words_ids
            cache_config cache_implementation compile_config diversity_penalty do_sample
            early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff
            eta_cutoff exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id
            generation_config guidance_scale length_penalty max_length max_matching_ngram_size
            max_new_tokens max_time min_length min_new_tokens min_p no_repeat_ngram_size
            num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams
            num_return_sequences output_logits output_scores penalty_alpha prefill_chunk_size
            prompt_lookup_num_tokens remove_invalid_values renormalize_logits repetition_penalty
            return_dict_in_generate sequence_bias stop_strings suppress_tokens target_lookbehind
            temperature top_h top_k top_p typical_p use_cache
        """,
        "lengths that are advice, as max_position_embeddings is the model's": """
            max_context_length max_seq_len max_seq_length max_sequence_length model_max_length
            n_ctx seq_length
        """,
        "training": """
            freeze_backbone gradient_checkpointing ignore_index init_method init_std
            initializer_factor initializer_range label_smoothing layerdrop loss_type
            neftune_noise_alpha output_router_logits router_aux_loss_coef router_z_loss_coef
            use_liger_kernel z_loss_coefficient
        """,
        "the order and the precision in which the same is computed": """
            _attn_implementation _attn_implementation_autoset _attn_implementation_internal
            _experts_implementation _experts_implementation_internal _flash_attn_2_enabled
            _flash_attn_implementation attn_impl attn_implementation chunk_size_feed_forward
            distributed_config dtype experts_implementation flash_attention fusion_config
            pretraining_tp torch_dtype torchscript use_bfloat16 use_flash_attention
            use_flash_attention_2 use_flash_attn use_sdpa
        """,
        "what a call returns": """
            keys_to_ignore_at_inference num_logits_to_keep output_attentions output_hidden_states
            return_dict tf_legacy_loss tie_last_hidden_states
        """,
        "encoders, which these models have not": "is_decoder tie_encoder_decoder",
        "code of the model's own, which transformers leaves out where it has the model": "auto_map",
        "details of experts, of which there are none": """
            decoder_sparse_step expert_interval moe_intermediate_size norm_topk_prob
            num_experts_per_tok num_experts_per_token shared_expert_intermediate_size
        """,
        "details of a window that the family finds otherwise": """
            _sliding_window_pattern max_window_layers sliding_window_pattern use_sliding_window
        """,
    }.items()
}

# With "*" for any text.
HARMLESS_PATTERNS = {
    "dropout, which is training's": (
        "*pdrop",
        "*dropout",
        "*dropout_prob",
        "*dropout_p",
        "*dropout_rate",
    ),
    "marks of the tool that tuned a model": ("unsloth_*", "_unsloth_*"),
}

_PATTERNS = re.compile(
    "|".join(
        re.escape(pattern).replace(r"\*", ".*")
        for patterns in HARMLESS_PATTERNS.values()
        for pattern in patterns
    )
)

# What a family does not read, though the name says something: transformers gives Qwen 2 its
# biases whatever attention_bias says.
_HARMLESS_IN = {"qwen2": frozenset({"attention_bias"})}

_HARMLESS = frozenset().union(*HARMLESS.values())


class Guard(NamedTuple):
    """A field that changes what a model computes, unless it has one of a few values.

    Attributes:
        harmless: those values; the first is named as supported.
        why: what another value asks for.
    """

    harmless: tuple[Any, ...]
    why: str

    def allows(self, value: Any) -> bool:
        """Whether it is one of the harmless values; 1 is 1.0, and not true."""
        return any(
            value == one and isinstance(value, bool) == isinstance(one, bool)
            for one in self.harmless
        )


_OFF = (False, None, 0)
_NONE = (None,)
_EMPTY = (None, [], {})


def _guards(harmless: tuple[Any, ...], why: str, names: str) -> dict[str, Guard]:
    return dict.fromkeys(names.split(), Guard(harmless, why))


GUARDS: dict[str, Guard] = {
    # transformers takes whatever is no truth, null too, for attention in both directions.
    **_guards((True,), "attention that sees later tokens", "is_causal causal"),
    **_guards(
        _OFF,
        "attention that sees later tokens",
        "bidirectional is_bidirectional is_prefix_lm prefix_lm use_bidirectional_attention",
    ),
    **_guards(
        _OFF,
        "an encoder, or attention to one",
        "add_cross_attention cross_attention_hidden_size is_encoder_decoder",
    ),
    **_guards(
        _NONE,
        "the fields of another model",
        "decoder encoder generator text_config text_encoder",
    ),
    **_guards(
        _NONE,
        "quantized weights",
        "compression_config quant_config quant_method quantization quantization_config",
    ),
    **_guards(
        _NONE,
        "an adapter's weights beside the model's",
        "adapter_config lora_config peft_config",
    ),
    **_guards(
        (None, "model.safetensors", "model.safetensors.index.json"),
        "weights in a file of another name",
        "transformers_weights",
    ),
    **_guards(_EMPTY, "heads that are missing", "pruned_heads"),
    **_guards(_EMPTY, "layers of other sizes", "block_configs per_layer_config"),
    **_guards(
        _OFF,
        "experts instead of one feed-forward layer",
        "first_k_dense_replace is_moe moe moe_layer_freq moe_num_experts n_routed_experts "
        "n_shared_experts num_experts num_local_experts num_shared_experts use_moe",
    ),
    **_guards(_EMPTY, "experts instead of one feed-forward layer", "mlp_only_layers moe_layers"),
    **_guards(_OFF, "positions by biases of attention", "alibi use_alibi"),
    **_guards((True, None), "attention that knows no positions", "use_rope use_rotary"),
    **_guards(_EMPTY, "layers that know no positions", "no_rope_layers nope_layers"),
    **_guards(_OFF, "layers that know no positions", "no_rope_layer_interval nope_layer_interval"),
    **_guards(
        ("rope", "rotary", None),
        "positions of another kind",
        "pos_emb position_embedding_type position_encoding_type",
    ),
    **_guards(_OFF, "rotary pairs of neighbours instead of halves", "rope_interleaved"),
    **_guards(
        (1.0, None),
        "rotation of a part of each head",
        "partial_rotary_factor rope_pct rotary_pct rotary_percent",
    ),
    **_guards(_NONE, "a base of rotation under another name", "rope_base rotary_emb_base"),
    **_guards(_NONE, "a base of rotation of local layers", "rope_local_base_freq"),
    **_guards(_NONE, "attention within a window", "local_attention_window sliding_window"),
    **_guards((1, None), "attention within a window in some layers", "full_attn_mod"),
    **_guards((1, None), "other rotary frequencies", "interpolate_factor"),
    **_guards(_NONE, "attention within chunks", "attention_chunk_size"),
    **_guards(_OFF, "queries that grow with the position", "attn_temperature_tuning"),
    **_guards(_EMPTY, "layers that share keys and values", "kv_sharing_modes"),
    **_guards(_OFF, "layers that share keys and values", "num_kv_shared_layers"),
    **_guards(_OFF, "keys and values of low rank", "kv_lora_rank q_lora_rank use_mla"),
    **_guards(
        _OFF, "sinks of attention", "attention_sink attention_sinks sinks use_attention_sinks"
    ),
    **_guards(_OFF, "gates of attention", "attn_output_gate use_gated_attention"),
    **_guards(
        _OFF,
        "biases",
        "add_bias_linear add_qkv_bias attention_bias attention_out_bias attention_qkv_bias bias "
        "lm_head_bias mlp_bias norm_bias qkv_bias use_bias use_qkv_bias",
    ),
    **_guards(
        _OFF,
        "attention and feed-forward layer side by side",
        "new_decoder_architecture parallel_attn parallel_residual use_parallel_residual",
    ),
    **_guards(_OFF, "one head of keys and values for all", "multi_query"),
    **_guards(
        _OFF,
        "norms in other places",
        "apply_residual_connection_post_layernorm post_norm qk_layernorm qk_norm sandwich_norm "
        "use_post_norm use_qk_norm",
    ),
    **_guards(
        ("rmsnorm", "rms_norm", "RMSNorm", "rms", None),
        "norms of another kind",
        "layer_norm_type layernorm_type norm_type normalization normalization_type",
    ),
    **_guards(_NONE, "a soft cap of attention", "attn_logit_softcapping attn_softcap"),
    **_guards(
        _NONE, "a soft cap of logits", "final_logit_softcapping logit_softcap logit_softcapping"
    ),
    **_guards(_NONE, "another scale of attention", "attention_multiplier query_pre_attn_scalar"),
    **_guards(
        (1.0, None), "another scale of embeddings", "embedding_multiplier embedding_scale scale_emb"
    ),
    **_guards((1.0, None), "another scale of logits", "logit_scale logits_scaling"),
    **_guards(_NONE, "another scale of logits", "dim_model_base"),
    **_guards((1.0, None), "another scale of layers' outputs", "residual_multiplier"),
    **_guards(_NONE, "another scale of layers' outputs", "scale_depth"),
    **_guards(_NONE, "another activation", "hidden_activation"),
}


@functools.cache
def understood(family: str) -> frozenset[str]:
    """The fields that become a part of our configuration in a family."""
    this = FAMILIES[family]
    names = {
        "architectures",
        "model_type",
        "eos_token_id",
        "num_key_value_heads",
        "head_dim",
        "tie_word_embeddings",
        "layer_types",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "hidden_act",
        this.activation,
        *(number.theirs for number in (*NUMBERS, *this.numbers)),
        *{
            "never": (),
            "always": ("sliding_window",),
            "from": ("sliding_window", "use_sliding_window", "max_window_layers"),
            "pattern": ("sliding_window", "sliding_window_pattern", "_sliding_window_pattern"),
            "unrotated": ("sliding_window", "use_sliding_window"),
        }[this.windows],
    }
    if this.local_rope == "own":
        names.add("rope_local_base_freq")
    if not this.local_rope:
        names.add("original_max_position_embeddings")
    if this.partial_rope:
        names.add("partial_rotary_factor")
    if this.says_biases:
        names |= {"attention_bias", "mlp_bias"}
    if this.names_unrotated:
        names |= {"no_rope_layers", "no_rope_layer_interval"}
    return frozenset(names)


@functools.cache
def guards(family: str) -> dict[str, Guard]:
    """The guarded fields of a family, by name."""
    free = understood(family) | _HARMLESS_IN.get(family, frozenset())
    return {name: guard for name, guard in GUARDS.items() if name not in free}


def is_harmless(name: str, family: str) -> bool:
    """Whether a field changes no logit of a family, whatever it says."""
    known = name in _HARMLESS or name in _HARMLESS_IN.get(family, ())
    return (known or bool(_PATTERNS.fullmatch(name))) and name not in understood(family)
