"""Old keys become new ones, with one line each; contradictions and what cannot be honoured are problems."""

from __future__ import annotations

import dataclasses
import json

import pytest

from hf_sft.arguments import GROUPS
from hf_sft.legacy import ENVIRONMENT, LEGACY, LEGACY_VALUES, MODE_FLAGS, translate
from hf_sft.legacy.rules import Only
from hf_sft.legacy.table import ORIGINS
from hf_sft.legacy.translate import STILL_FIELDS
from hf_sft.parsing import ArgumentsError, parse_args, parse_values
from hf_sft.training_arguments import TrainingArguments

OWN = {entry.name for cls in GROUPS for entry in dataclasses.fields(cls)}
ALL = OWN | ENVIRONMENT.keys() | {entry.name for entry in dataclasses.fields(TrainingArguments)}


def test_table_points_from_old_names_to_existing_ones():
    assert (LEGACY.keys() | MODE_FLAGS.keys()) & ALL == set(STILL_FIELDS)  # deprecated, not gone, in transformers 5
    assert {key for rule in LEGACY.values() for key in rule.keys} <= ALL
    assert LEGACY_VALUES.keys() <= ALL
    assert not LEGACY.keys() & MODE_FLAGS.keys()


def test_every_old_key_has_a_place_in_the_docs_and_a_reason_where_it_goes():
    told = {key for _, _, keys in ORIGINS for key in keys}
    assert told >= LEGACY.keys() | MODE_FLAGS.keys()
    assert told <= LEGACY.keys() | MODE_FLAGS.keys() | ALL
    assert [key for key, rule in LEGACY.items() if not rule.keys and not (rule.note or rule.why)] == []


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
        *(
            ({key: 5}, {"max_seq_length": 5, "overlength": "truncate"})
            for key in ("max_length", "model_max_length", "cutoff_len", "max_seq_len", "seq_length")
        ),
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
        ({"finetuning_type": "lora", "quantization_bit": 4}, {"train_mode": "qlora", "quantization": "nf4"}),
        ({"finetuning_type": "lora", "quantization_bit": None}, {"train_mode": "lora"}),
        ({"lora_weight_path": ""}, {}),
        ({"eval_data_path": "None"}, {}),
        ({"template": "default"}, {}),
        ({"template": "mixtral"}, {"chat_template": "mistral"}),
        ({"add_special_tokens": "<a>,<b>"}, {"new_special_tokens": ["<a>", "<b>"]}),
        ({"model_load_delay_per_rank": 10}, {"max_loading_processes": 1}),
        ({"model_load_delay_per_rank": 0}, {}),
        ({"uft": "true"}, {"task_type": "pretrain"}),
        ({"use_wandb": True, "report_to": "wandb"}, {"report_to": "wandb"}),
        ({"steps": None, "lr0": None, "wandb_team": None, "template_dir": None}, {}),
        ({"use_lora": True, "bit": 4}, {"train_mode": "qlora", "quantization": "nf4"}),
        (
            {"batch_size": 4, "eval_batch_size": 8},
            {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 8, "packing": False},
        ),
        ({"batch_size": 4}, {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "packing": False}),
        ({"eval_every": 50}, {"eval_strategy": "steps", "eval_steps": 50}),
        ({"use_wandb": True, "wandb_team": "t"}, {"report_to": ["wandb"], "wandb_entity": "t"}),
        ({"use_wandb": False, "wandb_run_name": "r"}, {"run_name": "r"}),
        # DeepSpeed by keys
        ({"use_deepspeed": True}, {"zero_stage": 2}),
        (
            {"use_deepspeed": True, "deepspeed_zero_stage": 3, "deepspeed_offload_param": True},
            {"zero_stage": 3, "offload_param": "cpu"},
        ),
        ({"use_deepspeed": True, "deepspeed_zero_stage": 2, "deepspeed_offload_param": True}, {"zero_stage": 2}),
        (
            {
                "use_deepspeed": False,
                "deepspeed_zero_stage": 2,
                "deepspeed_offload_optimizer": True,
                "deepspeed_config_file": "a.json",
            },
            {},
        ),
        (
            {
                "deepspeed_zero_stage": 2,
                "deepspeed_offload_optimizer": True,
                "deepspeed_offload_nvme": True,
                "deepspeed_nvme_path": "/disk",
            },
            {"zero_stage": 2, "offload_optimizer": "nvme", "nvme_path": "/disk"},
        ),
        ({"deepspeed_nvme_path": "/disk", "deepspeed_pin_memory": True}, {}),
        (
            {"use_deepspeed": True, "deepspeed_config_file": "a.json", "deepspeed_zero_stage": 2},
            {"deepspeed": "a.json"},
        ),
        # preferences
        ({"pref_beta": 0.2, "pref_loss": "simpo"}, {"dpo_beta": 0.2, "dpo_loss_type": "simpo"}),
        ({"loss_type": ["ipo"]}, {"dpo_loss_type": "ipo"}),
        ({"loss_type": "sigmoid_norm"}, {"dpo_loss_type": "sigmoid", "dpo_length_normalized": True}),
        ({"rpo_alpha": None}, {}),
        ({"rpo_alpha": 0.5, "dpo_label_smoothing": 0.1}, {"dpo_sft_weight": 0.5, "label_smoothing": 0.1}),
        ({"ref_model": "m"}, {"dpo_reference": "model", "reference_model_name_or_path": "m"}),
        ({"ref_model": None, "precompute_ref_log_probs": True}, {"dpo_reference": "precomputed"}),
        (
            {"max_completion_length": 100, "max_length": 300},
            {"max_answer_length": 100, "max_seq_length": 300, "overlength": "truncate"},
        ),
        # lr0 and its kin
        (
            {"gradient_checkpointing": {"activate": False, "checkpoint_type": "hf_checkpoint"}},
            {"activation_checkpointing": False},
        ),
        ({"device": "cpu"}, {"use_cpu": True}),
        ({"device": [0, 1]}, {}),
        ({"bit": 32}, {}),
        ({"bit": "bfloat16"}, {"bf16": True}),
        ({"bit": 16}, {"fp16": True}),
        ({"bit": 8, "train_mode": "qlora"}, {"quantization": "int8", "train_mode": "qlora"}),
        ({"peft_config_path": False}, {"train_mode": "full"}),
        ({"amp_training": True, "bit": "bf16"}, {"bf16": True}),
        ({"epochs": 4, "steps": 100}, {"num_train_epochs": 4, "max_steps": 100}),
        (
            {"epochs": 4, "warmup_epochs": 1, "steps": 9, "warmup_steps": 3, "optimizer_step_criterion": "epoch"},
            {"num_train_epochs": 4, "warmup_steps": 0.25},
        ),
        (
            {"epochs": 4, "warmup_epochs": 1, "steps": 9, "warmup_steps": 3, "optimizer_step_criterion": "step"},
            {"max_steps": 9, "warmup_steps": 3},
        ),
        ({"lr0": 1e-3, "lrf": 0, "scheduler_type": "linear"}, {"learning_rate": 1e-3, "lr_scheduler_type": "linear"}),
        ({"lrf": 0}, {"lr_scheduler_type": "cosine"}),
        (
            {"validation_step_interval_prop": 0.5, "epochs": 4, "eval_split": 9},
            {"eval_strategy": "steps", "eval_steps": 0.125, "num_train_epochs": 4, "eval_split": 9},
        ),
        ({"validation_step_interval_prop": 1}, {}),
        ({"fast_validation_n": 8}, {}),
        ({"fast_validation_n": 8, "eval_split": 9}, {"max_eval_samples": 8, "eval_split": 9}),
        ({"pad_token_id": "add"}, {}),
        ({"pad_token_id": 5, "cls_token_id": "add"}, {}),
        ({"project": "out/", "name": "a"}, {"output_dir": "out/a"}),
        ({"name": "a", "output_dir": "o"}, {"output_dir": "o", "run_name": "a"}),
        ({"data_train_type": ["ar"]}, {"task_type": "pretrain"}),
        ({"model": "a/b", "model_size": None}, {"model_name_or_path": "a/b"}),
        ({"model": "gemma", "model_size": "2b", "model_name_or_path": "a"}, {"model_name_or_path": "a"}),
        ({"adapter_save_type": "merge", "half_inference": True, "ema_updating": False, "early_stop_criterion": 5}, {}),
        ({"ema_updating": True, "metrics": ["ppl"]}, {"ema_decay": 0.999}),
        ({"metrics": ["ppl", "bleu"]}, {}),
        ({"early_stop_criterion": 5, "eval_split": 9}, {"eval_split": 9}),
        (
            {"early_stop_criterion": 5, "metrics": ["bleu"], "eval_split": 9, "eval_strategy": "epoch"},
            {"early_stopping_patience": 5, "generation_eval_steps": 0, "eval_split": 9, "eval_strategy": "epoch"},
        ),
        ({"fsdp_train": False, "fsdp_hyperparameters": {"cpu_offload": True}}, {}),
        (
            {
                "fsdp_train": True,
                "fsdp_hyperparameters": {
                    "cpu_offload": True,
                    "amp_training": True,
                    "wrap_policy": "transformer_based",
                    "transformer_based": {"fsdp_layer_cls": "LlamaDecoderLayer"},
                },
            },
            {
                "fsdp": True,
                "fp16": True,
                "fsdp_config": {"cpu_offload": True, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
            },
        ),
        (
            {"min_lr": 1e-6, "lr_scheduler": "cosine"},
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-6}},
        ),
        (
            {"min_lr_ratio": 0.1, "lr_scheduler_type": "cosine"},
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        ),
    ],
)
def test_translations(old, new):
    values, notes, problems = translate(old)
    assert values == new
    assert problems == []
    lived = old.keys() & (LEGACY.keys() | LEGACY_VALUES.keys() | MODE_FLAGS.keys())
    implied = values.keys() & {"packing", "overlength"}
    assert len(notes) == len(lived) + len(implied)
    assert all(note.startswith((*lived, *implied)) for note in notes if " is " in note)


