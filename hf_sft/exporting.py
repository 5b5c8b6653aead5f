"""Export for the official WeDLM engine: a folder that it loads as it is, checked after it is written.

The engine (arXiv 2512.22737) has a network of its own and takes from the folder: every tensor of ``*.safetensors``, fields of
config.json, and the tokenizer's eos, at which it stops. It reads them with transformers 4.56, to which ``wedlm`` is no known
type and a tokenizer saved by transformers 5 no known class: so the folder brings a configuration class along, and its
tokenizer_config.json names the general fast class.
"""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils.peft_utils import find_adapter_config_file

from hf_sft.arguments import ModelArguments
from hf_sft.checkpoints import CheckpointError, verify_weights
from hf_sft.data.chat import end_of_turn_id
from hf_sft.merging import load_merged, new_folder
from hf_sft.models.averages import has_average
from hf_sft.models.families import end_tokens
from hf_sft.models.inference import base_arguments, take_average
from hf_sft.models.loading import load_config, load_model, load_tokenizer
from hf_sft.models.mask_token import record_mask_token, recorded_mask_token, resolve_mask_token
from hf_sft.models.vocabulary import vocabulary_rows
from hf_sft.models.wedlm import MODEL_TYPE, WeDLMConfig, WeDLMForCausalLM

logger = logging.getLogger(__name__)

FAMILIES = ("qwen2", "qwen3", "llama", MODEL_TYPE)
# Read as they are from the source's config.
_KEPT_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "tie_word_embeddings", "attention_dropout",
    "bos_token_id", "pad_token_id",
)  # fmt: skip
_CONFIGURATION_FILE = "configuration_wedlm.py"
_CONFIGURATION = '''"""WeDLM's config where transformers does not know the type; every field stands in config.json."""

from transformers import Qwen3Config


class WeDLMConfig(Qwen3Config):
    model_type = "wedlm"
'''
# What tokenizer_config.json keeps; all else that decides about tokens stands in tokenizer.json.
_TOKENIZER_FIELDS = (
    "bos_token", "eos_token", "pad_token", "unk_token", "mask_token", "additional_special_tokens", "model_max_length",
    "clean_up_tokenization_spaces", "padding_side",
)  # fmt: skip
_PROBE_TEXT = "Question: what is 17 + 25?\n\tAnswer: 42, naturally.  Größe, 語言, 🙂"
_PROBE_CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
_ABSENT = object()  # equal to nothing that a config can hold
# Logits of a network with zero biases against those of one without: bf16 has 8 bits, the sums are the same.
_LLAMA_TOLERANCE = 1e-2


def export_wedlm(
    source: str,
    output_dir: str,
    *,
    base: str | None = None,
    mask_token_id: int | None = None,
    trust_remote_code: bool = False,
    averaged: bool = True,
) -> str:
    """Write ``source`` to ``output_dir`` as the official WeDLM engine reads it, in bfloat16; returns the folder.

    Qwen2, Qwen3 and WeDLM networks keep their tensors. Llama's has neither norms nor biases: it becomes the network with biases,
    all zero, which is the same function. The tokenizer's eos becomes the end-of-turn token of its chat template.

    Args:
        source: folder or hub name of a model, or of a LoRA adapter, which is merged into its base.
        base: folder or hub name of the adapter's base, where it is not what the adapter names.
        mask_token_id: the token at mask slots, where the model does not say.
        averaged: take the average of the weights where one lies beside them (ema.safetensors).

    Raises:
        ValueError: a network that the engine cannot run, no mask token, or an output folder that holds something.
        CheckpointError: what was written is not what was asked for; no folder is left.
    """
    with new_folder(output_dir, "an exported model") as written:
        model, tokenizer = _load_source(source, base, trust_remote_code, averaged)
        token = _mask_token(model, tokenizer, mask_token_id, source)
        _set_end_of_turn(tokenizer)
        _warn_of_added_tokens(tokenizer)
        if len(tokenizer) > vocabulary_rows(model):
            raise ValueError(
                f"the tokenizer of {source!r} has {len(tokenizer)} tokens and the model {vocabulary_rows(model)} rows: take "
                "the tokenizer that the model was trained with"
            )
        fields = engine_config(model.config, token, int(tokenizer.eos_token_id))
        ids = _probe_ids(vocabulary_rows(model), token)
        expected, llama = _logits(model, ids), model.config.model_type == "llama"
        exported = _as_wedlm(model, fields)
        exported.save_pretrained(written)
        _write_texts(written, fields, tokenizer)
        _check_tensors(written, exported)
        del model, exported  # one copy of a large model in memory is enough
        _check_config(written, fields)
        _check_tokenizer(written, tokenizer)
        _check_logits(written, ids, expected, _LLAMA_TOLERANCE if llama else 0.0)
    logger.info("Exported %s for the WeDLM engine: %s", source, output_dir)
    return str(Path(output_dir))


