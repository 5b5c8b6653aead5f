"""The arguments that users write, as plain dataclasses.

Nothing here imports torch or transformers: ``--help`` and configuration errors come at once.
``hf_sft.parsing`` fills these classes; ``training_arguments.TrainingArguments`` adds Hugging Face's own fields.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


def arg(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with its help text; lists and dicts get a fresh copy per instance."""
    metadata["help"] = help
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelArguments:
    """Which model is trained, and how its weights are held."""

    _argument_group_name = "model"

    model_name_or_path: str | None = arg(None, "Folder or hub name of the model to start from.")
    config_name_or_path: str | None = arg(
        None,
        "Train from scratch: a folder, a JSON file or a hub name that holds a config.json and no weights are read.",
    )
    config_overrides: dict | str | None = arg(
        None, "Fields of the config to change when training from scratch, as a JSON object."
    )
    tokenizer_name_or_path: str | None = arg(None, "Tokenizer, if it is not the model's own.")
    model_revision: str | None = arg(None, "Branch, tag or commit on the hub.")
    trust_remote_code: bool = arg(False, "Run Python code that a model repository brings along.")
    train_mode: Literal["full", "lora", "qlora"] = arg(
        "full", "All weights, a LoRA adapter, or LoRA on a quantised base."
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = arg(
        None,
        "Type of the loaded weights. Default: float32 for full training, bfloat16 for the frozen base of an adapter.",
    )
    quantization: Literal["nf4", "int8"] | None = arg(
        None, "How the base is quantised under qlora. Default there: nf4."
    )
    double_quantization: bool = arg(True, "Quantise the scales of nf4 as well (about 0.4 bit per weight less).")
    attention_backend: Literal["auto", "dense", "segment", "flash", "flex", "magi"] = arg(
        "auto",
        "How packed documents are kept apart. auto measures which backend is right for the model and says so. magi needs "
        "MagiAttention; flash (objective causal, bf16 or fp16) and flex train on CUDA alone.",
    )
    activation_checkpointing_policy: Literal["full", "attention", "products"] = arg(
        "full",
        "What activation_checkpointing computes again: the full layer; all but the outputs of attention kernels; all but those "
        "and the outputs of matrix products (faster, more memory).",
    )
    new_special_tokens: list[str] = arg([], "Special tokens to add to the tokenizer; their rows are trained.")
    freeze: list[str] = arg(
        [],
        "Weights that are not trained: patterns for names of parameters, such as model.embed_tokens.* or model.layers.[0-7].* "
        "(shell wildcards; a leading ! takes names out again).",
    )
    thaw_at_step: int | None = arg(
        None, "Train the frozen weights as well after so many optimizer steps. Default: never."
    )
    router_aux_loss_coef: float | None = arg(
        None, "Weight of the load-balancing loss of a mixture of experts; 0 leaves it out. Default: the config's."
    )
    max_loading_processes: int | None = arg(
        None, "Processes of a machine that load weights at the same time, where its memory is short. Default: all."
    )


@dataclass
class LoraArguments:
    """The adapter of train_mode lora and qlora."""

    _argument_group_name = "adapter"

    lora_rank: int = arg(16, "Rank r of the update B A.")
    lora_alpha: float = arg(32.0, "The update is scaled by alpha / rank.")
    lora_dropout: float = arg(0.0, "Dropout on the adapter's input, in [0, 1).")
    lora_target_modules: list[str] = arg(
        ["all-linear"],
        "Module names, all-linear (every linear layer but the head), or experts (the routed experts of a mixture).",
    )
    lora_bias: Literal["none", "all", "lora_only"] = arg("none", "Which biases are trained along.")
    use_dora: bool = arg(False, "Weight-decomposed LoRA (arXiv 2402.09353).")
    use_rslora: bool = arg(False, "Scale by alpha / sqrt(rank) (arXiv 2312.03732).")
    modules_to_save: list[str] = arg([], "Modules trained in full beside the adapter, such as lm_head.")
    adapter_name_or_path: str | None = arg(None, "Go on training this adapter instead of a new one.")


@dataclass
class EngineArguments:
    """How weights, gradients and optimizer states are sharded over processes: DeepSpeed by keys instead of a file."""

    _argument_group_name = "engine"

    zero_stage: Literal[1, 2, 3] | None = arg(
        None,
        "DeepSpeed ZeRO: shard optimizer states (1), gradients as well (2), parameters as well (3). Or: deepspeed FILE.",
    )
    offload_optimizer: Literal["none", "cpu", "nvme"] | None = arg(None, "Where ZeRO keeps optimizer states.")
    offload_param: Literal["none", "cpu", "nvme"] | None = arg(None, "Where ZeRO-3 keeps parameters.")
    nvme_path: str | None = arg(None, "Folder on a local NVMe disk, for offloading to nvme.")


@dataclass
class DataArguments:
    """What is learned: files, template, lengths, packing."""

    _argument_group_name = "data"

    train_file: list[str | dict] | str | None = arg(
        None,
        "Training data: a file (JSON lines, JSON array, CSV, Parquet, Arrow, text; also .gz), a folder, one made by hf-sft "
        "prepare, a data set of the hub; or several. In a run file an item may be an object: path, format, weight, limit, "
        "chat_template, system_prompt, columns, config, split, revision.",
    )
    eval_file: list[str | dict] | str | None = arg(None, "Evaluation data, in the same formats.")
    eval_split: float | None = arg(
        None, "Keep records of the training data for evaluation: a share below 1, or a number of records."
    )
    data_format: Literal[
        "auto", "messages", "prompt_generation", "prompt_completion", "question_answer", "alpaca", "sharegpt", "firefly",
        "xtuner", "preference", "text",
    ] = arg("auto", "Shape of the records; auto recognises each.")  # fmt: skip
    task_type: Literal["sft", "pretrain", "dpo"] = arg(
        "sft",
        "sft: learn the assistant's turns of conversations. pretrain: learn every token of raw texts. dpo: learn to prefer the "
        "chosen answers of pairs to the rejected ones.",
    )
    objective: Literal["causal", "wedlm"] = arg(
        "causal", "causal: predict the next token. wedlm: recover masked tokens under causal attention as well."
    )
    max_seq_length: int = arg(
        2048,
        "Capacity of a bin and longest document, in tokens. Under dpo each side of a pair is a document of its own.",
    )
    overlength: Literal["drop", "truncate", "split", "error"] | None = arg(
        None,
        "A document longer than max_seq_length. A truncated answer is not taught to stop. split (pretrain only) cuts it into "
        "several, none of its tokens lost. Default: drop, under pretrain split.",
    )
    split_overlap: int = arg(
        1,
        "Of a text that is split, how many tokens a part repeats from the one before, as context that is not learned again.",
    )
    pretrain_packing: Literal["documents", "concat"] = arg(
        "documents",
        "documents: texts are packed whole and do not see each other. concat: they are joined, an end of sequence between them, "
        "and cut into rows of max_seq_length, each of which is one document.",
    )
    bad_records: Literal["error", "skip"] = arg(
        "error", "A record that cannot be read or encoded: stop, or skip and count."
    )
    train_on: Literal["assistant", "last", "all"] = arg(
        "assistant",
        "Supervise every assistant turn, the last one only, or all tokens. Turns with train: false are left out.",
    )
    packing: bool | None = arg(
        None, "Pack several documents into one bin; they do not see each other. Default: if the model can be packed."
    )
    chat_template: list[str] | str | None = arg(
        None,
        "Name (plain, chatml, llama2, llama3, vicuna, alpaca, zephyr, mistral, gemma, phi3), file or text of a Jinja template. "
        "Of several, each conversation gets one by a seeded draw, and the first is saved. Default: the tokenizer's own.",
    )
    system_prompt: str | None = arg(
        None, "System message of conversations that have none; it becomes part of the saved template."
    )
    special_tokens_in_text: Literal["refuse", "text"] = arg(
        "refuse", "A text that spells a special token: refuse the record, or encode the letters without the token."
    )
    chat_template_kwargs: dict | str | None = arg(None, "Variables for the template, as a JSON object.")
    max_train_samples: int | None = arg(None, "Use the first N training records.")
    max_eval_samples: int | None = arg(None, "Use the first N evaluation records.")
    data_cache_dir: str | None = arg(
        None, "Where tokenised data is kept. Default: $HF_SFT_CACHE, else ~/.cache/hf_sft."
    )
    rebuild_cache: bool = arg(False, "Tokenise again even if the cache holds the same data.")
    preprocessing_num_workers: int | None = arg(
        None,
        "Processes that tokenise; the result does not depend on it. Default: one per core up to 8, one for files below 1 MB.",
    )
    lazy_preprocess: bool = arg(
        False, "Tokenise each training record when it is needed. Documents are then not packed by length."
    )
    streaming: bool = arg(
        False, "Read training data as they are used, without a cache, for data larger than the disk. Needs max_steps."
    )
    shuffle_buffer: int = arg(10_000, "Documents from which streaming draws at random.")

    @property
    def bin_capacity(self) -> int:
        """Tokens of a bin: under dpo both sides of a pair fit."""
        return self.max_seq_length * (2 if self.task_type == "dpo" else 1)

    @property
    def first_template(self) -> str | None:
        """The template that is saved: ``chat_template``, or the first of several."""
        return self.chat_template[0] if isinstance(self.chat_template, list) else self.chat_template

    @property
    def is_live(self) -> bool:
        """Whether training data are tokenised while the model trains."""
        return self.streaming or self.lazy_preprocess

    @property
    def joins_texts(self) -> bool:
        """Whether texts are joined into one stream and cut, instead of being documents of their own."""
        return self.task_type == "pretrain" and self.pretrain_packing == "concat"

    @property
    def overlength_rule(self) -> str:
        """``overlength``, or what it is by default for the task."""
        return self.overlength or ("split" if self.task_type == "pretrain" else "drop")


@dataclass
class WeDLMArguments:
    """The objective wedlm: block diffusion under causal attention (arXiv 2512.22737)."""

    _argument_group_name = "wedlm"

    block_size: int = arg(32, "Tokens per block; each block is masked by itself.")
    mask_per_block: bool = arg(True, "Draw the share of masked tokens for each block; false: once per document.")
    mask_sampling: Literal["elbo", "reference"] = arg(
        "elbo",
        "elbo: the exact any-order bound. reference: as Tencent's code, weights 1/gamma normalised per micro-batch; for parity.",
    )
    loss_weighting_scheme: Literal["weighted", "uniform"] = arg(
        "weighted", "Weights of mask slots: as mask_sampling says, or the same for every slot of a block."
    )
    num_learnable_im_end: int = arg(
        8, "End-of-turn tokens learned behind the last answer, so that slots behind the end are defined while decoding."
    )
    mask_token: str | None = arg(
        None,
        "The mask token; added to the vocabulary if it is new. Default: the config's, the tokenizer's, else 151665.",
    )
    mask_token_id: int | None = arg(None, "The mask token by its id.")
    enable_ar_loss: bool = arg(True, "Learn the next token on the clean stream as well.")
    ar_loss_weight: float = arg(1.0, "Weight a of that loss: (masked + a * next token) / (1 + a).")


@dataclass
class DPOArguments:
    """Learning from preferences: DPO (arXiv 2305.18290) and its kin."""

    _argument_group_name = "preferences"

    dpo_beta: float = arg(
        0.1, "How strongly the policy is held to the reference (DPO), the weight of the odds ratio (ORPO)."
    )
    dpo_loss_type: Literal["sigmoid", "ipo", "hinge", "robust", "orpo", "simpo"] = arg(
        "sigmoid", "The loss of a pair. orpo and simpo need no reference."
    )
    label_smoothing: float = arg(
        0.0, "Probability that a preference is the wrong way round, in [0, 0.5): sigmoid (cDPO), robust and simpo."
    )
    dpo_sft_weight: float = arg(
        0.0, "Weight of an auxiliary term: the mean loss of the chosen answers' tokens. (orpo has it with weight 1.)"
    )
    dpo_length_normalized: bool = arg(
        False, "Take the mean log-probability of an answer's tokens instead of the sum. (orpo and simpo always do.)"
    )
    simpo_gamma: float = arg(0.5, "The margin by which simpo wants the chosen answer's reward to be larger.")
    max_prompt_length: int | None = arg(
        None, "Keep the last so many tokens of a prompt. Default: prompts are kept whole."
    )
    max_answer_length: int | None = arg(
        None,
        "Keep the first so many tokens of an answer, which is then not taught to stop. Default: answers are kept whole.",
    )
    dpo_reference: Literal["auto", "adapter_off", "model", "precomputed"] = arg(
        "auto",
        "What the policy is compared with: the base with the adapter off, a second model in memory, or log-probabilities of the "
        "model as training finds it, computed once and kept in the cache. auto: adapter_off for a new adapter, model if one is "
        "named, else precomputed.",
    )
    reference_model_name_or_path: str | None = arg(
        None, "The second model. Default with dpo_reference model: model_name_or_path."
    )


@dataclass
class EvaluationArguments:
    """What is evaluated beside the loss, and when training ends early."""

    _argument_group_name = "evaluation"

    generation_eval_steps: int | None = arg(
        None,
        "Answer evaluation prompts after every N optimizer steps and in the last evaluation, and score the answers; 0: in every "
        "evaluation, as always where metric_for_best_model is of answers. Default: nothing is generated.",
    )
    generation_eval_samples: int = arg(32, "The number of evaluation prompts that are answered: the first ones.")
    generation_batch_size: int = arg(8, "Prompts that a process answers at the same time.")
    generation_max_new_tokens: int = arg(256, "Longest answer, in tokens, its end of turn included.")
    max_generation_seconds: float | None = arg(
        None, "Begin no further batch of answers after so many seconds; what was answered by then is scored."
    )
    generation_metrics: list[str] = arg(
        [],
        "How answers are scored: bleu, chrf, rouge, meteor, edit_distance, exact_match, final_answer. Default: all whose "
        "packages and data are installed.",
    )
    evals_per_epoch: int | None = arg(
        None, "With eval_strategy epoch: evaluate so many times per epoch, the last time at its end."
    )
    early_stopping_patience: int | None = arg(
        None, "End the training when metric_for_best_model has not improved in so many evaluations. Default: never."
    )
    early_stopping_threshold: float = arg(0.0, "An improvement is a change of the metric by more than this.")
    stop_check_samples: int = arg(
        4,
        "After the training, answer so many prompts and say how many answers ended by themselves; 0: none. Raw texts "
        "(task_type pretrain) have no prompts.",
    )


@dataclass
class EMAArguments:
    """An exponential moving average of the trained weights: what is evaluated, and what is saved as the result."""

    _argument_group_name = "ema"

    ema_decay: float | None = arg(
        None, "Decay d in (0, 1) of average = d * average + (1 - d) * weights, after each step. Default: no average."
    )
    ema_start_step: int = arg(0, "The average begins as the weights after so many steps.")
    ema_cpu: bool = arg(False, "Keep the average in the memory of the host.")


@dataclass
class MonitoringArguments:
    """Watching a run."""

    _argument_group_name = "monitoring"

    profile_steps: str | None = arg(
        None, "FIRST:LAST, the optimizer steps that PyTorch's profiler records into output_dir/profile, such as 5:7."
    )
    stop_on_divergence: bool = arg(
        False,
        "End the training at a line of the log whose loss or gradient norm is not finite, or whose loss has jumped. "
        "Default: warn.",
    )


# Every group, in the order in which they are shown and filled.
GROUPS = (
    ModelArguments,
    DataArguments,
    LoraArguments,
    WeDLMArguments,
    DPOArguments,
    EvaluationArguments,
    EMAArguments,
    MonitoringArguments,
    EngineArguments,
)
