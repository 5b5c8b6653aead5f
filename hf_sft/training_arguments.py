"""Hugging Face's ``TrainingArguments`` with defaults that suit packed batches, and a verdict on every field.

``FIELD_RULES`` knows each field of the parent class: it is honoured, or a value other than the allowed ones is refused
with a sentence. Importing this module imports transformers; import it late.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers.trainer_utils import HubStrategy

from hf_sft.arguments import EngineArguments
from hf_sft.engines import engine_settings, enter_process_group

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Refused:
    """Only the ``allowed`` values are accepted; ``why`` says the reason and the way out."""

    why: str
    allowed: tuple[Any, ...] = (None,)
    only_packed: bool = False

    def allows(self, value: Any, packing: bool) -> bool:
        return value in self.allowed or (self.only_packed and not packing)


_HONOURED = """
    output_dir do_train do_eval resume_from_checkpoint local_rank seed data_seed full_determinism use_cpu
    per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps num_train_epochs max_steps
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps max_grad_norm
    optim optim_args optim_target_modules weight_decay adam_beta1 adam_beta2 adam_epsilon
    bf16 fp16 tf32 torch_empty_cache_steps debug skip_memory_metrics
    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
    logging_strategy logging_steps logging_first_step log_on_each_node log_level
    log_level_replica disable_tqdm
    report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id
    eval_strategy eval_steps eval_delay eval_on_start eval_accumulation_steps eval_do_concat_batches
    eval_use_gather_object prediction_loss_only
    save_strategy save_steps save_total_limit save_only_model save_on_each_node enable_jit_checkpoint
    load_best_model_at_end metric_for_best_model greater_is_better restore_callback_states_from_checkpoint
    push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    accelerator_config dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor
    deepspeed fsdp fsdp_config
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
    torch_compile use_liger_kernel liger_kernel_config
""".split()

_FULL_EVAL = (
    "it casts the weights in place, and training would go on with the rounded ones; "
    "use bf16 or fp16, whose autocast covers evaluation too"
)
_OFF = (False, None)
_REFUSED = {
    "label_smoothing_factor": Refused("the loss is the plain cross entropy of the targets; set it to 0", (0,)),
    "train_sampling_strategy": Refused(
        "documents are packed into bins of equal length, so there is nothing to group; use random or sequential",
        ("random", "sequential"),
    ),
    "length_column_name": Refused("lengths are counted from the tokens; leave it unset", ("length",)),
    "auto_find_batch_size": Refused(
        "the batch would change in mid-run; lower per_device_train_batch_size or max_seq_length instead", _OFF
    ),
    "torch_compile_backend": Refused(
        "rows differ in length, which others cannot take; use inductor (aot_eager and eager to look for errors)",
        (None, "inductor", "aot_eager", "eager"),
    ),
    "torch_compile_mode": Refused(
        "CUDA graphs want rows of one length; use default or max-autotune-no-cudagraphs",
        (None, "default", "max-autotune-no-cudagraphs"),
    ),
    "dataloader_multiprocessing_context": Refused(
        "loader processes are started in the platform's own way; leave it unset"
    ),
    "dataloader_drop_last": Refused("no document is lost: the last batch is filled with empty bins", _OFF),
    "dataloader_in_order": Refused("a resumed run must meet the batches in the same order; leave it true", (True,)),
    "neftune_noise_alpha": Refused(
        "its noise depends on the length of the row, which is the whole bin when packing; set packing to false",
        only_packed=True,
    ),
    "average_tokens_across_devices": Refused(
        "the loss is divided by the scored tokens of all processes, so that it does not depend on how a batch is cut; "
        "leave it true",
        (True,),
    ),
    "remove_unused_columns": Refused(
        "the batch's own keys (targets, weights, layout) would be removed; set it to false", (False,)
    ),
    "label_names": Refused("batches carry their targets under names of their own; leave it unset", (None, [])),
    "include_for_metrics": Refused(
        "losses are summed over all tokens and not kept; compute_metrics can have inputs beside logits and labels",
        ([], ["inputs"], None),
    ),
    "batch_eval_metrics": Refused(
        "logits of a batch are not handed over; compute_metrics gets them all at the end, so leave it false", _OFF
    ),
    "include_num_input_tokens_seen": Refused(
        "tokens per second are in the log, and data_report.json counts the tokens; leave it out", ("no", False, None)
    ),
    "logging_nan_inf_filter": Refused(
        "it would hide a loss that is NaN, and the log is a mean over tokens, not over steps; set it to false", _OFF
    ),
    "use_cache": Refused("with a cache, packed documents see each other; leave it false", _OFF),
    "ignore_data_skip": Refused("a resumed run goes on with the data that it has not seen; leave it false", _OFF),
    "bf16_full_eval": Refused(_FULL_EVAL, _OFF),
    "fp16_full_eval": Refused(_FULL_EVAL, _OFF),
    "do_predict": Refused("train.py trains and evaluates; leave it false", _OFF),
    "parallelism_config": Refused("only data parallelism is available in this version; leave it unset"),
}
_FP16 = "fp16 is true, and there is no accelerator{cpu}: autocast to float16 needs one; use bf16, or leave fp16 out"
# The Trainer uploads checkpoints with a training_args.bin, which holds the token; at the end only what is saved by us.
_UPLOADS = (
    "hub_strategy is {value!r} and push_to_hub is true: uploads of checkpoints would publish the hub's token with the "
    "arguments; set hub_strategy to end"
)
_THEIRS = {  # fields of other trainers' arguments, and what says the same here
    "max_length": "set max_seq_length in DataArguments",
    "max_seq_length": "set max_seq_length in DataArguments",
    "packing": "set packing in DataArguments",
    "eval_packing": "set packing in DataArguments",
    "truncation_mode": "set overlength in DataArguments",
    "chat_template_path": "set chat_template in DataArguments",
    "assistant_only_loss": "only the assistant's turns are learned; see train_on in DataArguments",
    "completion_only_loss": "only the assistant's turns are learned; see train_on in DataArguments",
    "dataset_text_field": "records are conversations or token rows",
    "dataset_num_proc": "the tokenizer runs its own threads",
    "model_init_kwargs": "load the model yourself, or with hf_sft's load_model",
}
HONOURED = None  # the field does what Hugging Face documents
FIELD_RULES: dict[str, Refused | None] = {**dict.fromkeys(_HONOURED, HONOURED), **_REFUSED}

_ACCELERATOR_RULES = {
    "split_batches": Refused("per_device_train_batch_size counts bins per process; set it to false", _OFF),
    "dispatch_batches": Refused("a packed batch [1, T] cannot be cut along its first dimension; set it to false", _OFF),
    "even_batches": Refused("no bin is repeated: empty bins fill the last batch; leave it true", (True,)),
    "use_seedable_sampler": Refused("the order is always drawn from the seed and the epoch; leave it true", (True,)),
}


if "activation_checkpointing" in {entry.name for entry in dataclasses.fields(transformers.TrainingArguments)}:
    _Parent = transformers.TrainingArguments
else:

    @dataclass
    class _Parent(transformers.TrainingArguments):  # type: ignore[no-redef]
        """transformers 5.20, the last for Python 3.10, under today's names. Remove with Python 3.10."""

        activation_checkpointing: bool | None = field(default=None, metadata={"help": "Recompute activations."})
        activation_checkpointing_kwargs: dict | str | None = field(default=None, metadata={"help": "How, as JSON."})

        def __post_init__(self) -> None:
            if self.activation_checkpointing is None:
                self.activation_checkpointing = self.gradient_checkpointing
            if self.activation_checkpointing_kwargs is None:
                self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
            self.gradient_checkpointing = self.activation_checkpointing
            self.gradient_checkpointing_kwargs = self.activation_checkpointing_kwargs
            super().__post_init__()
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs


@dataclass
class TrainingArguments(_Parent):
    """``transformers.TrainingArguments`` with these defaults changed, each for a reason in its help."""

    _argument_group_name = "training (Hugging Face)"

    output_dir: str | None = field(default="output", metadata={"help": "Folder of the checkpoints and the result."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay false: the batch carries keys that no model's forward names."}
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Steps between two log lines; below 1, a share of all steps."}
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Replace NaN losses in the log. Off: it hides them, and waits for the device each batch."},
    )

    hub_strategy: HubStrategy | str = field(
        default="end", metadata={"help": "Must stay end: uploads of checkpoints would publish the hub's token."}
    )

    def __post_init__(self) -> None:
        if self.greater_is_better is None and smaller_is_better(self.metric_for_best_model):
            self.greater_is_better = False  # the parent knows the loss alone
        notes: list[str] = []
        for name, value in engine_settings(EngineArguments(), self, notes).items():
            setattr(self, name, value)
        for note in notes:
            logger.info(note)
        enter_process_group(self)
        compiled = self._without_compilation()
        super().__post_init__()
        refuse_unconnected(self.world_size)
        self.torch_compile, self.torch_compile_backend, self.torch_compile_mode = compiled
        accelerator: Any = self.accelerator_config
        if accelerator.dispatch_batches is None:
            accelerator.dispatch_batches = False  # else Accelerate cuts [1, T] where the data is iterable

    def _without_compilation(self) -> tuple[bool, str | None, str | None]:
        """What is asked of torch.compile, put aside: the parent would round float32 products to TF32 for it, unasked."""
        backend, mode = self.torch_compile_backend, self.torch_compile_mode
        asked = bool(self.torch_compile or backend or mode)
        self.torch_compile, self.torch_compile_backend, self.torch_compile_mode = False, None, None
        return asked, (backend or "inductor") if asked else None, mode


def refuse_unconnected(processes: int) -> None:
    """Raise ValueError if a launcher has started several processes and they are not connected: each would train alone, and write
    where the others write.

    Args:
        processes: that know of each other.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and processes == 1 and "LOCAL_RANK" in os.environ:
        raise ValueError(
            f"the launcher has started {started} processes (WORLD_SIZE), and nothing connects them on this machine: set use_cpu "
            "to true, or start one process"
        )


def smaller_is_better(metric: str | None) -> bool:
    """Whether a smaller value of the metric is the better one."""
    name = (metric or "").removeprefix("eval_")
    return name.endswith(("loss", "perplexity", "bound", "edit_chars", "edit_words")) or name.startswith("masked_loss")


def refusals(values: Mapping[str, Any], packing: bool) -> dict[str, str]:
    """Field -> sentence, for each value that this project does not honour. Fields that are absent are not judged."""
    found = {}
    for name, rule in FIELD_RULES.items():
        if rule is not HONOURED and name in values and not rule.allows(values[name], packing):
            found[name] = f"{name} is {values[name]!r}: {rule.why}"
    if values.get("fp16") and (values.get("use_cpu") or not torch.accelerator.is_available()):
        found["fp16"] = _FP16.format(cpu=" in use (use_cpu is true)" if values.get("use_cpu") else "")
    found.update(kernel_refusals(values))
    strategy = getattr(values.get("hub_strategy"), "value", values.get("hub_strategy", "end"))
    if values.get("push_to_hub") and strategy != "end":
        found["hub_strategy"] = _UPLOADS.format(value=strategy)
    accelerator = values.get("accelerator_config")
    if accelerator is not None and not isinstance(accelerator, str):
        for name, rule in _ACCELERATOR_RULES.items():
            if isinstance(accelerator, Mapping):
                value = accelerator.get(name, rule.allowed[0])
            else:
                value = getattr(accelerator, name)
            if not rule.allows(value, packing):
                found[f"accelerator_config.{name}"] = f"accelerator_config.{name} is {value!r}: {rule.why}"
    return found


def kernel_refusals(values: Mapping[str, Any], *, anywhere: bool = False) -> Iterator[tuple[str, str]]:
    """(field, sentence) for settings of torch.compile and Liger that do not go together, or not on this machine.

    Args:
        anywhere: whatever this machine has.
    """
    config = values.get("liger_kernel_config")
    losses = ("cross_entropy", "fused_linear_cross_entropy")
    if isinstance(config, Mapping) and (asked := [name for name in losses if config.get(name)]):
        sentence = (
            "this trainer scores rows in chunks itself, with the weights of its objectives; leave it out (Liger's layers are "
            "used all the same)"
        )
        yield "liger_kernel_config", f"liger_kernel_config asks for {' and '.join(asked)}: {sentence}"
    if not values.get("use_liger_kernel"):
        if config:
            yield "liger_kernel_config", "liger_kernel_config is set: it needs use_liger_kernel true"
    elif not anywhere and (values.get("use_cpu") or not torch.accelerator.is_available()):
        sentence = "its kernels are written in Triton, which needs a GPU; leave it out"
        yield "use_liger_kernel", f"use_liger_kernel is true without a GPU in use: {sentence}"
    elif any(values.get(f"torch_compile{part}") for part in ("", "_backend", "_mode")):
        yield "use_liger_kernel", "use_liger_kernel and torch_compile are for the same parts of the layers: choose one"


def problems(training_args: transformers.TrainingArguments, packing: bool) -> list[str]:
    """One sentence for every field whose value this project refuses.

    Args:
        training_args: ours, or ``transformers.TrainingArguments`` and its subclasses, whose defaults nobody asked for:
            our data loaders never remove a column, and our log has no filter. Their own fields are not read.
        packing: whether documents may be packed, that is, DataArguments.packing is not False.
    """
    values = {entry.name: getattr(training_args, entry.name) for entry in dataclasses.fields(training_args)}
    found = [
        f"{name} is {value}: it must be a finite number"
        for name, value in values.items()
        if isinstance(value, float) and not math.isfinite(value)
    ]
    if not isinstance(training_args, TrainingArguments):  # what a subclass of ours adds is its author's to read
        for name in ("remove_unused_columns", "logging_nan_inf_filter"):
            del values[name]
        found += [
            f"{name} is set in a {type(training_args).__name__}, which does not check its settings against the arguments: use "
            "hf_sft's TrainingArguments"
            for name in ("deepspeed", "fsdp")
            if values[name]
        ]
        found += _unread(training_args)
    return found + list(refusals(values, packing).values())


def _unread(training_args: transformers.TrainingArguments) -> Iterator[str]:
    """A sentence for each field that a subclass of transformers' adds and that somebody set; None asks for nothing.

    What nobody set is seen on a fresh instance: such classes fill some of their defaults in ``__post_init__``.
    """
    if type(training_args) is transformers.TrainingArguments:
        return
    untouched = type(training_args)(output_dir=training_args.output_dir, use_cpu=training_args.use_cpu)
    for entry in dataclasses.fields(training_args):
        value, default = getattr(training_args, entry.name), getattr(untouched, entry.name)
        if entry.name not in FIELD_RULES and value is not None and value != default:
            way_out = _THEIRS.get(entry.name, "leave it out, or use hf_sft's TrainingArguments")
            kind = type(training_args).__name__
            yield f"{entry.name} is {value!r}: {kind}'s own fields are not read; {way_out}"