# ---- what is exported ----


def _load_source(
    source: str, base: str | None, trust_remote_code: bool, averaged: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The whole model in bfloat16, after a look at its config, and its tokenizer."""
    if base is not None or _is_adapter(source):
        named = base_arguments(source, base, trust_remote_code=trust_remote_code)
        _refuse(load_config(str(named.model_name_or_path), named))
        model, tokenizer = load_merged(source, named, dtype="bfloat16", averaged=averaged)
    else:
        named = ModelArguments(model_name_or_path=source, trust_remote_code=trust_remote_code, dtype="bfloat16")
        _refuse(load_config(source, named))
        model, tokenizer = cast(PreTrainedModel, load_model(named)), load_tokenizer(named)
        if averaged and has_average(source):
            take_average(model, source)
    return model.eval(), tokenizer


def _is_adapter(source: str) -> bool:
    if Path(source).exists():
        return Path(source, "adapter_config.json").is_file() and not Path(source, "config.json").is_file()
    try:
        return find_adapter_config_file(source) is not None
    except OSError:  # no name that the hub could have: said by who loads it as a model
        return False


def _refuse(config: PretrainedConfig) -> None:
    if problems := inexpressible(config):
        raise ValueError(f"the WeDLM engine cannot run this model: {'; '.join(problems)}")


def inexpressible(config: PretrainedConfig) -> list[str]:
    """What the engine's network has no place for, each with its value; nothing for a model that can be exported."""
    kind = config.model_type
    if kind not in FAMILIES:
        return [f"model_type is {kind!r}, and it runs the networks of {', '.join(FAMILIES)}"]
    rope = getattr(config, "rope_parameters", None) or {}
    problems = []
    if rope.get("rope_type", "default") != "default":
        problems.append(f"rope scaling is {rope['rope_type']!r} (factor {rope.get('factor')}), and it has default only")
    if not isinstance(rope.get("rope_theta"), (int, float)):
        problems.append(f"rope_theta is {rope.get('rope_theta')!r}, which must be a number")
    partial = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    if partial not in (None, 1):
        problems.append(f"partial_rotary_factor is {partial}, and it rotates whole heads")
    layers = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention"}
    if layers:
        window = getattr(config, "sliding_window", None)
        problems.append(f"layer_types has {', '.join(sorted(layers))} (sliding_window {window}), and it attends to all")
    if config.hidden_act != "silu":
        problems.append(f"hidden_act is {config.hidden_act!r}, and it has silu")
    if getattr(config, "mlp_bias", False):
        problems.append("mlp_bias is True, and its MLP has no biases")
    if getattr(config, "attention_bias", False) and kind == "llama":
        problems.append("attention_bias is True, which gives o_proj a bias, and its o_proj has none")
    if getattr(config, "attention_bias", False) and kind == "qwen3":
        problems.append("attention_bias is True, and it has biases or query and key norms, not both")
    for name in ("final_logit_softcapping", "attn_logit_softcapping"):
        if getattr(config, name, None):
            problems.append(f"{name} is {getattr(config, name)}, and it caps no logits")
    return problems


def engine_config(config: PretrainedConfig, mask_token_id: int, eos_token_id: int) -> dict[str, Any]:
    """config.json of the export, every field written out: defaults differ between versions and classes."""
    qk_norm = config.model_type == "qwen3" or bool(getattr(config, "qk_norm", False))
    fields = {name: getattr(config, name) for name in _KEPT_FIELDS}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "architectures": ["WeDLMForCausalLM"],
        "model_type": MODEL_TYPE,
        "auto_map": {"AutoConfig": f"{_CONFIGURATION_FILE.removesuffix('.py')}.WeDLMConfig"},
        **fields,
        "num_key_value_heads": config.num_key_value_heads or config.num_attention_heads,
        "head_dim": head_dim,
        "qk_norm": qk_norm,
        "attention_bias": not qk_norm,
        "rope_theta": config.rope_parameters["rope_theta"],
        "rope_scaling": None,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": config.num_hidden_layers,
        "use_cache": True,
        "eos_token_id": eos_token_id,
        "mask_token_id": mask_token_id,
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
    }


