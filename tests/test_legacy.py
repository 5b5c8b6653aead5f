"""Old keys become new ones, with one line each; contradictions and what cannot be honoured are problems."""

from __future__ import annotations

import dataclasses

import pytest

from hf_sft.arguments import DataArguments, EngineArguments, LoraArguments, ModelArguments
from hf_sft.legacy import LEGACY, LEGACY_VALUES, MODE_FLAGS, translate
from hf_sft.parsing import ArgumentsError, parse_args, parse_values
from hf_sft.training_arguments import TrainingArguments

CLASSES = (ModelArguments, DataArguments, LoraArguments, EngineArguments)
OWN = {entry.name for cls in CLASSES for entry in dataclasses.fields(cls)}
ALL = OWN | {entry.name for entry in dataclasses.fields(TrainingArguments)}
STILL_FIELDS = {"gradient_checkpointing", "gradient_checkpointing_kwargs"}  # deprecated, not gone, in transformers 5


def test_table_points_from_old_names_to_existing_ones():
    assert (LEGACY.keys() | MODE_FLAGS.keys()) & ALL == STILL_FIELDS
    assert {rule.new for rule in LEGACY.values() if rule.new} <= ALL
    assert LEGACY_VALUES.keys() <= ALL
    assert not LEGACY.keys() & MODE_FLAGS.keys()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"evaluation_strategy": "steps"}, {"eval_strategy": "steps"}),
        ({"warmup_ratio": "0.03"}, {"warmup_steps": 0.03}),
        ({"no_cuda": True}, {"use_cpu": True}),
        ({"group_by_length": True}, {"train_sampling_strategy": "group_by_length"}),
        ({"group_by_length": False}, {}),
        ({"overwrite_output_dir": True}, {}),
        ({"logging_dir": "runs"}, {}),
        ({"save_safetensors": True}, {}),
        ({"optim": "adamw_hf"}, {"optim": "adamw_torch"}),
        ({"gradient_checkpointing": True}, {"activation_checkpointing": True}),
        ({"torch_dtype": "bf16"}, {"dtype": "bfloat16"}),
        ({"dtype": "bf16"}, {"dtype": "bfloat16"}),
        ({"fsdp_min_num_params": 0}, {}),
        ({"adafactor": True}, {"optim": "adafactor"}),
        (
            {"dispatch_batches": False, "split_batches": False},
            {"accelerator_config": {"dispatch_batches": False, "split_batches": False}},
        ),
        ({"data_path": "a"}, {"train_file": "a"}),
        ({"train_data": "a", "eval_data_path": "b"}, {"train_file": "a", "eval_file": "b"}),
        ({"model_path": "m"}, {"model_name_or_path": "m"}),
        ({"max_length": 5}, {"max_seq_length": 5}),
        ({"model_max_length": 5}, {"max_seq_length": 5}),
        ({"cutoff_len": 5}, {"max_seq_length": 5}),
        ({"lora_r": 5}, {"lora_rank": 5}),
        ({"lr": 1e-4, "epochs": 2}, {"learning_rate": 1e-4, "num_train_epochs": 2}),
        ({"lora_target": "q_proj, v_proj"}, {"lora_target_modules": ["q_proj", "v_proj"]}),
        ({"lora_target": "all"}, {"lora_target_modules": ["all-linear"]}),
        ({"lora_weight_path": "a"}, {"adapter_name_or_path": "a"}),
        ({"template_name": "chatml"}, {"chat_template": "chatml"}),
        ({"tokenize_num_workers": 8}, {"preprocessing_num_workers": 8}),
        ({"val_size": "0.1"}, {"eval_split": 0.1}),
        ({"validation_split_percentage": 5}, {"eval_split": 0.05}),
        ({"quantization_bit": 4}, {"quantization": "nf4"}),
        ({"load_in_8bit": True}, {"quantization": "int8"}),
        ({"deepspeed_zero_stage": 0}, {}),
        ({"deepspeed_zero_stage": 2}, {"zero_stage": 2}),
        (
            {"fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer"},
            {"fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}},
        ),
        ({"val_size": 0.0}, {}),
        ({"stage": "sft", "finetuning_type": "lora"}, {"task_type": "sft", "train_mode": "lora"}),
    ],
)
def test_translations(old, new):
    values, notes, problems = translate(old)
    assert values == new
    assert problems == []
    assert len(notes) == len(old)
    assert all(note.startswith(tuple(old)) for note in notes)