def test_lists_in_one_word_and_empty_values():
    values, notes, problems = translate({"lora_target_modules": "q_proj, v_proj", "eval_file": "", "train_file": "a,b"})
    assert values == {"lora_target_modules": ["q_proj", "v_proj"], "train_file": "a,b"}
    assert problems == []
    assert notes == [
        "eval_file is empty and is no longer used",
        "lora_target_modules q_proj, v_proj is now q_proj v_proj",
    ]
    pattern = {"lora_target_modules": r".*\.(q_proj|v_proj){1,2}"}
    assert translate(pattern) == (pattern, [], [])


def test_old_wedlm_files_name_no_objective():
    assert translate({"model_path": "m", "block_size": 8})[0]["objective"] == "wedlm"
    assert "objective" not in translate({"model_name_or_path": "m", "block_size": 8})[0]
    assert translate({"model_path": "m", "block_size": 8, "objective": "causal"})[0]["objective"] == "causal"
    assert "objective" not in translate({"model_path": "m"})[0]


def test_fields_of_an_adapter_file(tmp_path):
    file = tmp_path / "adapter.yaml"
    file.write_text("type: lora\nr: 4\nlora_alpha: 8\ntarget_modules: all-linear\nbias: none\ntask_type: CAUSAL_LM\n")
    values, _, problems = translate({"peft_config_path": str(file), "bit": 4})
    assert problems == []
    assert values == {"train_mode": "qlora", "quantization": "nf4", "lora_rank": 4, "lora_alpha": 8, "lora_bias": "none",
                      "lora_target_modules": ["all-linear"]}  # fmt: skip
    for text, sentence in (
        ("peft_type: IA3\n", "adapters are LoRA"),
        ("r: 4\nlayers_to_transform: [1]\n", "its layers_to_transform is [1], which no argument says"),
        ("- r\n", "holds no object"),
        ("r: [\n", "no valid YAML"),
    ):
        file.write_text(text)
        (problem,) = translate({"peft_config_path": str(file)})[2]
        assert sentence in problem
    (problem,) = translate({"peft_config_path": str(tmp_path / "nowhere.json")})[2]
    assert "name a JSON or YAML file" in problem