def _mask_token(model: PreTrainedModel, tokenizer: Any, given: int | None, source: str) -> int:
    """The token at mask slots; it is noted in the model."""
    recorded = recorded_mask_token(model)
    if given is None and recorded is None:
        raise ValueError(
            f"{source!r} does not say which token stands at mask slots, so it was not trained as WeDLM (objective wedlm); if it "
            "was, give the token with --mask_token_id"
        )
    if given is not None and recorded not in (None, given):
        logger.warning("%s was trained with mask token %s, and is exported with %s", source, recorded, given)
    record_mask_token(model, cast(int, recorded if given is None else given))
    return resolve_mask_token(tokenizer, model.config, mask_token_id=given)


def _set_end_of_turn(tokenizer: Any) -> None:
    """Make the end-of-turn token of the chat template the tokenizer's eos."""
    has_template = getattr(tokenizer, "chat_template", None) is not None
    token = end_of_turn_id(tokenizer) if has_template else None
    if token is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "the engine stops at the tokenizer's eos_token, and it has none: set it in tokenizer_config.json"
            )
        why = "it is not certain which token ends a turn" if has_template else "there is no chat template"
        logger.warning("the engine will stop at the tokenizer's eos %r: %s", tokenizer.eos_token, why)
    elif token != tokenizer.eos_token_id:
        before, rendered = tokenizer.eos_token, _rendered(tokenizer)
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(token)
        if _rendered(tokenizer) != rendered:
            raise ValueError(
                f"a turn ends with {tokenizer.eos_token!r}, and the chat template writes the tokenizer's eos_token {before!r} "
                "elsewhere: the engine needs the end of turn as eos; write the other token out in the template"
            )
        logger.warning("the tokenizer's eos was %r and is now the end of turn %r", before, tokenizer.eos_token)


def _warn_of_added_tokens(tokenizer: Any) -> None:
    """The engine encodes a prompt's text as any text; training encodes what the template writes, and nothing around it."""
    text = _rendered(tokenizer)
    if text and tokenizer.encode(text) != tokenizer.encode(text, add_special_tokens=False):
        logger.warning(
            "the tokenizer adds tokens around each text (%r), which conversations had none of in training: give the engine "
            "prompts as token ids, encoded with add_special_tokens=False",
            tokenizer.decode(tokenizer.encode("")),
        )


def _rendered(tokenizer: Any) -> str:
    """A conversation as text; empty without a chat template."""
    if getattr(tokenizer, "chat_template", None) is None:
        return ""
    return tokenizer.apply_chat_template(_PROBE_CHAT, tokenize=False)


def _as_wedlm(model: PreTrainedModel, fields: dict[str, Any]) -> WeDLMForCausalLM:
    """The same tensors, not copied, as a WeDLM model."""
    with torch.device("meta"):
        exported: Any = WeDLMForCausalLM(WeDLMConfig.from_dict(fields))
    state = dict(model.state_dict())
    if model.config.model_type == "llama":
        zeros = {name: tensor for name, tensor in exported.state_dict().items() if name.endswith("_proj.bias")}
        state |= {name: torch.zeros(tensor.shape, dtype=torch.bfloat16) for name, tensor in zeros.items()}
    exported.load_state_dict(state, assign=True)
    exported.tie_weights()
    generation: Any = copy.deepcopy(model.generation_config)
    generation._from_model_config = False
    stops = end_tokens(generation, fields["eos_token_id"])
    generation.eos_token_id = stops if len(stops) > 1 else stops[0]
    exported.generation_config = generation
    return exported


