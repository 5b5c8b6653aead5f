"""Files and command lines become typed arguments; every problem is named, all at once."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import transformers

from hf_sft.arguments import DataArguments, LoraArguments, ModelArguments
from hf_sft.conversion import convert
from hf_sft.parsing import Arguments, ArgumentsError, nearest, parse_args, parse_values, read_config
from hf_sft.training_arguments import FIELD_RULES, TrainingArguments, problems

GOOD = {"model_name_or_path": "m", "train_file": "t.jsonl", "use_cpu": True}


def problems_of(values: dict) -> list[str]:
    with pytest.raises(ArgumentsError) as caught:
        parse_values({**GOOD, **values})
    return caught.value.problems


def only_problem(values: dict) -> str:
    found = problems_of(values)
    assert len(found) == 1, found
    return found[0]


def write(path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


# --- the file, the command line, and which of them wins ---------------------------------------------------------------


@pytest.mark.parametrize("flag", [["--train_args_file"], ["--train-args-file"], ["--config"], []])
def test_file_is_found_and_command_line_wins(tmp_path, flag):
    file = write(tmp_path / "a.json", json.dumps({**GOOD, "learning_rate": 1e-3, "max_seq_length": 64}))
    arguments = parse_args([*flag, file, "--learning_rate", "2e-5", "--train-mode=lora"])
    assert isinstance(arguments, Arguments)
    assert arguments.training.learning_rate == 2e-5
    assert (arguments.data.max_seq_length, arguments.model.train_mode) == (64, "lora")
    assert arguments.given == {*GOOD, "learning_rate", "max_seq_length", "train_mode"}


def test_yaml_values_are_typed(tmp_path):
    text = """
        model_name_or_path: m
        train_file: t.jsonl
        use_cpu: yes
        learning_rate: 1e-5
        weight_decay: 1E-2
        eval_strategy: no
        save_strategy: epoch
        num_train_epochs: 2
        packing: off
        max_seq_length: 3.0
        lora_target_modules: q_proj
        train_mode: lora
        lr_scheduler_type: cosine_with_min_lr
        lr_scheduler_kwargs: {min_lr: 1e-6}
        chat_template_kwargs: {enable_thinking: false}
    """
    arguments = parse_args([write(tmp_path / "a.yaml", text)])
    training = arguments.training
    assert (training.learning_rate, training.weight_decay, training.num_train_epochs) == (1e-5, 1e-2, 2.0)
    assert training.lr_scheduler_kwargs == {"min_lr": 1e-6}
    assert (training.eval_strategy, training.save_strategy) == ("no", "epoch")
    assert arguments.data.packing is False
    assert arguments.data.max_seq_length == 3
    assert isinstance(arguments.data.max_seq_length, int)
    assert arguments.data.chat_template_kwargs == {"enable_thinking": False}
    assert arguments.lora.lora_target_modules == ["q_proj"]


def test_command_line_forms():
    line = "--model_name_or_path m --train_file=t --use-cpu --train_mode lora --lora_target_modules q v --no-packing"
    line += " --local_rank 0 --max_steps -1"
    arguments = parse_args([*line.split(), "--chat_template_kwargs", '{"a": 1}'])
    assert arguments.lora.lora_target_modules == ["q", "v"]
    assert arguments.training.use_cpu is True
    assert arguments.data.packing is False
    assert arguments.data.chat_template_kwargs == {"a": 1}
    assert arguments.training.max_steps == -1


@pytest.mark.parametrize("rank", [["--local_rank=0"], ["--local-rank=3"], ["--local_rank", "1"]])
def test_launchers_pass_a_rank_before_the_file(tmp_path, rank):
    file = write(tmp_path / "a.json", json.dumps(GOOD))
    arguments = parse_args([*rank, file])
    assert arguments.training.local_rank == TrainingArguments().local_rank
    assert "local_rank" not in arguments.given


def test_two_files_are_one_too_many(tmp_path):
    with pytest.raises(ArgumentsError, match="one configuration file is read"):
        parse_args(["a.json", "--config", "b.json"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning_rate"], "--learning_rate needs a value"),
        (["--run_name", "a", "b"], "--run_name takes one value, and 2 follow it: a b"),
        (["--no_packing", "x"], "--no_packing takes no value"),
        (["--packing", "maybe"], "packing is 'maybe': it must be true or false or null"),
    ],
)
def test_command_line_slips(words, message):
    with pytest.raises(ArgumentsError) as caught:
        parse_args(["--model_name_or_path", "m", "--train_file", "t", "--use_cpu", *words])
    assert [message in problem for problem in caught.value.problems] == [True]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", None, "there is no file"),
        ("a.json", b"", "is empty"),
        ("a.yaml", b"  \n", "is empty"),
        ("a.json", b'{"a": "\xff"}', "is not UTF-8 text .byte 7"),
        ("a.json", b'{"a": 1,}', "line 1, column 8: no valid JSON|line 1, column 9: no valid JSON"),
        ("a.yaml", b"a: [1, 2", "no valid YAML"),
        ("a.json", b'{"seed": 1, "b": 2, "seed": 3}', "has the key seed twice"),
        ("a.yaml", b"seed: 1\nb: 2\nseed: 3\n", "has the key seed twice"),
        ("a.json", b"[1, 2]", "holds no object"),
        ("a.yaml", b"just text", "holds no object"),
        ("a.yaml", b"1: 2", "holds no object"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArgumentsError, match=message):
        read_config(path)


def test_folder_as_file(tmp_path):
    with pytest.raises(ArgumentsError, match="is a folder"):
        read_config(tmp_path)


def test_byte_order_mark_is_no_obstacle(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"seed": 1}')
    assert read_config(path) == {"seed": 1}


# --- types ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "hint", "result"),
    [
        ("1e-5", float, 1e-5),
        (3, float, 3.0),
        (3.0, int, 3),
        ("1e3", int, 1000),
        ("17", int, 17),
        ("TRUE", bool, True),
        (0, bool, False),
        (None, int | None, None),
        ("none", int | None, None),
        ("none", str | None, "none"),
        ("null", str | None, None),
        ("a", list[str], ["a"]),
        ('["a", "b"]', list[str], ["a", "b"]),
        ("a", None | str | list[str], "a"),
        (["a"], None | str | list[str], ["a"]),
        ('{"a": 1}', dict | str | None, {"a": 1}),
        ("file.json", dict | str | None, "file.json"),
        ("all", str | bool, "all"),
        ("true", str | bool, True),
        ("no", transformers.IntervalStrategy | str, "no"),
        (False, transformers.IntervalStrategy | str, "no"),
    ],
)
def test_convert(value, hint, result):
    converted = convert(value, hint)
    assert converted == result
    assert type(converted) is type(result)


@pytest.mark.parametrize(
    ("value", "hint", "wanted"),
    [
        (3.5, int, "a whole number"),
        (True, int, "a whole number"),
        (math.inf, int, "a whole number"),
        ("x", float, "a finite number"),
        (math.nan, float, "a finite number"),
        (math.inf, float, "a finite number"),
        ("-inf", float, "a finite number"),
        ("1e999", float | None, "a finite number or null"),
        (True, float, "a finite number"),
        (None, float, "a finite number"),
        (2, bool, "true or false"),
        (5, str, "text"),
        ([1], list[str], "a list of text items"),
        ("[1", list[str], "no JSON"),
        ("{1", dict | str | None, "no JSON"),
        ([], dict | str, "an object or text"),
        ("step", transformers.IntervalStrategy | str, '"no", "steps", "epoch"'),
    ],
)
def test_convert_refuses(value, hint, wanted):
    with pytest.raises(ValueError, match=wanted.replace("(", r"\(")):
        convert(value, hint)


def test_every_own_field_and_every_default_survives_its_own_type():
    from typing import get_type_hints

    for cls in (ModelArguments, DataArguments, LoraArguments, TrainingArguments):
        hints = get_type_hints(cls)
        for entry in dataclasses.fields(cls):
            default = entry.default if entry.default is not dataclasses.MISSING else entry.default_factory()
            assert convert(default, hints[entry.name]) == default, entry.name


def test_own_classes_suit_hf_argument_parser():
    parser = transformers.HfArgumentParser((ModelArguments, DataArguments, LoraArguments, TrainingArguments))
    model, data, lora, _ = parser.parse_args_into_dataclasses(
        ["--model_name_or_path", "m", "--lora_rank", "4", "--packing", "false", "--use_cpu"], look_for_args_file=False
    )
    assert (model.model_name_or_path, lora.lora_rank, data.packing) == ("m", 4, False)


# --- problems ---------------------------------------------------------------------------------------------------------


def test_every_problem_at_once():
    found = problems_of(
        {
            "train_file": None,
            "learning_rte": 1,
            "eval_strategy": "step",
            "max_seq_length": 3.5,
            "eval_steps": "x",
            "label_smoothing_factor": 0.1,
            "deepspeed": "a.json",
            "lora_rank": 8,
            "fp16": True,
            "bf16": True,
            "block_size": 8,
            "warmup_steps": -1,
        }
    )
    starts = [
        "learning_rte is no argument; did you mean learning_rate?",
        "eval_strategy is 'step': it must be one of",
        "max_seq_length is 3.5: it must be a whole number",
        "eval_steps is 'x': it must be a finite number or null",
        "label_smoothing_factor is 0.1: the loss is the plain cross entropy",
        "deepspeed is 'a.json', which cannot be read (No such file or directory): name a JSON file",
        "block_size belongs to objective wedlm, and objective is causal",
        "lora_rank belongs to an adapter, and train_mode is full",
        "train_file is not set",
        "fp16 is true, and there is no accelerator in use (use_cpu is true)",
        "Got warmup_steps = -1" if "Got warmup" in "".join(found) else "warmup_steps",
    ]
    assert [any(problem.startswith(start) for problem in found) for start in starts] == [True] * len(starts)
    assert len(found) == len(starts), found


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("learning_rat", "learning_rate"),
        ("trainfile", "train_file"),
        ("lora_ranks", "lora_rank"),
        ("num_train_epoch", "num_train_epochs"),
        ("evaluation_strateg", "eval_strategy"),
    ],
)
def test_unknown_key_names_its_nearest(key, meant):
    assert only_problem({key: 1}) == f"{key} is no argument; did you mean {meant}?"


def test_unknown_key_without_neighbour():
    assert nearest("zzzzzzz", ["seed"]) == "--help all lists them"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"config_name_or_path": "c"}, "both are set"),
        ({"model_name_or_path": None}, "neither is set"),
        ({"train_file": None}, "train_file is not set"),
        ({"config_overrides": {"a": 1}}, "config_overrides changes a model that is trained from scratch"),
        ({"quantization": "nf4"}, "quantization is nf4 and train_mode is full"),
        ({"quantization": "int8", "train_mode": "lora"}, "quantization is int8 and train_mode is lora"),
        ({"double_quantization": True}, "double_quantization belongs to train_mode qlora"),
        (
            {"double_quantization": True, "quantization": "int8", "train_mode": "qlora"},
            "double_quantization belongs to quantization nf4",
        ),
        ({"dtype": "float16"}, "gradients below 6e-8 vanish"),
        ({"lora_rank": 4, "use_dora": True}, "lora_rank, use_dora belong to an adapter"),
        ({"adapter_name_or_path": "a"}, "adapter_name_or_path belongs to an adapter"),
        ({"train_mode": "lora", "lora_rank": 0}, "lora_rank is 0: a rank is at least 1"),
        ({"train_mode": "lora", "lora_alpha": 0}, "lora_alpha is 0"),
        ({"train_mode": "lora", "lora_dropout": 1}, "lora_dropout is 1: it is a share in"),
        ({"train_mode": "lora", "lora_target_modules": []}, "lora_target_modules is empty"),
        ({"train_mode": "lora", "adapter_name_or_path": "a", "lora_rank": 4}, "brings its own settings"),
        ({"train_mode": "lora", "lora_bias": "some"}, 'one of "none", "all", "lora_only"'),
        ({"max_seq_length": 1}, "at least 2 tokens"),
        ({"max_train_samples": 0}, "max_train_samples is 0"),
        ({"max_eval_samples": 5}, "max_eval_samples is set and eval_file is not"),
        ({"dpo_beta": 0.2}, "dpo_beta belongs to task_type dpo, and task_type is sft"),
        ({"activation_checkpointing_policy": "products"}, "activation_checkpointing is not true: set it"),
        ({"task_type": "pretrain", "train_on": "all"}, "train_on belongs to conversations"),
        ({"overlength": "split"}, "a conversation is dropped or truncated"),
        ({"fp16": True}, "autocast to float16 needs one; use bf16, or leave fp16 out"),
        ({"eval_strategy": "epoch"}, "eval_strategy is epoch, and eval_file is not set"),
        ({"do_eval": True}, "do_eval is true, and eval_file is not set"),
        ({"do_eval": False, "eval_file": "e"}, "do_eval is false, and eval_file is set"),
        ({"do_train": False}, "do_train is false"),
        ({"eval_file": "e", "load_best_model_at_end": True, "save_strategy": "no"}, "eval_strategy is no"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0"),
        ({"num_train_epochs": 0}, "nothing would be trained"),
        ({"learning_rate": -1}, "learning_rate is -1"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1: it must not be negative"),
        ({"max_grad_norm": -1}, "max_grad_norm is -1"),
        ({"dataloader_num_workers": -2}, "dataloader_num_workers is -2: it must not be negative"),
        ({"logging_steps": -2}, "logging_steps is -2: it must not be negative"),
        ({"save_steps": -5}, "save_steps is -5: it must not be negative"),
        ({"max_steps": -5}, "max_steps is -5: use 1 or more, or leave it out"),
        ({"adam_beta2": 1}, "adam_beta2 is 1: it is a share in"),
        ({"seed": -1}, "seed is -1: a seed lies between 0"),
        ({"data_seed": -1}, "data_seed is -1: a seed lies between 0"),
        ({"train_mode": "lora", "model_name_or_path": None, "config_name_or_path": "c"}, "lora needs a trained base"),
        ({"lr_scheduler_kwargs": "x"}, "lr_scheduler_kwargs is 'x': it must be an object"),
        ({"lr_scheduler_kwargs": {"num_cycles": 2}}, "'num_cycles', and lr_scheduler_type linear takes none"),
        (
            {"lr_scheduler_type": "constant_with_warmup", "lr_scheduler_kwargs": {"num_cycles": 2}},
            "constant_with_warmup takes none: leave lr_scheduler_kwargs out",
        ),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"min_lr": 1}}, "cosine takes num_cycles"),
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            "needs min_lr or min_lr_rate in lr_scheduler_kwargs, and neither",
        ),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "warmup_stable_decay needs num_decay_steps"),
        (
            {
                "lr_scheduler_type": "reduce_lr_on_plateau",
                "eval_strategy": "epoch",
                "eval_file": "e",
                "lr_scheduler_kwargs": {"patient": 2},
            },
            "has 'patient', and lr_scheduler_type reduce_lr_on_plateau takes mode, factor, patience",
        ),
        ({"metric_for_best_model": "accuracy"}, "choose one of loss, perplexity, token_accuracy, supervised_tokens"),
        (
            {"save_strategy": "best", "eval_file": "e", "eval_strategy": "epoch"},
            "save_strategy is best and metric_for_best_model is not set",
        ),
        ({"save_strategy": "best", "metric_for_best_model": "loss"}, "save_strategy is best, and eval_file is not set"),
        ({"report_to": "no_such_thing"}, "report_to is 'no_such_thing': it must be none, all"),
        ({"push_to_hub": True, "hub_strategy": "checkpoint"}, "hub_strategy is 'checkpoint' and push_to_hub is true"),
        ({"eval_split": 0.1, "eval_file": "e.jsonl"}, "eval_split and eval_file are both set"),
        ({"eval_split": 1.5}, "eval_split is 1.5: use a share between 0 and 1, or a whole number of records from 2 on"),
        ({"eval_split": 1}, "eval_split is 1: use a share"),
        ({"val_size": -1}, "eval_split is -1: use a share"),
        (
            {"train_file": [{"path": "a", "wait": 2}]},
            "train_file: a data source has no key 'wait'; did you mean weight?",
        ),
        ({"streaming": True}, "streaming is true and max_steps is not set"),
        ({"preprocessing_num_workers": 0}, "preprocessing_num_workers is 0"),
        ({"task_type": "pretrain", "system_prompt": "x"}, "system_prompt belongs to conversations"),
        ({"eos_tok": "x"}, "eos_tok is no argument; --help all lists them"),
        ({"chat_template_kwargs": "x"}, "chat_template_kwargs is 'x': it must be an object"),
        ({"ddp_backend": "carrier_pigeon"}, "ddp_backend is 'carrier_pigeon': it must be one of"),
        ({"optim": "adamw_typo"}, "optim is 'adamw_typo': it must be one of"),
    ],
)
def test_contradictions(values, sentence):
    assert sentence in only_problem(values)


def test_qlora_from_scratch():
    found = problems_of({"model_name_or_path": None, "config_name_or_path": "c", "train_mode": "qlora"})
    assert len(found) == 1
    assert "train_mode qlora quantises trained weights" in found[0]


def test_fp16_and_bf16_exclude_each_other(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    found = problems_of({"use_cpu": False, "fp16": True, "bf16": True})
    assert found[0] == "fp16 and bf16 are both true: choose one (bf16 where the device has it)"


@pytest.mark.parametrize(
    "values",
    [
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-6}},
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0}},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 5}},
        {"lr_scheduler_type": "constant", "seed": 2**32 - 1, "data_seed": 0},
        {"push_to_hub": True, "hub_model_id": "a/b"},
        {"hub_strategy": "every_save"},
        {"report_to": ["none"]},
    ],
)
def test_good_values_pass(values):
    assert parse_values({**GOOD, **values}).notes == []


def test_integrations_that_are_not_installed(monkeypatch):
    there = {"tensorboardX"}
    monkeypatch.setattr("hf_sft.checks.find_spec", lambda name: name if name in there else None)
    assert parse_values({**GOOD, "report_to": "tensorboard"}).training.report_to == ["tensorboard"]
    found = problems_of({"report_to": ["comet_ml", "tensorboard", "wandb"]})
    assert [problem.split(":")[1].split(",")[0] for problem in found] == [" pip install comet-ml", " pip install wandb"]
    there.clear()
    assert "report_to is tensorboard, and tensorboard or tensorboardX is not" in only_problem(
        {"report_to": "tensorboard"}
    )


def test_known_integrations_are_those_of_transformers():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    from hf_sft.checks import _REPORTERS

    assert INTEGRATION_TO_CALLBACK.keys() - _REPORTERS.keys() == {"kubeflow"}


@pytest.mark.parametrize(
    ("metric", "given", "greater"),
    [
        ("perplexity", None, False),
        ("eval_perplexity", None, False),
        ("eval_loss", None, False),
        ("token_accuracy", None, True),
        ("perplexity", True, True),
    ],
)
def test_best_is_the_smallest_perplexity(metric, given, greater):
    values = {"metric_for_best_model": metric} | ({} if given is None else {"greater_is_better": given})
    assert parse_values({**GOOD, **values}).training.greater_is_better is greater


def test_secrets_stay_out_of_messages():
    found = problems_of({"hub_token": ["hf_secret"], "push_to_hub_token": "hf_other"})
    assert "hf_" not in "".join(found).replace("hf_sft", "")
    assert "hf_other" not in "".join(parse_values({**GOOD, "push_to_hub_token": "hf_other"}).notes)


# --- Hugging Face's fields --------------------------------------------------------------------------------------------


def test_every_field_of_transformers_has_a_rule():
    theirs = {entry.name for entry in dataclasses.fields(transformers.TrainingArguments)}
    assert theirs - FIELD_RULES.keys() == set(), "decide in FIELD_RULES: honoured, or refused with a sentence"
    assert FIELD_RULES.keys() - {entry.name for entry in dataclasses.fields(TrainingArguments)} == set()


def test_defaults_are_allowed():
    assert problems(TrainingArguments(use_cpu=True), packing=True) == []


def test_changed_defaults():
    args = TrainingArguments(use_cpu=True)
    assert (args.remove_unused_columns, args.logging_nan_inf_filter, args.use_cache) == (False, False, False)
    assert args.average_tokens_across_devices is True
    assert args.accelerator_config.dispatch_batches is False


REFUSED_EXAMPLES = {
    "label_smoothing_factor": 0.1,
    "train_sampling_strategy": "group_by_length",
    "length_column_name": "n",
    "auto_find_batch_size": True,
    "torch_compile_backend": "cudagraphs",
    "torch_compile_mode": "reduce-overhead",
    "dataloader_multiprocessing_context": "spawn",
    "dataloader_drop_last": True,
    "dataloader_in_order": False,
    "neftune_noise_alpha": 5.0,
    "average_tokens_across_devices": False,
    "remove_unused_columns": True,
    "label_names": ["x"],
    "include_for_metrics": ["loss"],
    "batch_eval_metrics": True,
    "include_num_input_tokens_seen": "all",
    "logging_nan_inf_filter": True,
    "use_cache": True,
    "ignore_data_skip": True,
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "do_predict": True,
    "parallelism_config": {"tp_size": 2},
}


def test_every_refusal_has_an_example():
    assert {name for name, rule in FIELD_RULES.items() if rule is not None} == REFUSED_EXAMPLES.keys()


@pytest.mark.parametrize("name", REFUSED_EXAMPLES)
def test_refused_values_get_their_sentence(name):
    rule = FIELD_RULES[name]
    assert only_problem({name: REFUSED_EXAMPLES[name]}) == f"{name} is {REFUSED_EXAMPLES[name]!r}: {rule.why}"
    args = TrainingArguments(use_cpu=True)
    setattr(args, name, REFUSED_EXAMPLES[name])
    assert problems(args, packing=True) == [f"{name} is {REFUSED_EXAMPLES[name]!r}: {rule.why}"]


def test_neftune_is_for_padded_batches():
    assert parse_values({**GOOD, "neftune_noise_alpha": 5, "packing": False}).training.neftune_noise_alpha == 5.0


@pytest.mark.parametrize(
    ("name", "value"),
    [("split_batches", True), ("dispatch_batches", True), ("even_batches", False), ("use_seedable_sampler", False)],
)
def test_batches_are_ours_to_deal(name, value):
    assert only_problem({"accelerator_config": {name: value}}).startswith(f"accelerator_config.{name} is {value}: ")
    args = TrainingArguments(use_cpu=True, accelerator_config={name: value})
    assert [problem.split(" ")[0] for problem in problems(args, packing=True)] == [f"accelerator_config.{name}"]


def test_defaults_of_plain_training_arguments_are_nobodys_request():
    assert problems(transformers.TrainingArguments(use_cpu=True), packing=True) == []
    assert len(problems(transformers.TrainingArguments(use_cpu=True, use_cache=True), packing=True)) == 1
    unchecked = transformers.TrainingArguments(use_cpu=True)
    unchecked.fsdp = True
    assert "use hf_sft's TrainingArguments" in problems(unchecked, packing=True)[0]


def test_fields_of_other_trainers_are_not_swallowed():
    @dataclasses.dataclass
    class TheirConfig(transformers.TrainingArguments):
        learning_rate: float = 2e-5
        max_length: int | None = 1024
        packing: bool = False
        pad_to: int | str | None = "auto"
        extra: dict = dataclasses.field(default_factory=dict)

        def __post_init__(self):
            super().__post_init__()
            self.pad_to = None

    assert problems(TheirConfig(use_cpu=True), packing=True) == []
    assert problems(TheirConfig(use_cpu=True, max_length=64, packing=True, extra={"a": 1}), packing=True) == [
        "max_length is 64: TheirConfig's own fields are not read; set max_seq_length in DataArguments",
        "packing is True: TheirConfig's own fields are not read; set packing in DataArguments",
        "extra is {'a': 1}: TheirConfig's own fields are not read; leave it out, or use hf_sft's TrainingArguments",
    ]


def test_defaults_of_trl_are_nobodys_request():
    trl = pytest.importorskip("trl")
    assert problems(trl.SFTConfig(use_cpu=True), packing=True) == []
    assert len(problems(trl.SFTConfig(use_cpu=True, max_length=64), packing=True)) == 1


def test_from_python_too():
    class Adds(TrainingArguments):
        own: int = 5

    assert problems(Adds(use_cpu=True), packing=True) == []
    args = TrainingArguments(use_cpu=True, learning_rate=math.inf, num_train_epochs=math.nan)
    assert problems(args, packing=True) == [
        "num_train_epochs is nan: it must be a finite number",
        "learning_rate is inf: it must be a finite number",
    ]
    args = TrainingArguments(use_cpu=True)
    args.fp16 = True
    assert [problem[:12] for problem in problems(args, packing=True)] == ["fp16 is true"]
    theirs = transformers.TrainingArguments(use_cpu=True, push_to_hub=True, hub_model_id="a/b")
    assert [problem[:28] for problem in problems(theirs, packing=True)] == ["hub_strategy is 'every_save'"]


def test_activation_checkpointing_under_its_name():
    arguments = parse_values(
        {**GOOD, "activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
    )
    assert arguments.training.activation_checkpointing is True
    assert arguments.training.gradient_checkpointing is True  # what the Trainer of older releases reads
    assert arguments.training.activation_checkpointing_kwargs == {"use_reentrant": False}