def test_file_of_a_quantised_base(tmp_path):
    file = tmp_path / "quant.json"
    file.write_text('{"load_in_4bit": true, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": false}')
    old = {"quant_config": str(file), "bit": 4, "train_mode": "qlora"}
    assert translate(old)[0] == {"quantization": "nf4", "double_quantization": False, "train_mode": "qlora"}
    assert translate({**old, "bit": 32})[0] == {"train_mode": "qlora", "dtype": "float32"}
    file.write_text('{"bnb_4bit_quant_type": "fp4"}')
    assert "the 4-bit type is nf4" in translate(old)[2][0]


@pytest.mark.parametrize("key", sorted(key for key, rule in LEGACY.items() if isinstance(rule.value, Only)))
def test_what_cannot_be_honoured_is_refused_with_the_reason(key):
    rule = LEGACY[key]
    for word in rule.value.words:
        assert translate({key: word})[2] == []
    (problem,) = translate({key: "something else"})[2]
    assert problem == f"{key} is 'something else': {rule.value.why}"


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
        {"ema_updating": "often"},
        {"add_eos_token_when_response_end": False},
        {"gradient_checkpointing": {"activte": True}},
        {"bit": 4},
        {"bit": 5},
        {"lrf": 2},
        {"model": "gemma", "model_size": "2b"},
        {"batch_size": 128, "micro_batch_size": 4},
        {"fast_validation_n": 0.5, "eval_split": 9},
        {"finetuning_type": "freeze"},
        {"data_train_type": ["qa", "ar"]},
        {"warmup_epochs": 5, "epochs": 2},
        {"min_lr": 1e-5, "lr_scheduler_type": "linear"},
        {"loss_type": ["sigmoid", "sft"]},
        {"fsdp_hyperparameters": {"cpu_ofload": True}},
        {"validation_step_interval_prop": 3},
        {"use_deepspeed": "perhaps"},
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


