"""The old configurations of tests/old_configs, and a folder with the models and data that they name."""

from __future__ import annotations

import json
from pathlib import Path

import runs
import tiny

from hf_sft.legacy.shell import flags_of_script

SAMPLES = sorted((Path(__file__).parent / "old_configs").iterdir())


def sample(name: str) -> Path:
    (path,) = [path for path in SAMPLES if path.name == name]
    return path


def words(path: Path) -> list[str]:
    """The command line that runs a sample."""
    return flags_of_script(path.read_text()) if path.suffix == ".sh" else [str(path)]


def make_folder(folder: Path) -> Path:
    """Models and data below ``folder``, under the names of the samples."""
    for name, family in (("tiny", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")):
        tiny.save_tiny(folder / "models" / name, family)
    tiny.tiny_model("gpt_neox", max_position_embeddings=2048).save_pretrained(folder / "models" / "neox")
    tiny.tiny_tokenizer(None).save_pretrained(folder / "models" / "neox")  # of pythia: no chat template
    data = folder / "data"
    (data / "texts").mkdir(parents=True)
    conversations = tiny.conversations(24, seed=1)
    runs.write_jsonl(data / "train.jsonl", conversations)
    runs.write_jsonl(data / "eval.jsonl", tiny.conversations(6, seed=2))
    names = {"user": "user", "assistant": "assistant"}
    for split, rows in (("train", conversations), ("eval", conversations[:5])):
        turns = [[{"from": names[turn["role"]], "value": turn["content"]} for turn in row] for row in rows]
        records = [{"id": f"identity_{n}", "conversations": row} for n, row in enumerate(turns)]
        (data / f"{split}.json").write_text(json.dumps(records))
    pairs = [{"prompt": row[0]["content"], "chosen": row[1]["content"], "rejected": "no"} for row in conversations]
    runs.write_jsonl(data / "pairs.jsonl", pairs)
    texts = [{"text": " ".join(turn["content"] for turn in row)} for row in conversations]
    runs.write_jsonl(data / "texts" / "a.jsonl", texts)
    adapter = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "bias": "none",
        "target_modules": ["q_proj", "v_proj"], "modules_to_save": None, "inference_mode": False,
    }  # fmt: skip
    (data / "adapter.json").write_text(json.dumps(adapter))
    columns = {"messages": "conversations"}
    named = {
        "identity": {"file_name": "train.json", "formatting": "sharegpt", "columns": columns},
        "talks": {"file_name": "train.jsonl"},
        "held_out": {"file_name": "eval.json", "formatting": "sharegpt"},
    }
    (data / "dataset_info.json").write_text(json.dumps(named))
    for split in ("train", "eval"):
        write_arrow(data / f"{split}.arrow")
    write_flat_arrow(data / "uft.arrow")
    return folder


def token_rows() -> list[dict[str, list[int]]]:
    tokenizer = tiny.tiny_tokenizer(None)
    rows = []
    for row in tiny.conversations(12, seed=3):
        prompt, answer = (tokenizer(turn["content"]).input_ids for turn in row[:2])
        answer = [*answer, tokenizer.eos_token_id]
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return rows


def write_arrow(path: Path) -> None:
    """Token rows as Pygmalion's tokenize_data_sft.py wrote them: an Arrow file with int64 lists and an index."""
    import pyarrow as pa

    rows = token_rows()
    columns = {name: pa.array([row[name] for row in rows], pa.list_(pa.int64())) for name in ("input_ids", "labels")}
    table = pa.table({**columns, "__index_level_0__": pa.array(range(len(rows)), pa.int64())})
    with pa.OSFile(str(path), "wb") as sink, pa.RecordBatchFileWriter(sink, table.schema) as writer:
        writer.write_table(table)


def write_flat_arrow(path: Path) -> None:
    """Token ids as its tokenize_data_uft.py wrote them: one integer per row, one text per record batch."""
    import pyarrow as pa

    schema = pa.schema([pa.field("input_ids", pa.int64())])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for row in token_rows():
            writer.write(pa.record_batch([pa.array(row["input_ids"], pa.int64())], schema=schema))
