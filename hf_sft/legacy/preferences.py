"""Keys of preference learning: TRL's DPO, ORPO and CPO trainers, LLaMA-Factory and Firefly."""

from __future__ import annotations

from typing import Any

from hf_sft.legacy.rules import DROP, NONE, Old, Only, Several, is_none, when

_DIVERGENCE = "the reference is compared by reverse KL alone; leave it out"
_PROMPT = "max_prompt_length keeps the end of a prompt"
_LOSSES = {"dpo": "sigmoid", "cdpo": "sigmoid"}
_REFERENCE_ADAPTER = "merge the reference's adapter (hf-sft merge), and name the result in reference_model_name_or_path"


def _loss(value: Any) -> Any:
    """TRL lists several losses; one of them is a loss here."""
    if isinstance(value, list):
        if len(value) != 1:
            raise ValueError(
                "one loss is learned: name one in dpo_loss_type (dpo_sft_weight adds that of the chosen answers)"
            )
        value = value[0]
    if value == "sigmoid_norm":
        return Several({"dpo_loss_type": "sigmoid", "dpo_length_normalized": True})
    return _LOSSES.get(str(value).lower(), value)


def _reference(value: Any) -> Any:
    if is_none(value):
        return DROP
    return Several({"dpo_reference": "model", "reference_model_name_or_path": value})


def _weight(value: Any) -> Any:
    return DROP if value is None or is_none(value) else value


PREFERENCES: dict[str, Old] = {
    **dict.fromkeys(("beta", "pref_beta", "orpo_beta"), Old("dpo_beta")),
    **dict.fromkeys(
        ("loss_type", "pref_loss", "dpo_loss"),
        Old("dpo_loss_type", _loss, doc="sigmoid, ipo, hinge, robust, orpo or simpo", also=("dpo_length_normalized",)),
    ),
    **dict.fromkeys(
        ("pref_ftx", "dpo_ftx", "rpo_alpha", "cpo_alpha"), Old("dpo_sft_weight", _weight, doc="0 leaves the term out")
    ),
    "dpo_label_smoothing": Old("label_smoothing"),
    "ref_model": Old("reference_model_name_or_path", _reference, also=("dpo_reference",)),
    "precompute_ref_log_probs": Old("dpo_reference", when("precomputed")),
    **dict.fromkeys(
        ("ref_model_adapters", "ref_adapter_name", "model_adapter_name", "ref_model_quantization_bit"),
        Old(None, Only(NONE, _REFERENCE_ADAPTER)),
    ),
    "reference_free": Old(None, Only(NONE, "losses without a reference are simpo and orpo: set dpo_loss_type")),
    **dict.fromkeys(
        ("sync_ref_model", "use_weighting", "ld_alpha", "pref_bco_weight", "discopop_tau"),
        Old(None, Only((*NONE, "0.0", "0.05"), "this variant of the loss is not available; leave it out")),
    ),
    "f_divergence_type": Old(None, Only((*NONE, "reverse_kl"), _DIVERGENCE)),
    "ref_model_mixup_alpha": Old(None, note="the reference never moves"),
    "ref_model_sync_steps": Old(None, note="the reference never moves"),
    **dict.fromkeys(("max_completion_length", "max_target_length"), Old("max_answer_length")),
    "truncation_mode": Old(None, Only(("keep_end", "none", "null"), f"{_PROMPT}; leave it out"), _PROMPT),
    "generate_during_eval": Old(None, Only(NONE, "an evaluation writes no answers: use hf-sft generate afterwards")),
    "label_pad_token_id": Old(None, Only(("-100", "none", "null"), "what is not learned is -100; leave it out")),
    "padding_value": Old(None, note="padding is never scored"),
    "is_encoder_decoder": Old(None, Only(NONE, "causal language models alone are trained")),
    "kto_chosen_weight": Old(None, Only((*NONE, "1", "1.0"), "kto is not available")),
    "kto_rejected_weight": Old(None, Only((*NONE, "1", "1.0"), "kto is not available")),
}