def test_passwords_in_addresses_are_neither_taken_nor_shown(tmp_path, capsys):
    """Neither by a run nor by migrate, under the old name and under today's."""
    from hf_sft.cli import main

    for key in ("wandb_host", "wandb_base_url"):
        old = tmp_path / f"{key}.json"
        old.write_text(
            json.dumps({"model_path": "m", "train_data": "d", "output_dir": "o", key: "https://me:geheim@host"})
        )
        with pytest.raises(ArgumentsError) as raised:
            parse_args([str(old)])
        assert "set WANDB_BASE_URL in the environment" in str(raised.value) and "geheim" not in str(raised.value)
        assert main(["migrate", str(old), str(tmp_path / "new.yaml")]) != 0
        captured = capsys.readouterr()
        assert "geheim" not in captured.out + captured.err and not (tmp_path / "new.yaml").exists()


@pytest.mark.parametrize(
    ("old", "sentence"),
    [
        (
            {"fsdp_train": True, "fsdp_hyperparameters": {"transformer_based": 3}},
            "transformer_based in it must be an object",
        ),
        ({"fsdp_train": True, "fsdp_hyperparameters": 3}, "it must be an object"),
    ],
)
def test_objects_of_another_shape(old, sentence):
    assert any(sentence in problem for problem in translate(old)[2])


def test_samples_for_an_evaluation_that_is_not_there():
    values, notes, problems = translate({"lr0": 1e-3, "fast_validation_n": 2})
    assert "max_eval_samples" not in values and not problems
    assert any("no evaluation data are named" in note for note in notes)
