"""WeDLM on a real small Llama and real problems, in every train_mode: learned, saved, loaded again, decoded."""

from __future__ import annotations

import json

import pytest
import runs
import torch

from hf_sft.generation import generate_wedlm
from hf_sft.models.inference import load_for_inference

MODES = {
    "full": {"learning_rate": 2e-3},
    "lora": {"train_mode": "lora", "dtype": "float32", "lora_rank": 8, "learning_rate": 1e-2},
    "qlora": {"train_mode": "qlora", "dtype": "float32", "lora_rank": 8, "learning_rate": 1e-2},
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_stories_learn_sums(tmp_path, shared_data, mode: str) -> None:
    if mode == "qlora":
        pytest.importorskip("bitsandbytes")
    gsm8k = shared_data / "gsm8k"
    values = {
        "model_name_or_path": str(shared_data / "models" / "stories260k"), "train_file": str(gsm8k / "train.jsonl"),
        "eval_file": str(gsm8k / "test.jsonl"), "chat_template": "plain", "output_dir": str(tmp_path / "out"),
        "max_seq_length": 512, "max_train_samples": 400, "max_eval_samples": 40, "max_steps": 60,
        "per_device_train_batch_size": 4, "objective": "wedlm", "mask_token": "<|mask|>", "lr_scheduler_type": "cosine",
        "warmup_steps": 6, "eval_on_start": True, "save_strategy": "no", "logging_steps": 20, "seed": 1, "use_cpu": True,
        "disable_tqdm": True, **MODES[mode],
    }  # fmt: skip
    out = runs.train(values)
    after = json.loads((out / "eval_results.json").read_text())
    for key in ("eval_masked_loss", "eval_any_order_bound", "eval_perplexity", "eval_loss"):
        assert after[key] < 0.8 * runs.history(out, key)[0], key
    assert after["eval_masked_accuracy"] > runs.history(out, "eval_masked_accuracy")[0] + 0.05

    model, tokenizer = load_for_inference(str(out), dtype="float32")
    model.double()  # two ways to compute a greedy choice agree
    record = json.loads((gsm8k / "test.jsonl").read_text().splitlines()[0])
    chat = [{"role": "user", "content": record["question"]}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
    free = generate_wedlm(model, prompt, max_new_tokens=40)
    verified = generate_wedlm(model, prompt, max_new_tokens=40, verify=True)
    mask = json.loads((out / "generation_config.json").read_text())["mask_token_id"]
    assert mask not in free.sequences[0] and free.tokens_per_forward >= 1 and verified.tokens_per_forward >= 1
    with torch.no_grad():
        want = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=40, do_sample=False,
            suppress_tokens=[mask],
        )  # fmt: skip
    assert verified.sequences[0] == want[0, len(prompt) :].tolist()
