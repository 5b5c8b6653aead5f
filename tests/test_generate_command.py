"""``hf-sft generate``: prompts in, answers out, and every wrong input a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from runs import write_jsonl

from hf_sft.answering import Answerer
from hf_sft.arguments import LoraArguments
from hf_sft.commands.generate import main
from hf_sft.generation import generate_wedlm
from hf_sft.models.adapters import add_adapter, save_adapter
from hf_sft.models.averages import WeightAverage, trained_parameters
from hf_sft.models.inference import find_model, load_for_inference
from hf_sft.models.mask_token import record_mask_token, recorded_mask_token
from hf_sft.prompts import Request, encode_request

MASK = 200


def save_model(folder: Path, mask: int | None = MASK, **overrides) -> str:
    """A random model with opinions (and a mask token) and its tokenizer."""
    model = tiny.tiny_model("qwen3", **overrides)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    if mask is not None:
        record_mask_token(model, mask)
    model.save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def wedlm(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("wedlm"))


@pytest.fixture(scope="module")
def causal(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("causal"), mask=None)


def template(*turns: tuple[str, str]) -> str:
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + "<|im_start|>assistant\n"


def answers_of(folder: str, texts: list[str], **options) -> list[str]:
    """What generate_wedlm answers, decoded."""
    model, tokenizer = load_for_inference(folder)
    output = generate_wedlm(model, tokenizer(texts, add_special_tokens=False)["input_ids"], **options)
    return [tokenizer.decode(row, skip_special_tokens=True) for row in output.sequences]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_one_prompt_prints_its_answer(wedlm, capsys) -> None:
    assert main([wedlm, "--prompt", "Hello", "--max_new_tokens", "12", "--entropy_threshold", "2"]) == 0
    out, err = capsys.readouterr()
    assert [out] == [f"{text}\n" for text in answers_of(
        wedlm, [template(("user", "Hello"))], max_new_tokens=12, entropy_threshold=2.0)]  # fmt: skip
    assert "1 answer, 12 new tokens" in err and "tokens per forward, prefix cacheability" in err


def test_a_file_of_records(wedlm, tmp_path, capsys) -> None:
    records = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]},
        {"prompt": "a b c", "completion": "d"},
        {"question": "1+1?", "answer": "2"},
        {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]},
        [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "two"},
            {"role": "user", "content": "three"},
        ],
        "text alone",
    ]
    texts = [
        template(("user", "Hi")),
        template(("user", "a b c")),
        template(("user", "1+1?")),
        template(("system", "Be brief."), ("user", "Why?")),
        template(("user", "one"), ("assistant", "two"), ("user", "three")),
        template(("user", "text alone")),
    ]
    file, out = write_jsonl(tmp_path / "in.jsonl", records), tmp_path / "deep" / "out.jsonl"
    words = [wedlm, "--file", file, "--output", str(out), "--max_new_tokens", "9", "--batch_size", "4"]
    assert main(words) == 0
    lines = read(out)
    assert [line["answer"] for line in lines] == answers_of(wedlm, texts, max_new_tokens=9)
    assert [line.get("reference") for line in lines] == ["Hello!", "d", "2", None, None, None]
    assert lines[0]["prompt"] == [{"role": "user", "content": "Hi"}] and lines[1]["prompt"] == "a b c"
    assert all(1 <= line["forwards"] <= 9 and (line["tokens"] == 9) != line["stopped"] for line in lines)
    printed = capsys.readouterr().out
    assert printed == ""  # what fills more than a batch stands in the file alone
    assert sorted(path.name for path in out.parent.iterdir()) == ["out.jsonl", "out.jsonl.run.json"]
    written = out.read_bytes()
    assert main(words) == 0 and out.read_bytes() == written
    assert "has its 6 answers already; nothing was generated" in capsys.readouterr().err


def test_verify_and_autoregressive_agree(wedlm, tmp_path) -> None:
    shared = [wedlm, "--prompt", "Hello", "You there", "x", "--max_new_tokens", "20", "--output"]
    for name, options in (("ar", ["--autoregressive"]), ("verify", ["--verify", "--window", "5"])):
        assert main([*shared, str(tmp_path / name), *options]) == 0
    one, other = read(tmp_path / "ar"), read(tmp_path / "verify")
    assert [line["answer"] for line in one] == [line["answer"] for line in other]
    assert [line["forwards"] for line in one] == [line["tokens"] for line in one] == [20] * 3


def test_the_options_alone_say_how_to_decode(wedlm, tmp_path, recwarn) -> None:
    folder = tmp_path / "model"
    shutil.copytree(wedlm, folder)
    own = json.loads((folder / "generation_config.json").read_text())
    own |= dict(do_sample=True, temperature=0.5, top_k=3, top_p=0.5, repetition_penalty=3.0)
    (folder / "generation_config.json").write_text(json.dumps(own))
    for name, options in (("ar", ["--autoregressive"]), ("verify", ["--verify"])):
        words = [str(folder), "--prompt", "Hello", "--max_new_tokens", "20", "--output", str(tmp_path / name)]
        assert main([*words, *options]) == 0
    assert read(tmp_path / "ar")[0]["answer"] == read(tmp_path / "verify")[0]["answer"]
    assert not [str(warning.message) for warning in recwarn if "generation" in str(warning.message)]


def test_a_causal_model_is_decoded_token_by_token(causal, tmp_path, capsys) -> None:
    out = tmp_path / "out.jsonl"
    assert main([causal, "--prompt", "Hello", "Good day", "--max_new_tokens", "8", "--output", str(out)]) == 0
    assert "1.00 tokens per forward" in capsys.readouterr().err
    want = answers_of(causal, [template(("user", text)) for text in ("Hello", "Good day")],
                      mask_token_id=0, max_new_tokens=8, verify=True)  # fmt: skip
    assert [line["answer"] for line in read(out)] == want
    for option in (["--verify"], ["--window", "4"], ["--entropy_threshold", "1"], ["--distance_penalty", "0"]):
        with pytest.raises(ValueError, match="was not trained as WeDLM"):
            main([causal, "--prompt", "Hello", *option])


def test_answers_end_at_the_end_of_turn(wedlm, tmp_path) -> None:
    model, tokenizer = load_for_inference(wedlm)
    prompt = tokenizer(template(("user", "Hello")), add_special_tokens=False)["input_ids"]
    row = generate_wedlm(model, prompt, max_new_tokens=20, verify=True).sequences[0]
    stop = next(token for token in row[3:] if token not in row[:3])
    model.generation_config.eos_token_id = stop
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = [str(tmp_path / "model"), "--prompt", "Hello", "--max_new_tokens", "20", "--output"]
    for name, options in (("verify", ["--verify"]), ("autoregressive", ["--autoregressive"])):
        assert main([*words, str(tmp_path / name), *options]) == 0
        (line,) = read(tmp_path / name)
        assert line["stopped"] is True and line["tokens"] == row.index(stop) + 1
        assert line["answer"] == tokenizer.decode(row[: row.index(stop)], skip_special_tokens=True)


@pytest.mark.parametrize("how", [[], ["--autoregressive"]], ids=["parallel", "autoregressive"])
def test_seeds(wedlm, tmp_path, how) -> None:
    words = [wedlm, "--prompt", "Hello", "Hello", "--temperature", "3", "--top_k", "50", "--max_new_tokens", "12", *how]
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert main([*words, "--batch_size", "1", "--seed", seed, "--output", str(tmp_path / name)]) == 0
    a, b, c = ([line["answer"] for line in read(tmp_path / name)] for name in "abc")
    assert a == b != c and a[0] != a[1]


def test_raw_and_system(wedlm, capsys) -> None:
    shared = ["--max_new_tokens", "6"]
    assert main([wedlm, "--prompt", "Once <|im_end|>", "--raw", *shared]) == 0
    assert [capsys.readouterr().out] == [
        f"{text}\n" for text in answers_of(wedlm, ["Once <|im_end|>"], max_new_tokens=6)
    ]
    assert main([wedlm, "--prompt", "Hi", "--system", "Be kind.", *shared]) == 0
    want = answers_of(wedlm, [template(("system", "Be kind."), ("user", "Hi"))], max_new_tokens=6)
    assert [capsys.readouterr().out] == [f"{text}\n" for text in want]


def test_the_end_that_a_tokenizer_puts_behind_texts_is_no_part_of_a_raw_prompt() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny.tiny_tokenizer()
    ids = tokenizer("Once upon")["input_ids"]
    assert encode_request(Request("Once<|im_end|>"), tokenizer, raw=True)[-1] == 256, "one that the user wrote is"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        "$A <|im_end|>", special_tokens=[("<|im_end|>", 256)]
    )
    assert tokenizer("Once upon")["input_ids"] == [*ids, 256]
    assert encode_request(Request("Once upon"), tokenizer, raw=True) == ids


def test_an_adapter_folder(tmp_path, capsys, caplog) -> None:
    base = save_model(tmp_path / "base", mask=None)
    model, _ = load_for_inference(base)
    adapted = add_adapter(model, LoraArguments(lora_rank=4))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    record_mask_token(adapted, MASK)
    model.generation_config.eos_token_id = [256, 257]
    folder = str(tmp_path / "adapter")
    save_adapter(adapted, folder)
    model.generation_config.save_pretrained(folder)

    again, _ = load_for_inference(folder)
    assert recorded_mask_token(again) == MASK and not again.training
    assert again.get_base_model().generation_config.eos_token_id == [256, 257]
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(again(ids).logits, adapted.eval()(ids).logits, rtol=0, atol=1e-6)

    other = save_model(tmp_path / "other", mask=None)  # of the same shapes
    with caplog.at_level("WARNING"):
        load_for_inference(folder, base=base)
        assert "was trained on" not in caplog.text
        load_for_inference(folder, base=other)
    assert f"was trained on {base}, and is put on {other}: they must be the same model" in caplog.text

    words = ["--prompt", "Hello", "--max_new_tokens", "10"]
    want = answers_of(folder, [template(("user", "Hello"))], max_new_tokens=10)
    assert main([folder, *words]) == 0
    assert [capsys.readouterr().out] == [f"{text}\n" for text in want]
    assert want != answers_of(base, [template(("user", "Hello"))], mask_token_id=MASK, max_new_tokens=10)
    shutil.move(tmp_path / "base", tmp_path / "moved")
    with pytest.raises(ValueError, match="does not exist"):
        main([folder, *words])
    capsys.readouterr()
    assert main([folder, *words, "--base", str(tmp_path / "moved"), "--autoregressive"]) == 0
    capsys.readouterr()
    assert main([folder, *words, "--base", str(tmp_path / "moved")]) == 0
    assert [capsys.readouterr().out] == [f"{text}\n" for text in want]


def test_the_adapters_tokenizer_and_mask_token_count(tmp_path) -> None:
    base = save_model(tmp_path / "base", mask=5)
    model, tokenizer = load_for_inference(base)
    tokenizer.add_tokens(["<|mask|>"], special_tokens=True)
    from hf_sft.models.vocabulary import grow_embeddings

    grow_embeddings(model, len(tokenizer))
    adapted = add_adapter(model, LoraArguments(lora_rank=2), new_token_ids=[259])
    record_mask_token(adapted, 259)
    folder = str(tmp_path / "adapter")
    save_adapter(adapted, folder)
    tokenizer.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    again, tokens = load_for_inference(folder)
    assert recorded_mask_token(again) == 259 and len(tokens) == 260
    assert main([folder, "--prompt", "Hello", "--max_new_tokens", "4"]) == 0


def test_types_of_the_weights(tmp_path) -> None:
    folder = save_model(tmp_path / "a")
    assert load_for_inference(folder)[0].dtype == torch.float32
    assert load_for_inference(folder, dtype="bfloat16")[0].dtype == torch.bfloat16
    model, tokenizer = load_for_inference(folder, dtype="bfloat16")
    model.save_pretrained(tmp_path / "b")
    tokenizer.save_pretrained(tmp_path / "b")
    assert load_for_inference(str(tmp_path / "b"))[0].dtype == torch.bfloat16


@pytest.mark.parametrize("how", [[], ["--temperature", "2", "--seed", "4"]], ids=["greedy", "drawn"])
def test_a_run_that_was_stopped_goes_on(wedlm, tmp_path, monkeypatch, capsys, how) -> None:
    file = write_jsonl(tmp_path / "in.jsonl", [{"prompt": text} for text in ("one", "two", "three", "four", "five")])
    words = [wedlm, "--file", file, "--max_new_tokens", "6", "--batch_size", "2", *how, "--output"]
    assert main([*words, str(tmp_path / "whole.jsonl")]) == 0
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    answer, calls = Answerer.__call__, []

    def interrupted(answerer, prompts):
        calls.append(prompts)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answer(answerer, prompts)

    with monkeypatch.context() as patch:
        patch.setattr(Answerer, "__call__", interrupted)
        assert main([*words, str(out)]) == 130
    assert "out.jsonl.partial, and the same command goes on" in capsys.readouterr().err
    assert read(partial) == read(tmp_path / "whole.jsonl")[:4] and not out.exists()
    lines = partial.read_bytes().splitlines(keepends=True)
    capsys.readouterr()
    for torn, left in ((b"".join(lines), 4), (b"".join(lines)[:-9], 2 if how else 3), (lines[0][:5], 0)):
        partial.write_bytes(torn)  # as a kill leaves it
        assert main([*words, str(out)]) == 0
        assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes() and not partial.exists()
        err = capsys.readouterr().err
        assert f"{5 - left} answer{'s' * (left < 4)}, " in err and (
            f"{left} of 5 answers are there already" in err
        ) == bool(left)
        out.unlink()


def test_a_file_of_another_run(wedlm, tmp_path) -> None:
    shutil.copytree(wedlm, tmp_path / "model")
    file = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "one"}])
    other = write_jsonl(tmp_path / "other.jsonl", [{"prompt": "one"}, {"prompt": "two"}])
    out = tmp_path / "out.jsonl"
    words = [str(tmp_path / "model"), "--max_new_tokens", "3", "--output", str(out)]
    assert main([*words, "--file", file]) == 0
    written = out.read_bytes()
    for name in ("out.jsonl", "out.jsonl.partial"):
        for changes, difference in (
            (["--file", file, "--max_new_tokens", "4"], "max_new_tokens was 3 and is 4"),
            (["--file", other], "number of prompts was 1 and is 2; prompts differ"),
            (["--file", file, "--window", "3"], "window was None and is 3"),
        ):
            message = rf"{name}' exists and is of another run \({difference}\), and nothing is overwritten"
            with pytest.raises(ValueError, match=message):
                main([*words, *changes])
        if name == "out.jsonl":
            out.rename(tmp_path / "out.jsonl.partial")
    save_model(tmp_path / "model", hidden_size=16)
    with pytest.raises(ValueError, match="the model's files differ"):
        main([*words, "--file", file])
    assert (tmp_path / "out.jsonl.partial").read_bytes() == written
    (tmp_path / "out.jsonl.run.json").unlink()
    with pytest.raises(ValueError, match=r"out.jsonl.partial' exists, and nothing is overwritten"):
        main([*words, "--file", file])
    with pytest.raises(ValueError, match=r"in.jsonl' exists, and nothing is overwritten"):
        main([*words[:-1], file, "--file", file])


def test_prompts_and_positions(tmp_path, capsys) -> None:
    folder = save_model(tmp_path / "model", max_position_embeddings=60)
    file = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "a"}, {"prompt": "abc" * 9}])
    assert main([folder, "--file", file, "--max_new_tokens", "20", "--output", str(tmp_path / "out")]) == 0
    assert "1 of 2 prompts leave room for fewer than 20 new tokens" in capsys.readouterr().err
    long = len(tiny.tiny_tokenizer()(template(("user", "abc" * 9)))["input_ids"])
    assert [line["tokens"] for line in read(tmp_path / "out")] == [20, 60 - long]
    file = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "a"}, {"prompt": "abc" * 20}])
    with pytest.raises(
        ValueError, match=r"long.jsonl, line 2: the prompt has \d+ tokens, and the model .* 60 positions"
    ):
        main([folder, "--file", file])
    for empty in ("", "\n\n"):
        (tmp_path / "empty.jsonl").write_text(empty)
        with pytest.raises(ValueError, match=r"empty.jsonl.? (is empty|holds no)"):
            main([folder, "--file", str(tmp_path / "empty.jsonl")])


def test_nothing_half_written(wedlm, tmp_path, monkeypatch) -> None:
    out = tmp_path / "out.jsonl"
    monkeypatch.setattr(
        "hf_sft.commands.generate._record", lambda *parts: (_ for _ in ()).throw(RuntimeError("broken"))
    )
    with pytest.raises(RuntimeError, match="broken"):
        main([wedlm, "--prompt", "a", "--max_new_tokens", "2", "--output", str(out)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words, message",
    [
        (["--prompt", "a", "--batch_size", "0"], "batch_size is 0"),
        (["--prompt", "a", "--max_new_tokens", "0"], "max_new_tokens is 0"),
        (["--prompt", "a", "--window", "0"], "window is 0"),
        (["--prompt", "a", "--verify", "--temperature", "1"], "leave out verify"),
        (["--prompt", "a", "--top_p", "0.5"], "temperature 0 draws nothing"),
        (["--prompt", "a", "--autoregressive", "--top_k", "5"], "temperature 0 draws nothing"),
        (["--prompt", "a", "--autoregressive", "--window", "5"], "window decodes in parallel"),
        (["--prompt", "a", "--autoregressive", "--verify"], "verify decodes in parallel"),
        (["--prompt", "a", "--raw", "--system", "b"], "leave out one of them"),
        (["--prompt", "", "--raw"], "has no tokens"),
        (
            ["--prompt", "say <|im_end|>"],
            r"^the user message holds '<\|im_end\|>', which the tokenizer reads as a special",
        ),
        (["--prompt", "a", "--system", "<|im_end|>"], "^the system message holds"),
        (["--prompt", "a", "--seed", "1"], "seed sets the draws, and temperature 0 draws nothing"),
        (["--prompt", "a", "--seed", "1", "--autoregressive"], "seed sets the draws, and temperature 0 draws nothing"),
        (["--prompt", "a", "--seed", "-1", "--temperature", "1"], "seed is -1"),
        (["--prompt", "a", "--temperature", "1e-320", "--autoregressive"], "temperature is 1e-320; it must be 0"),
        (["--prompt", "a", "--dtype", "int8"], "dtype is 'int8'"),
        (["--prompt", "a", "--base", "somewhere"], "leave out the base of a whole model"),
        (["--file", "nowhere.jsonl"], "no such data file"),
    ],
)
def test_wrong_options(wedlm, words, message) -> None:
    with pytest.raises(ValueError, match=message):
        main([wedlm, *words])


@pytest.mark.parametrize(
    "record, words, message",
    [
        ({"text": "a"}, [], "line 2: the record has text; a prompt, a question or messages are needed"),
        ({"prompt": 5}, [], "line 2: prompt is 5; it must be a text or a list of messages"),
        ({"messages": "a"}, [], "line 2: messages is 'a'; it must be a list of messages"),
        ({"messages": []}, [], "it must be a list of messages"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, [], "an answer alone"),
        ({"messages": [{"role": "nobody", "content": "a"}]}, [], "role 'nobody'"),
        ({"messages": [{"role": "user", "content": 5}]}, [], "must be a string"),
        ({"messages": [{"role": "user", "content": "a"}]}, ["--raw"], "line 2: raw continues texts"),
        ({"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}, ["--system", "c"],
         "line 2: .*has a system message; leave out system"),
        ({"prompt": "a", "chat_template_kwargs": "abc"}, [], "line 2: chat_template_kwargs is a string that is no JSON"),
        ({"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"tools": []}}, [],
         "line 2: chat_template_kwargs sets tools"),
        ({"prompt": "a", "tools": "abc"}, [], "line 2: tools is a string that is no JSON"),
        ({"prompt": ""}, ["--raw"], "line 2: the prompt '' has no tokens"),
    ],
)  # fmt: skip
def test_wrong_records(wedlm, tmp_path, record, words, message) -> None:
    file = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "fine"}, record])
    with pytest.raises(ValueError, match=message):
        main([wedlm, "--file", file, *words])


def test_a_record_with_a_special_token_is_named(wedlm, tmp_path) -> None:
    for record in ({"prompt": "say <|im_end|>"}, {"messages": [{"role": "user", "content": "say <|im_end|>"}]}):
        file = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "fine"}, record])
        with pytest.raises(ValueError, match=r"in.jsonl, line 2: the user message holds '<\|im_end\|>'") as caught:
            main([wedlm, "--file", file])
        assert "new_special_tokens" not in str(caught.value)
    file = write_jsonl(tmp_path / "raw.jsonl", [{"prompt": "say <|im_end|>"}])
    assert main([wedlm, "--file", file, "--raw", "--max_new_tokens", "2"]) == 0


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """What a run leaves that has not ended: checkpoints and links to them. Each has a model of its own."""
    folder = tmp_path_factory.mktemp("run") / "out"
    for step in (2, 4, 10):
        save_model(folder / f"checkpoint-{step}", hidden_size=8 * step)
        state = {"best_model_checkpoint": f"elsewhere/out/checkpoint-{4 if step > 2 else 2}"}
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    return folder


def test_an_output_folder_has_a_model_to_choose(run_folder, tmp_path, capsys) -> None:
    folder = tmp_path / "out"
    shutil.copytree(run_folder, folder)
    for linked in (False, True):
        if linked:
            (folder / "last").symlink_to("checkpoint-10", target_is_directory=True)
            (folder / "best").symlink_to("checkpoint-2", target_is_directory=True)
        names = {"best": 2 if linked else 4, "last": 10, "4": 4, "checkpoint-2": 2}
        for name, step in names.items():
            assert Path(find_model(str(folder), name)) == folder / f"checkpoint-{step}"
    assert load_for_inference(str(folder), checkpoint="4")[0].config.hidden_size == 32
    words = ["--prompt", "a", "--max_new_tokens", "2"]
    with pytest.raises(ValueError, match=r"holds no final model; choose .* with --checkpoint: best, last, 10, 4, 2"):
        main([str(folder), *words])
    assert main([str(folder), *words, "--checkpoint", "last"]) == 0
    for name in ("5", "first", "checkpoint-", "checkpoint-best"):
        with pytest.raises(ValueError, match=f"has no checkpoint '{name}'; choose one of best, last, 10, 4, 2"):
            find_model(str(folder), name)
    (folder / "checkpoint-10" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="checkpoint-10' holds no model"):
        find_model(str(folder), "10")
    save_model(folder)
    assert find_model(str(folder)) == str(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no model: neither weights of an adapter .* nor of a whole model"):
        main([str(tmp_path / "empty"), *words])
    with pytest.raises(ValueError, match="has no checkpoint 'best'; it has no checkpoints"):
        main([str(tmp_path / "empty"), *words, "--checkpoint", "best"])
    with pytest.raises(ValueError, match="checkpoint is 'best', and 'nowhere' is not an output folder"):
        main(["nowhere", *words, "--checkpoint", "best"])
    assert find_model("some/name") == "some/name"


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_averaged_weights_are_taken(tmp_path, caplog, kind) -> None:
    folder = save_model(tmp_path / "model")
    model, _ = load_for_inference(folder)
    if kind == "adapter":
        model, folder = add_adapter(model, LoraArguments(lora_rank=2)), str(tmp_path / "adapter")
        save_adapter(model, folder)
    average = WeightAverage(trained_parameters(model), decay=0.5)
    with torch.no_grad():
        for parameter in average.parameters.values():
            parameter.add_(1.0)
    average.update()
    average.save(folder)
    raw = dict(load_for_inference(folder, averaged=False)[0].named_parameters())
    with caplog.at_level("INFO", logger="hf_sft"):
        held = dict(load_for_inference(folder)[0].named_parameters())
    assert f"{len(average.parameters)} averaged weights of" in caplog.text
    for name, value in held.items():
        assert torch.equal(value, average.average.get(name, raw[name]))
        assert torch.equal(value, raw[name]) == (name not in average.parameters)
    words = [folder, "--prompt", "Hello", "--max_new_tokens", "4", "--output"]
    assert main([*words, str(tmp_path / "a")]) == main([*words, str(tmp_path / "b"), "--raw_weights"]) == 0
    with pytest.raises(ValueError, match="raw_weights was False and is True"):
        main([*words, str(tmp_path / "a"), "--raw_weights"])
    average.average["another.weight"] = torch.zeros(3)
    average.save(folder)
    with pytest.raises(ValueError, match=r"is the average of another model's weights: another.weight is not here"):
        load_for_inference(folder)
    Path(folder, "ema.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"ema.safetensors' cannot be read.*--raw_weights"):
        load_for_inference(folder)


def test_an_adapter_of_another_base(tmp_path) -> None:
    model, _ = load_for_inference(save_model(tmp_path / "base"))
    save_adapter(add_adapter(model, LoraArguments(lora_rank=2)), str(tmp_path / "adapter"))
    other = save_model(tmp_path / "other", hidden_size=16)
    with pytest.raises(ValueError, match=r"(?s)adapter' \(trained on .*base'\) does not fit the base .*other'"):
        main([str(tmp_path / "adapter"), "--base", other, "--prompt", "a"])


def test_models_that_are_none(wedlm, tmp_path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        main([str(tmp_path / "nowhere"), "--prompt", "a"])
    bare = tmp_path / "bare"
    shutil.copytree(wedlm, bare)
    (bare / "chat_template.jinja").unlink()
    for asked in (["--prompt", "a"], ["--file", write_jsonl(tmp_path / "in.jsonl", [{"prompt": "a"}])]):
        with pytest.raises(ValueError, match=r"^the tokenizer has no chat template"):
            main([str(bare), *asked])
    assert main([str(bare), "--prompt", "a", "--raw", "--max_new_tokens", "2"]) == 0
    with pytest.raises(
        ValueError, match="one of the arguments --prompt --file is required; hf-sft generate --help lists"
    ):
        main([wedlm])
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
