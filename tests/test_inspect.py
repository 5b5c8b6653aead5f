"""Pictures say what the batches say; and ``hf-sft inspect`` draws them, or says what stands in the way."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import runs
import tiny
from test_exporting import mask_tokenizer, save_source
from test_wedlm_collator import collator, rows
from tiny import conversations, tiny_tokenizer

from hf_sft import drawing
from hf_sft.attention.layout import Layout
from hf_sft.collators import CausalCollator, WeDLMCollator
from hf_sft.commands import inspect, masks
from hf_sft.drawing import CLEAN_TO_CLEAN, HIDDEN, IN_BLOCK, NOISY_TO_CLEAN, classify, mask_panel, token_text
from hf_sft.noise import MaskRule

needs_matplotlib = pytest.mark.skipif(drawing.find_spec("matplotlib") is None, reason="matplotlib is not installed")


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of a PNG in pixels."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


@pytest.fixture
def drawn(monkeypatch) -> dict:
    """What the command hands to the drawing functions."""
    seen: dict = {}
    masks, order = drawing.draw_masks, drawing.draw_order

    def keep_masks(panels, path, title):
        seen.update(panels=panels, title=title)
        return masks(panels, path, title)

    def keep_order(tokens, numbers, path, title):
        seen.update(tokens=tokens, order=numbers, title=title)
        return order(tokens, numbers, path, title)

    monkeypatch.setattr(drawing, "draw_masks", keep_masks)
    monkeypatch.setattr(drawing, "draw_order", keep_order)
    return seen


# The classes of pairs


@pytest.mark.parametrize("elide", [False, True], ids=["full", "elided"])
def test_each_pair_has_the_class_of_what_it_joins(elide) -> None:
    batch = collator(elide=elide)([rows()])
    layout = Layout.from_batch(batch)
    classes, allowed = classify(layout), layout.allowed().numpy()
    block, doc = layout.block.tolist(), layout.doc.tolist()
    for q in range(len(doc)):
        for k in range(len(doc)):
            kind = IN_BLOCK if block[k] >= 0 else NOISY_TO_CLEAN if block[q] >= 0 else CLEAN_TO_CLEAN
            assert classes[q, k] == (kind if allowed[q, k] else HIDDEN)
            if classes[q, k] == IN_BLOCK:
                assert doc[q] == doc[k] and block[q] == block[k] and k <= q
    assert set(np.unique(classes)) == {HIDDEN, CLEAN_TO_CLEAN, NOISY_TO_CLEAN, IN_BLOCK}


def test_without_noisy_streams_there_is_one_class() -> None:
    layout = Layout.from_batch(CausalCollator()([rows()]))
    assert np.array_equal(classify(layout), layout.allowed().numpy() * CLEAN_TO_CLEAN)


def test_a_panel_by_hand() -> None:
    """One document of 4 tokens in blocks of 2: its last two are answered, and both are masked."""
    row = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}
    seeded = (WeDLMCollator(9, MaskRule(2), seed) for seed in range(99))
    whole = next(collate for collate in seeded if slots(collate, row) == 2)
    panel = mask_panel(whole([[row]]), str, "elided")
    assert panel.labels == ["0:5", "1:6", "2:7", "3:8", "2:[M] 7", "3:[M] 8"]  # labelled by what they must predict
    assert panel.slot.tolist() == panel.noisy.tolist() == [False] * 4 + [True] * 2
    assert panel.documents == [(0, 6)] and panel.blocks == [(4, 6)]
    assert panel.title == "elided: 6 tokens, 17 of 36 pairs are seen"
    assert panel.classes.tolist() == [
        [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0],
        [2, 2, 0, 0, 3, 0], [2, 2, 0, 0, 3, 3],
    ]  # fmt: skip
    full = mask_panel(replace(whole, elide=False)([[row]]), str, "full")
    assert full.blocks == [(4, 6), (6, 8)] and full.noisy.sum() == 4 and full.slot.sum() == 2
    assert drawing.text_picture(panel).splitlines()[1:3] == ["    0:5  x . . . . .", "    1:6  x x . . . ."]
    assert drawing.text_picture(panel).splitlines()[-1] == "3:[M] 8  x x . . x x"


def slots(collate: WeDLMCollator, row: dict) -> int:
    return int((collate([[row]])["target_kind"] == 1).sum())


def test_documents_and_blocks_of_packed_rows() -> None:
    batch = collator()([rows()])
    panel = mask_panel(batch, str, "")
    lengths = batch["doc_lengths"]
    assert panel.documents == [(sum(lengths[:n]), sum(lengths[: n + 1])) for n in range(len(lengths))]
    assert sum(end - start for start, end in panel.blocks) == panel.noisy.sum()
    doc, block = batch["doc_ids"][0], batch["block_ids"][0]
    for start, end in panel.blocks:
        assert len(set(doc[start:end].tolist())) == len(set(block[start:end].tolist())) == 1
    assert np.array_equal(panel.slot, (batch["input_ids"][0] == 258).numpy())


def test_texts_of_tokens() -> None:
    assert token_text(" is\n\t") == "␣is\\n\\t"
    assert token_text("x" * 14) == "x" * 14 and token_text("x" * 15) == "x" * 13 + "…"


# Drawing


@needs_matplotlib
@pytest.mark.parametrize("name", ["a.png", "a.svg", "a.pdf"])
def test_the_example_is_drawn_offline(tmp_path, capsys, name) -> None:
    out = tmp_path / "new" / name
    assert inspect.main(["--masks", "--output", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    if name.endswith("png"):
        width, height = size_of(out)
        assert width == 2010 and 1000 < height < 1700
        assert 20_000 < out.stat().st_size < 200_000
        with pytest.raises(ValueError, match=r"exists: name another file, or add --overwrite"):
            inspect.main(["--masks", "--output", str(out)])
        before = out.read_bytes()
        assert inspect.main(["--masks", "--output", str(out), "--overwrite", "--epoch", "1"]) == 0
        assert out.read_bytes() != before  # other noise


@needs_matplotlib
def test_the_picture_in_the_docs_is_the_examples(tmp_path, drawn) -> None:
    inspect.main(["--masks", "--output", str(tmp_path / "masks.png")])
    full, elided = drawn["panels"]
    assert drawn["title"] == "WeDLM attention mask, blocks of 4 tokens"
    assert len(full.labels) == 32 and len(elided.labels) == 22
    assert full.slot.sum() == elided.slot.sum() == 5
    assert "6:is" in elided.labels and "5:[M] capital" in elided.labels  # observed before masked, out of order
    shown = Path(__file__).resolve().parents[1] / "docs" / "pictures" / "wedlm-mask.png"
    assert size_of(shown) == size_of(tmp_path / "masks.png")


@needs_matplotlib
@pytest.mark.parametrize("length", [1, 3, 40, 95])
def test_the_decoding_order_is_drawn(tmp_path, length) -> None:
    order = [1 + place // 2 for place in range(length)]
    tokens = ["$x_{", "語", "\\n", "<end>"] * length  # no formula, a letter that the font lacks
    out = drawing.draw_order(tokens[:length], order, tmp_path / "order.png", "Decoding order")
    width, height = size_of(out)
    assert 850 <= width <= 2010 and 300 < height < 4000


@needs_matplotlib
def test_long_documents_are_drawn_without_labels(tmp_path) -> None:
    panel = mask_panel(collator()([rows()]), str, "elided")
    assert len(panel.labels) > 100
    assert size_of(drawing.draw_masks([panel], tmp_path / "a.png", "long"))[0] == 2010


def test_an_order_needs_a_number_for_each_token(tmp_path) -> None:
    for tokens, order in ((["a"], [1, 2]), ([], [])):
        with pytest.raises(ValueError, match="give one for each"):
            drawing.draw_order(tokens, order, tmp_path / "a.png", "")


def test_without_matplotlib(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(drawing, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        inspect.main(["--masks", "--output", str(tmp_path / "a.png")])
    assert inspect.main(["--masks", "--text"]) == 0  # needs none
    text = capsys.readouterr().out
    assert "full: 32 tokens, 152 of 1,024 pairs are seen" in text
    assert "  9:[M] <end>  x x x x x x x x x . . . . x" in text
    assert list(tmp_path.iterdir()) == []


# Of a run, and of a model


def run_file(tmp_path: Path, **fields) -> tuple[str, str, str]:
    """(run file, model, data) of a WeDLM run on two-turn conversations."""
    model = save_source(tmp_path / "model", mask=None)
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(json.dumps({"messages": row}) for row in conversations(6)), encoding="utf-8")
    run = tmp_path / "run.json"
    values = {
        "model_name_or_path": model, "train_file": str(data), "objective": "wedlm", "mask_token": "<|mask|>", "block_size": 8,
        "seed": 3, "bf16": True, "output_dir": str(tmp_path / "out"),
    }  # fmt: skip
    run.write_text(json.dumps({**values, **fields}))
    return str(run), model, str(data)


@needs_matplotlib
def test_the_noise_is_that_of_the_run(tmp_path, drawn) -> None:
    from hf_sft.data.bins import Bins
    from hf_sft.data.chat import encode_conversations
    from hf_sft.data.formats import to_conversation

    run, model, data = run_file(tmp_path, num_learnable_im_end=0)
    picture = str(tmp_path / "a.png")
    inspect.main(["--masks", "--train_args_file", run, "--documents", "4", "2", "--epoch", "2", "--output", picture])
    full, elided = drawn["panels"]
    token_rows = encode_conversations(
        mask_tokenizer(), [to_conversation({"messages": row}) for row in conversations(6)]
    )
    bins = Bins(token_rows, None)
    batch = WeDLMCollator(259, MaskRule(8), seed=3)([bins[2, 4], bins[2, 2]])
    assert np.array_equal(elided.classes, classify(Layout.from_batch(batch)))
    assert np.array_equal(elided.slot, (batch["input_ids"][0] == 259).numpy())
    assert full.slot.sum() == elided.slot.sum() > 0
    assert drawn["title"] == "WeDLM attention mask, blocks of 8 tokens (documents 4, 2, epoch 2)"
    assert not (tmp_path / "out").exists()
    words = ["--masks", "--model", model, "--file", data, "--documents", "4", "2", "--epoch", "2", "--overwrite"]
    words += [
        "--output",
        picture,
        "--mask_token_id",
        "259",
        "--block_size",
        "8",
        "--seed",
        "3",
        "--num_learnable_im_end",
        "0",
    ]
    inspect.main(words)
    assert np.array_equal(drawn["panels"][1].classes, elided.classes)


@needs_matplotlib
@pytest.mark.parametrize("verify", [False, True])
def test_the_order_of_a_model(tmp_path, drawn, capsys, verify) -> None:
    model = save_source(tmp_path / "model")
    words = ["--masks", "--model", model, "--prompt", "Hi", "--max_new_tokens", "12", "--text"]
    words += ["--output", str(tmp_path / "order.png")] + ["--verify"] * verify
    assert inspect.main([*words, "--entropy_threshold", "9"]) == 0
    assert len(drawn["tokens"]) == len(drawn["order"]) <= 12
    assert min(drawn["order"]) == 1
    kind = "Verified decoding order: " if verify else "Decoding order: "
    assert drawn["title"].startswith(f"{kind}{len(drawn['order'])} tokens in ")
    printed = capsys.readouterr().out
    assert drawn["title"] in printed and f"0:{drawn['tokens'][0]}" in printed
    assert size_of(tmp_path / "order.png")[0] >= 850


def test_requests_that_do_not_fit(tmp_path) -> None:
    run, model, data = run_file(tmp_path)
    for words, message in (
        (["--prompt", "Hi"], "--prompt needs a model"),
        (["--model", model], "--model and --file go together"),
        (["--file", data], "--model and --file go together"),
        (["--model", model, "--file", data, "--prompt", "Hi"], "leave out one of them"),
        (["--train_args_file", run, "--file", data], "leave out --model and --file"),
        (["--block_sizes", "3"], "has no argument --block_sizes"),
        (["--documents", "1"], "--documents chooses from a file"),
        (["--train_args_file", run, "--documents", "6"], "--documents names 6, and there are documents 0 to 5"),
        (["--train_args_file", run, "--objective", "causal", "--no_x"], "arguments have"),
        (["--output", str(tmp_path / "a.gif")], r"ends with \.png, \.svg, \.pdf"),
    ):
        with pytest.raises(ValueError, match=message):
            inspect.main(["--masks", "--text", *words])
    run, _, _ = run_file(tmp_path, objective="causal", mask_token=None, block_size=32)
    fields = json.loads(Path(run).read_text())
    Path(run).write_text(json.dumps({key: fields[key] for key in fields if key not in ("mask_token", "block_size")}))
    with pytest.raises(ValueError, match="add --objective wedlm"):
        inspect.main(["--masks", "--text", "--train_args_file", run])


def test_documents_that_are_too_long_to_be_seen(monkeypatch) -> None:
    monkeypatch.setattr(masks, "_MOST_TOKENS", 31)
    with pytest.raises(ValueError, match="32 tokens in two streams, more than 31"):
        inspect.main(["--masks", "--text"])


def test_modes(capsys) -> None:
    with pytest.raises(ValueError, match="told no data: name a run with --train_args_file"):
        inspect.main([])
    assert "--masks" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        inspect.main(["--help"])
    assert "--samples" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        inspect.main(["--masks", "--help"])
    assert "--documents" in capsys.readouterr().out


# The data of a run


def data_run(tmp_path: Path, rows: list | None = None, **fields) -> str:
    """A run file on a tokenizer without a model."""
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    for name, seed in (("train", 0), ("eval", 1)):
        records = [{"messages": row} for row in conversations(60, seed)] if rows is None else rows
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    run = tmp_path / "run.json"
    values = {
        "model_name_or_path": str(tmp_path / "tokenizer"),
        "train_file": str(tmp_path / "train.jsonl"),
        "bf16": True,
    }
    run.write_text(json.dumps({**values, "output_dir": str(tmp_path / "out"), "max_seq_length": 256, **fields}))
    return str(run)


def test_the_data_of_a_run(tmp_path, capsys) -> None:
    from hf_sft.data.chat import encode_conversation

    run = data_run(tmp_path, eval_file=str(tmp_path / "eval.jsonl"))
    page, values = tmp_path / "new" / "page.html", tmp_path / "report.json"
    files = ["--html", str(page), "--json", str(values)]
    assert inspect.main([run, "--samples", "2", "--eval_file", str(tmp_path / "eval.jsonl"), *files]) == 0
    printed = capsys.readouterr().out
    assert f"Page: {page}" in printed and f"JSON: {values}" in printed
    assert "records read             60" in printed and "end of turn" in printed
    found = json.loads(values.read_text(encoding="utf-8"))
    rows = [encode_conversation(tiny_tokenizer(), row) for row in conversations(60)]
    train, evaluation = found["splits"]
    assert (train["name"], train["rows"], evaluation["name"]) == ("train", 60, "eval")
    assert train["tokens"] == train["report"]["tokens"] == sum(len(row["input_ids"]) for row in rows)
    assert train["learned"] == train["report"]["supervised_tokens"]
    assert train["packing"]["fill"] == train["tokens"] / (train["packing"]["bins"] * 256)
    for sample in train["samples"]:
        row = rows[sample["record"] - 1]
        assert [token for each in sample["tokens"] for token in each["ids"]] == row["input_ids"]
        learned = [each["learned"] for each in sample["tokens"] for _ in each["ids"]]
        assert learned == [label != -100 for label in row["labels"]]
    assert "What the model will see" in page.read_text(encoding="utf-8")
    assert not (tmp_path / "out").exists()
    for words in (["--html", str(page)], ["--json", str(values)]):
        with pytest.raises(ValueError, match="exists: name another file, or add --overwrite"):
            inspect.main([run, *words])
        assert inspect.main([run, *words, "--overwrite"]) == 0


def test_model_and_file_name_a_run(tmp_path, capsys) -> None:
    data_run(tmp_path)
    words = [
        "--model",
        str(tmp_path / "tokenizer"),
        "--file",
        str(tmp_path / "train.jsonl"),
        "--max_train_samples",
        "7",
    ]
    assert inspect.main(words) == 0
    assert "records read             7" in capsys.readouterr().out


def test_chosen_rows_splits_and_tokens(tmp_path, capsys) -> None:
    run = data_run(tmp_path, eval_file=str(tmp_path / "eval.jsonl"))
    inspect.main([run, "--row", "3", "5"])
    printed = capsys.readouterr().out
    assert re.findall(r"(\w+, asked for: row \d+, record \d+)", printed) == [
        "train, asked for: row 3, record 4",
        "train, asked for: row 5, record 6",
    ]
    inspect.main([run, "--split", "eval", "--row", "2", "--tokens"])
    printed = capsys.readouterr().out
    assert "eval, asked for: row 2" in printed and "train ─" not in printed and re.search("258 +-100", printed)
    inspect.main([run, "--split", "eval"])
    assert "eval, longest: row" in capsys.readouterr().out
    with pytest.raises(ValueError, match="there is no row 60 in train"):
        inspect.main([run, "--row", "60"])
    with pytest.raises(ValueError, match="there are no eval data: name eval_file"):
        inspect.main([data_run(tmp_path), "--split", "eval"])


def test_long_rows_in_full(tmp_path, capsys) -> None:
    run = data_run(tmp_path, [{"prompt": "a" * 600, "completion": "b" * 600}], max_seq_length=2048)
    inspect.main([run])
    assert " tokens ... " in capsys.readouterr().out
    inspect.main([run, "--full"])
    printed = capsys.readouterr().out
    assert " tokens ... " not in printed and printed.replace("\n", "").count("b" * 600) >= 1


def test_records_that_stop_training_do_not_stop_the_inspection(tmp_path, capsys) -> None:
    rows = ["{broken", *({"messages": row} for row in conversations(30)), {"prompt": "a" * 300, "completion": "b"}]
    run = data_run(tmp_path, rows, overlength="error")
    assert inspect.main([run]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "1 of 32 records (3.1 %) cannot be used, and training stops at the first of them" in printed
    assert "1 of 32 records (3.1 %) are longer than max_seq_length 256, and training stops" in printed
    assert "train.jsonl,line1" in printed.replace(" ", "")  # a long path is wrapped anywhere
    assert inspect.main([run, "--strict"]) == 1
    assert inspect.main([run, "--strict", "--bad_records", "skip", "--overlength", "drop"]) == 0
    with pytest.raises(ValueError, match="of 1 records none is left"):
        inspect.main([data_run(tmp_path, ["{broken"])])


def test_a_prepared_folder_and_live_data(tmp_path, capsys) -> None:
    from hf_sft.commands import prepare

    run = data_run(tmp_path)
    prepare.main(["--train_args_file", run, "--output_dir", str(tmp_path / "prepared")])
    capsys.readouterr()
    inspect.main([run])
    printed = capsys.readouterr().out
    inspect.main([run, "--train_file", str(tmp_path / "prepared")])
    assert capsys.readouterr().out == printed
    inspect.main([run, "--lazy_preprocess", "true"])
    assert capsys.readouterr().out == printed
    inspect.main([run, "--streaming", "true", "--max_steps", "3"])
    assert (
        capsys.readouterr().out == "looked at          the first 10,000 records"
        or "records read             60" in printed
    )


def test_texts_are_inspected_too(tmp_path, capsys) -> None:
    run = data_run(tmp_path, [{"text": f"This is text {n}. " * (1 + n)} for n in range(40)], task_type="pretrain")
    assert inspect.main([run]) == 0
    printed = capsys.readouterr().out
    assert "findings: nothing that usually goes wrong was found" in printed
    assert "cut into several rows" in printed and "end of turn learned      40 of 40 documents" in printed


def test_data_requests_that_do_not_fit(tmp_path) -> None:
    run = data_run(tmp_path)
    for words, message in (
        (["--model", "x"], "name a run with --train_args_file, or a model and its data"),
        ([run, "--samples", "-1"], "--samples is -1"),
        ([run, "--html", str(tmp_path / "page.pdf")], r"html is .*: the name of this file ends with \.html"),
        ([run, "--json", str(tmp_path / "page.txt")], r"ends with \.json"),
        ([run, "--no_such_thing", "1"], "no_such_thing"),
        ([run, "--train_file", str(tmp_path / "none.jsonl")], "none.jsonl"),
        (["--masks", "--masks"], "has no argument --masks"),
    ):
        with pytest.raises(ValueError, match=message):
            inspect.main(words)


def test_both_sides_of_a_pair_are_shown(tmp_path, capsys) -> None:
    """Each is cut by itself; and what training would refuse is refused here."""
    model = tiny.save_tiny(tmp_path / "model")
    pairs = [
        {"prompt": "Q" * 90, "chosen": f"good {n} " + "g" * 300, "rejected": f"bad {n} " + "b" * 300} for n in range(8)
    ]
    data = runs.write_jsonl(tmp_path / "pairs.jsonl", pairs)
    words = ["--model", model, "--file", data, "--task_type", "dpo", "--max_seq_length", "500"]
    inspect.main(words)
    shown = capsys.readouterr().out.replace("\n", "")
    sample = shown[shown.index("random") :]
    chosen, rejected = sample.split("--- rejected ---")[:2]
    assert "gggg<|im_end|>" in chosen and "bbbb<|im_end|>" in rejected and " tokens ... " in chosen
    with pytest.raises(ValueError, match="max_seq_length 600 is beyond the model's 512 positions"):
        inspect.main([*words[:6], "--max_seq_length", "600"])