def _write_texts(folder: Path, fields: dict[str, Any], tokenizer: Any) -> None:
    """Config, the class that reads it, and the tokenizer."""
    (folder / "config.json").write_text(_json(fields), encoding="utf-8")
    (folder / _CONFIGURATION_FILE).write_text(_CONFIGURATION, encoding="utf-8")
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    saved["additional_special_tokens"] = (
        saved.get("extra_special_tokens") or saved.get("additional_special_tokens") or []
    )
    kept = {name: saved[name] for name in _TOKENIZER_FIELDS if name in saved}
    path.write_text(_json({"tokenizer_class": "PreTrainedTokenizerFast", **kept}), encoding="utf-8")


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


# ---- what was written ----


def _check_tensors(folder: Path, model: PreTrainedModel) -> None:
    """Every tensor of ``model`` is there in bfloat16, bit by bit, and nothing else."""
    verify_weights(folder, model)
    state = model.state_dict()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no dict)
                tensor = file.get_tensor(name)
                if tensor.dtype != torch.bfloat16 or not torch.equal(tensor, state[name]):
                    raise CheckpointError(
                        f"{path.name}: {name} ({tensor.dtype}) is not the model's tensor in bfloat16."
                    )


def _check_config(folder: Path, fields: dict[str, Any]) -> None:
    """config.json, as it stands there, says what was meant and what the engine asks for."""
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    differing = {name for name in {*raw, *fields} if raw.get(name, _ABSENT) != fields.get(name, _ABSENT)}
    met = {
        "rope_scaling": "rope_scaling" in raw and raw["rope_scaling"] is None,
        "rope_theta": isinstance(raw.get("rope_theta"), (int, float)),
        "head_dim": isinstance(raw.get("head_dim"), int),
        "mask_token_id": isinstance(raw.get("mask_token_id"), int) and 0 <= raw["mask_token_id"] < raw["vocab_size"],
        "attention_bias": raw.get("attention_bias") is not raw.get("qk_norm"),
    }
    if wrong := sorted(differing | {name for name, fine in met.items() if not fine}):
        raise CheckpointError(f"config.json: {', '.join(f'{name} is {raw.get(name)!r}' for name in wrong)}.")


def _check_tokenizer(folder: Path, tokenizer: Any) -> None:
    """The written tokenizer gives the same tokens, and its eos is the end of turn."""
    again: Any = AutoTokenizer.from_pretrained(folder)
    for text in (_PROBE_TEXT, _rendered(tokenizer), "".join(tokenizer.all_special_tokens)):
        if again.encode(text) != tokenizer.encode(text):
            raise CheckpointError(f"The written tokenizer reads {text!r} otherwise than the model's.")
    for name, found, meant in (
        ("eos_token_id", again.eos_token_id, tokenizer.eos_token_id),
        ("tokens", len(again), len(tokenizer)),
        ("chat template", _rendered(again), _rendered(tokenizer)),
    ):
        if found != meant:
            raise CheckpointError(f"The written tokenizer: {name} is {found!r} and must be {meant!r}.")


def _check_logits(folder: Path, ids: Tensor, expected: Tensor, tolerance: float) -> None:
    """The folder, loaded by the Auto classes without code of its own, gives the source's logits.

    Args:
        tolerance: share of the logits' spread; 0: the same bits.
    """
    again, info = cast(Any, AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True))
    left = {name: value for name, value in info.items() if value}
    if not isinstance(again, WeDLMForCausalLM) or again.dtype != torch.bfloat16 or left:
        raise CheckpointError(
            f"The export loads as {type(again).__name__} in {again.dtype}, with {left or 'nothing'} left over."
        )
    found = _logits(again.eval(), ids)
    difference, spread = (found - expected).abs().max().item(), (expected.max() - expected.min()).item()
    if not difference <= tolerance * spread:
        raise CheckpointError(
            f"The export's logits differ from the source's by {difference:.3g} (their spread is {spread:.3g})."
        )


def _probe_ids(rows: int, mask_token_id: int) -> Tensor:
    """[1, 24] tokens of the whole vocabulary, mask slots at the end."""
    ids = torch.randint(rows, (1, 24), generator=torch.Generator().manual_seed(0))
    ids[0, 0], ids[0, -4:] = rows - 1, mask_token_id
    return ids


@torch.inference_mode()
def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits.float()