def test_new_keys_pass_silently():
    assert translate({"lora_rank": 8, "unknown": 1}) == ({"lora_rank": 8, "unknown": 1}, [], [])


@pytest.mark.parametrize(
    ("flags", "mode"),
    [
        ({"use_lora": True}, "lora"),
        ({"use_peft": True}, "lora"),
        ({"q_lora": True}, "qlora"),
        ({"use_qlora": "true"}, "qlora"),
        ({"use_lora": True, "q_lora": True}, "qlora"),
        ({"use_lora": True, "q_lora": False}, "lora"),
        ({"use_lora": True, "train_mode": "qlora"}, "qlora"),
        ({"use_lora": True, "train_mode": "lora"}, "lora"),
        ({"use_lora": False, "q_lora": False}, None),
        ({"use_lora": False, "train_mode": "full"}, "full"),
    ],
)
def test_flags_say_the_train_mode(flags, mode):
    values, notes, problems = translate(flags)
    assert problems == []
    assert values.get("train_mode") == mode
    assert len(notes) == len(flags.keys() & MODE_FLAGS.keys())


@pytest.mark.parametrize(
    "old",
    [
        {"q_lora": True, "train_mode": "full"},
        {"q_lora": True, "train_mode": "lora"},
        {"q_lora": False, "train_mode": "qlora"},
        {"use_lora": False, "train_mode": "lora"},
        {"use_lora": False, "q_lora": True},
        {"use_lora": "perhaps"},
        {"lora_r": 8, "lora_rank": 16},
        {"max_length": 8, "cutoff_len": 16},
        {"warmup_ratio": 0.1, "warmup_steps": 100},
        {"warmup_ratio": 1.0},
        {"warmup_ratio": "many"},
        {"save_safetensors": False},
        {"fsdp_min_num_params": 1000},
        {"flash_attn": "fa2"},
        {"bnb_4bit_quant_type": "fp4"},
        {"use_ipex": True},
        {"val_size": "some"},
        {"eos_token": "<|im_end|>"},
    ],
)
def test_contradictions_are_problems(old):
    _, _, problems = translate(old)
    assert len(problems) == 1
    assert all(problem.startswith(tuple(old)) for problem in problems)


def test_the_same_thing_said_twice_is_no_contradiction():
    values, notes, problems = translate({"lora_r": 8, "lora_rank": "8", "gradient_checkpointing": False,
                                         "activation_checkpointing": False})  # fmt: skip
    assert (values["lora_rank"], values["activation_checkpointing"]) == ("8", False)
    assert problems == []
    assert len(notes) == 2


def test_command_line_wins_over_an_old_key_of_the_file(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("model_path: m\ndata_path: t\nuse_lora: true\nlora_r: 8\nno_cuda: true\nwarmup_ratio: 3e-2\n")
    arguments = parse_args([str(file), "--lora_rank", "16"])
    assert arguments.lora.lora_rank == 16
    assert arguments.model.train_mode == "lora"
    assert arguments.training.warmup_steps == 0.03
    assert "lora_r is now lora_rank (8)" in arguments.notes
    assert "warmup_ratio is now warmup_steps (0.03): below 1 it is a share of all steps" in arguments.notes


def test_problems_of_old_and_new_keys_come_together():
    with pytest.raises(ArgumentsError) as caught:
        parse_values({"model_path": "m", "train_data": "t", "no_cuda": True, "q_lora": True, "train_mode": "full",
                      "group_by_length": True})  # fmt: skip
    first, second = caught.value.problems
    assert first.startswith("q_lora is true, and train_mode says 'full'")
    assert second.startswith("train_sampling_strategy is 'group_by_length'")
