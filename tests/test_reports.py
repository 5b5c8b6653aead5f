"""The page of a run says what its files say, whichever of them there are; several runs are told apart."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from html import escape
from pathlib import Path
from typing import Any

import pytest
from test_pages import EVIL, Page, polylines, read

from hf_sft.cli import main
from hf_sft.reports import read_run, read_runs, report_page, write_report
from hf_sft.reports.findings import find_problems
from hf_sft.reports.runs import generations
from hf_sft.reports.words import count, date, duration, figure, listed, percent

HISTOGRAM = {"borders": [0, 50, 100], "counts": [3, 5]}
DATA = {
    "train": {
        "records": 10, "kept": 8, "rows": 8, "tokens": 512, "supervised_tokens": 256, "supervised_share": 0.5, "longest": 99,
        "mean_length": 64.0, "dropped": {"overlength": 2, "no_supervised_token": 0}, "bad": {"count": 0},
        "length_histogram": HISTOGRAM, "share_histogram": {"borders": [0, 50, 100], "counts": [2, 6]},
    },
    "packing": {"train": {"bins": 4, "capacity": 160, "tokens": 512, "fill": 0.8}},
}  # fmt: skip
ARGUMENTS: dict[str, Any] = {
    "model": {"model_name_or_path": "some/where/tiny", "train_mode": "lora", "quantization": None},
    "data": {"task_type": "sft", "objective": "causal", "max_seq_length": 512, "packing": False},
    "training": {
        "output_dir": "out",
        "learning_rate": 1e-3,
        "seed": 42,
        "accelerator_config": {"a": 1},
        "report_to": [],
    },
    "adapter": {"lora_rank": 4},
    "resolved": {"last_step": 40, "attention_backend": "segment"},
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
}


def lines(steps: int = 40, lift: float = 0.0) -> list[dict[str, Any]]:
    """A log: training every 5 steps, evaluation every 10, the end, and the evaluation behind it."""
    found: list[dict[str, Any]] = [
        {"time": 1795283263.0, "step": 0, "epoch": 0, "eval_loss": 6.0, "eval_perplexity": 403.4}
    ]
    for step in range(5, steps + 1, 5):
        common = {"time": 1795283263.0 + step, "step": step, "epoch": step / 20}
        loss = 2 + 4 / step + lift
        found.append({**common, "loss": loss, "grad_norm": 1.5, "learning_rate": 1e-3 / step, "tokens_per_second": 12_345.6,
                      "memory_gib": 0.5 + step / 100})  # fmt: skip
        if step % 10 == 0:
            found.append(
                {**common, "eval_loss": loss + 0.25, "eval_perplexity": math.exp(loss + 0.25), "eval_bleu": step / 4}
            )
    found.append({"time": 1795283304.0, "step": steps, "epoch": steps / 20, "train_runtime": 200.0, "train_loss": 2.5})
    found.append({**found[-2], "time": 1795283305.0})
    return found


def predictions(answer: str = "an answer", steps: tuple[int, ...] = (20, 40)) -> list[dict[str, Any]]:
    return [
        {"step": step, "row": row, "prompt": f"question {row}", "reference": f"reference {row}",
         "answer": f"{answer} {row} at {step}", "tokens": 7, "forwards": 7, "stopped": True, "rougeL": 0.25, "exact_match": 0.0}
        for step in steps for row in (1, 0)
    ]  # fmt: skip


def write_lines(path: Path, records: list[dict[str, Any]], end: str = "") -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + end, encoding="utf-8")


def run_folder(folder: Path, log: list[dict[str, Any]] | None = None, arguments: Any = ARGUMENTS) -> Path:
    """A run with all its files."""
    folder.mkdir(parents=True)
    write_lines(folder / "log.jsonl", lines() if log is None else log)
    for name, content in (("args", arguments), ("data_report", DATA), ("trainer_state", {"global_step": 40, "max_steps": 40}),
                          ("stop_check", {"checked": 4, "stopped": 3, "max_new_tokens": 64, "answers": []})):  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    write_lines(folder / "predictions.jsonl", predictions())
    return folder


def shown(*folders: Path) -> Page:
    return read(report_page(read_runs(list(folders))))


def words(page: Page) -> str:
    return " ".join(" ".join(page.texts).split())


def test_what_a_page_says(tmp_path) -> None:
    path = write_report(run_folder(tmp_path / "first"))
    assert path == tmp_path / "first" / "report.html" and [each.name for each in path.parent.glob(".*")] == []
    html = path.read_text(encoding="utf-8")
    text = words(read(html))
    assert "first tiny, LoRA, supervised fine-tuning, 40 steps, 21 November 2026, 17:47 UTC, finished" in text
    order = ["Findings", "Key figures", "Charts", "Data", "Answers", "Arguments"]
    assert re.findall("<h2>(.*?)</h2>", html) == order
    assert "warning train: 2 of 10 records (20.0 %) were left out (longer than max_seq_length)" in text
    assert "evaluation loss 2.35 the lowest of 5" in text and f"perplexity {math.exp(2.35):.2f}" in text
    assert "training loss 2.1 2.8 at step 5" in text and "tokens per second 12.3k median" in text
    assert "tokens seen 1,024" in text and "peak memory 0.9 GiB" in text and "training time 3 min 20 s" in text
    assert "answers that ended by themselves 3 of 4" in text
    for title in ("Loss (nats)", "Learning rate", "Gradient norm", "Tokens per second", "Memory, peak (GiB)",
                  "BLEU and chrF (0 to 100)", "Tokens of a row", "Learned share of a row"):  # fmt: skip
        assert html.count(f'aria-label="{title}"') == 1, title
    assert "packing 4 bins of 160 tokens, 80.0 % full" in text
    assert "learning_rate 0.001 5e-05 training" in text and "max_seq_length 512 2048 data" in text
    assert "packing false not set data" in text  # auto by default: false says something
    given = text[text.index("argument value default group") : text.index("What came of them")]
    assert not any(name in given for name in ("output_dir", "accelerator_config", "report_to", "seed", "task_type"))
    assert "torch 2.13.0" in text and "attention_backend segment" in text


def test_answers_stand_beside_their_references(tmp_path) -> None:
    folder = run_folder(tmp_path / "run")
    write_lines(folder / "predictions.jsonl", [*predictions(EVIL), *predictions(EVIL)[-1:]])
    page = shown(folder)
    text = words(page)
    assert "The last generation evaluation: 2 prompts at step 40." in text
    first = text[text.index("Row 0") : text.index("Row 1")]
    assert first.index("question 0") < first.index("reference 0") < first.index("0 at 40") < first.index("0 at 20")
    assert "7 tokens, ended by itself, rougeL 0.25, exact_match 0" in first
    assert first.count("How the answer developed: 1 earlier step ") == 1
    assert page.text.count("<script>alert(1)</script>") == 4
    assert [list(rows) for rows in generations(read_run(folder)).values()] == [[("", 0), ("", 1)]] * 2


def test_findings(tmp_path) -> None:
    def found(name: str, log: list[dict[str, Any]] | None = None, **stop: Any) -> str:
        folder = run_folder(tmp_path / name, log)
        if stop:
            (folder / "stop_check.json").write_text(
                json.dumps({"checked": 4, "max_new_tokens": 64, **stop}), encoding="utf-8"
            )
        text = words(shown(folder))
        return text[
            text.index("Findings", text.index("Arguments")) : text.index("Key figures", text.index("Arguments"))
        ]

    assert "error 0 of 4 answers ended by themselves within 64 tokens (after training)" in found("never", stopped=0)
    assert "warning 1 of 4 answers ended" in found("seldom", stopped=1)
    assert "ended by themselves" not in found("mostly", stopped=2)
    rising = [
        {**line, "eval_loss": 2 + abs(line["step"] - 10) / 100} if "eval_loss" in line else line for line in lines()
    ]
    assert "evaluation loss was lowest at step 10 (2) and is 2.3 at step 40" in found("rising", rising)
    worse = [{**line, "eval_loss": 2 + line["step"] / 100} if "eval_loss" in line else line for line in lines()]
    assert "evaluation loss has not fallen: 2 before the training, 2.4 at step 40" in found("worse", worse)
    level = [{**line, "eval_loss": 2.0} if "eval_loss" in line else line for line in lines()]
    assert "evaluation loss" not in found("level", level) and "diverged" not in found("sound")
    bad = [{**line, "loss": "NaN"} if line["step"] == 15 and "loss" in line else line for line in lines()]
    assert "error Training has diverged: the loss is NaN at step 15" in found("nan", bad)
    jump = [{**line, "loss": 9.0} if line["step"] == 30 and "loss" in line else line for line in lines()]
    assert "warning The loss jumped to 9 at step 30; the median of the lines before is 2.267." in found("jump", jump)
    norm = [{**line, "grad_norm": "inf"} if line["step"] == 5 and "loss" in line else line for line in lines()]
    assert "warning The gradient norm is not finite in 1 line of the log, first at step 5" in found("norm", norm)
    flat = [{**line, "loss": 3.0} if "loss" in line else line for line in lines()]
    assert "training loss has not fallen: 3 in the first quarter" in found("flat", flat)
    assert "The log ends after 25 of 40 steps" in found("killed", [line for line in lines() if line["step"] <= 25])


def test_outcomes(tmp_path) -> None:
    def outcome(name: str, log: list[dict[str, Any]]) -> str:
        return read_run(run_folder(tmp_path / name, log)).outcome

    assert outcome("finished", lines()) == "finished"
    assert outcome("early", lines(20)) == "stopped early"
    assert outcome("killed", lines()[:-2]) == "not finished"
    ended = {**lines()[-3], "step": 45, "loss": 9.0}
    assert outcome("jumped", [*lines()[:-2], ended]) == "diverged"
    assert outcome("nan", [*lines()[:-2], {**ended, "loss": "NaN"}]) == "diverged"
    assert outcome("resumed", [*lines(20), {"step": 25, "epoch": 1.25, "loss": 2.2}]) == "not finished"


def test_a_resumed_run_tells_each_step_once(tmp_path) -> None:
    """Steps that were done again count once; the page is that of a run without a break, but for the time it took."""
    whole = run_folder(tmp_path / "a" / "run", lines())
    again = [line for line in lines() if line["step"] > 20]
    broken = run_folder(tmp_path / "b" / "run", [*(line for line in lines()[:-2] if line["step"] <= 33), *again])
    runs = [read_run(folder) for folder in (whole, broken)]
    assert runs[0].log == runs[1].log and runs[0].final == runs[1].final
    assert list(runs[1].points("loss")) == list(range(5, 41, 5))
    assert report_page(runs[:1]) == report_page(runs[1:])


def test_the_best_model_is_no_point_of_the_course(tmp_path) -> None:
    log = lines()
    log[-1] = {**log[-1], "eval_loss": 1.0}
    arguments = {**ARGUMENTS, "training": {**ARGUMENTS["training"], "load_best_model_at_end": True}}
    run = read_run(run_folder(tmp_path / "run", log, arguments))
    assert run.points("eval_loss")[40] == pytest.approx(2.35) and run.final["loss"] == 1.0
    seldom = [line for line in log[:-2] if line["step"] < 40 or "loss" in line] + log[-2:]
    assert max(read_run(run_folder(tmp_path / "seldom", seldom, arguments)).points("eval_loss")) == 30
    assert read_run(run_folder(tmp_path / "last", seldom)).points("eval_loss")[40] == 1.0
    assert "evaluation loss 1 lowest: 2.35 at step 40" in words(read(report_page([run])))


def test_a_run_of_ones_own_script(tmp_path) -> None:
    """Whichever files are missing, the page is written; without a log of its own, that of the Trainer is told."""
    folder = run_folder(tmp_path / "run")
    before = report_page([read_run(folder)])
    for name in (
        "args.json",
        "data_report.json",
        "stop_check.json",
        "predictions.jsonl",
        "log.jsonl",
        "trainer_state.json",
    ):
        if name == "log.jsonl":
            state = {"global_step": 40, "max_steps": 40, "epoch": 2.0, "log_history": lines()[:-1]}
            (folder / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
            (folder / "eval_results.json").write_text(json.dumps({"epoch": 2.0, "eval_loss": 2.35}), encoding="utf-8")
        (folder / name).unlink()
        read(write_report(folder).read_text(encoding="utf-8"))
        if name == "log.jsonl":
            run = read_run(folder)
            assert run.outcome == "finished" and run.final == {"loss": 2.35} and len(run.points("loss")) == 8
    assert "no args.json" in words(read(report_page([read_run(folder)]))) and "no args.json" not in before
    own = [{"step": step, "epoch": 1.0, "loss": 3.0 / step, "reward_of_mine": step} for step in range(1, 5)]
    write_lines(folder / "log.jsonl", own)
    assert 'aria-label="reward_of_mine"' in report_page([read_run(folder)])


def test_damaged_files_are_named(tmp_path) -> None:
    folder = run_folder(tmp_path / "run")
    write_lines(folder / "log.jsonl", lines(), end='{"step": 45, "lo')
    assert len(read_run(folder).points("loss")) == 8
    assert "The last line of log.jsonl is cut off" in words(shown(folder))
    write_lines(folder / "log.jsonl", lines(), end='{"step": 45, "lo\n{"step": 46}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl, line 16, is damaged"):
        read_run(folder)
    write_lines(folder / "log.jsonl", lines(), end="[1]\n")
    with pytest.raises(ValueError, match=r"line 16, is damaged \(no JSON object\)"):
        read_run(folder)
    write_lines(folder / "log.jsonl", lines())
    (folder / "args.json").write_text('{\n"model": }', encoding="utf-8")
    with pytest.raises(ValueError, match=r"args\.json, line 2, is no JSON"):
        read_run(folder)
    (folder / "args.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"args\.json holds a list"):
        read_run(folder)


def test_several_runs(tmp_path, capsys, monkeypatch) -> None:
    other = {**ARGUMENTS, "adapter": {"lora_rank": 8}, "versions": {"python": "3.11.7", "torch": "2.14.0"}}
    folders = [
        run_folder(tmp_path / "a" / "run"), run_folder(tmp_path / "b" / "run", lines(lift=0.5), other),
        run_folder(tmp_path / "c", lines(20), {key: value for key, value in ARGUMENTS.items() if key != "adapter"}),
    ]  # fmt: skip
    others = [
        {**each, "reference": f"reference {each['row'] or 'of another row'}"} for each in predictions("another answer")
    ]
    write_lines(folders[1] / "predictions.jsonl", others)
    assert [run.name for run in read_runs(folders)] == ["a/run", "b/run", f"{tmp_path.name}/c"]
    assert main(["report", *map(str, folders[:2]), "--output", str(tmp_path / "both.html")]) == 0
    assert capsys.readouterr().out == f"Report: {tmp_path / 'both.html'}\n"
    html = (tmp_path / "both.html").read_text(encoding="utf-8")
    text = words(read(html))
    table = text[text.index("argument a/run b/run") : text.index("Findings", text.index("argument a/run"))]
    assert table.split() == "argument a/run b/run lora_rank 4 8 version of torch 2.13.0 2.14.0".split()
    assert "evaluation loss 2.35 (the lowest of 5) 2.85 (the lowest of 5)" in text
    assert "warning a/run and b/run: train: 2 of 10 records" in text
    assert "All runs read the same data." in text
    loss = html[html.index('aria-label="Training loss"') :].split("</figure>")[0]
    assert len(polylines(loss)) == 4 and 'class="series c1 d1"' in loss  # two lines, and two in the legend
    row = text[text.index("Row 1") :]
    assert row.index("Answer of a/run an answer 1 at 40") < row.index("Answer of b/run another answer 1 at 40")
    assert "another answer 0" not in text  # to another question
    assert 'aria-label="Perplexity, evaluation"' in html.split("<summary>More charts")[1]
    text = words(shown(*folders))
    assert "lora_rank 4 8 \u2013" in text and "last_step" not in text[: text.index("Findings", 400)]
    same = words(shown(folders[0], run_folder(tmp_path / "d")))
    assert "The runs have the same arguments and versions." in same

    def refused(*argv: Any) -> str:
        assert main(["report", *map(str, argv)]) == 2
        return capsys.readouterr().err

    monkeypatch.chdir(tmp_path)
    assert f"{tmp_path} is no run" in refused(tmp_path) and "runs in it: c, d" in refused(tmp_path)
    assert "none is not there" in refused("none") and "is a file" in refused(tmp_path / "both.html")
    assert "is named twice" in refused(folders[0], tmp_path / "b" / ".." / "a" / "run")
    assert "exists: name another file" in refused(*folders, "--output", tmp_path / "both.html")
    assert "ends with .html" in refused(folders[0], "--output", tmp_path / "both.pdf")
    assert main(["report", str(folders[0])]) == 0 and main(["report", str(folders[0])]) == 0  # its own is written anew


def test_other_objectives(tmp_path) -> None:
    ratios = {f"eval_masked_loss_at_{ratio / 10}": 5.0 - ratio / 10 for ratio in range(1, 11)}
    masked = [
        {**line, "masked_loss": 4.0, "next_token_loss": 3.0} if "loss" in line else
        {**line, "eval_masked_loss": 4.5, **ratios} if "eval_loss" in line else line for line in lines()
    ]  # fmt: skip
    html = report_page([read_run(run_folder(tmp_path / "wedlm", masked))])
    assert 'aria-label="Masked and next-token loss, training"' in html
    assert 'aria-label="Masked loss by the share of masked tokens"' in html and "masked loss 4.5" in words(read(html))
    assert "masked_loss_at_0.3" not in html.split("All values of the evaluations")[0]
    pairs = [
        {
            **line,
            **{
                f"{'eval_' * ('eval_loss' in line)}rewards/{name}": 0.75 for name in ("chosen", "margins", "accuracies")
            },
        }
        for line in lines()
    ]
    html = report_page([read_run(run_folder(tmp_path / "dpo", pairs))])
    assert html.count('aria-label="Rewards, ') == 2 and "chosen answer preferred 75.0 %" in words(read(html))


def test_large_runs_make_no_large_page(tmp_path) -> None:
    log = [{"step": step, "epoch": step / 1e4, "loss": 3.0 + step % 7, "grad_norm": 1.0} for step in range(1, 8_001)]
    folder = run_folder(tmp_path / "run", log)
    steps = tuple(range(100, 1100, 100))
    write_lines(folder / "predictions.jsonl", [{**each, "row": row, "answer": "x" * 20_000} for row in range(20)
                                               for each in predictions(steps=steps)[::2]])  # fmt: skip
    html = report_page([read_run(folder)])
    read(html)
    assert len(html) < 2_500_000 and "8,000 characters are left out" in html


def test_words() -> None:
    assert [duration(value) for value in (0.04, 45.31, 59.97, 200, 3600, 7500, 90_000)] == [
        "0.0 s", "45.3 s", "1 min", "3 min 20 s", "1 h", "2 h 5 min", "1 d 1 h",
    ]  # fmt: skip
    assert [count(value) for value in (487, 9_990, 12_345, 1_180_000, 2.5e9)] == [
        "487",
        "9,990",
        "12.3k",
        "1.18M",
        "2.5B",
    ]
    assert [figure(value) for value in (2.0038, 1.234e-4, 0.5, 12_345.6, 3.0)] == [
        "2.004",
        "1.234e-4",
        "0.5",
        "12,346",
        "3",
    ]
    assert [percent(value) for value in (0, 0.0001, 0.5662, 1, math.nan)] == [
        "0 %",
        "< 0.1 %",
        "56.6 %",
        "100 %",
        "NaN",
    ]
    assert date(0) == "1 January 1970, 00:00 UTC"
    assert [listed(list("abcdefg")[:n]) for n in (1, 2, 3, 7)] == [
        "a",
        "a and b",
        "a, b and c",
        "a, b, c, d, e and 2 more",
    ]


@pytest.mark.slow
def test_a_browser_has_nothing_to_complain_of(tmp_path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium is installed")
    folders = [run_folder(tmp_path / name) for name in ("first", "second")]
    write_lines(folders[0] / "predictions.jsonl", predictions(EVIL + "x" * 300))
    assert main(["report", *map(str, folders), "--output", str(tmp_path / "both.html")]) == 0
    page = escape((tmp_path / "both.html").read_text(encoding="utf-8"))
    measure = (
        "const page = document.getElementById('both').contentDocument; "
        "document.title = page.documentElement.scrollWidth + ' ' + page.querySelectorAll('svg[role]').length"
    )
    frame = f'<iframe id="both" style="width: 360px; height: 800px; border: 0" srcdoc="{page}"></iframe>'
    (tmp_path / "phone.html").write_text(f'<body onload="{measure}">{frame}</body>', encoding="utf-8")
    switches = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--hide-scrollbars",
        "--enable-logging=stderr", "--dump-dom",
    ]  # fmt: skip
    command = [browser, *switches, (tmp_path / "phone.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "CONSOLE" not in done.stderr
    width, charts = map(int, re.findall("<title>(.*?)</title>", done.stdout)[0].split())
    assert width == 360 and charts == 10  # nothing reaches beyond a phone's screen


def test_the_report_says_what_the_result_is(tmp_path) -> None:
    """The best checkpoint, and the average; a note under fp16, which skips steps whose gradient norm is not finite."""
    training = {"load_best_model_at_end": True, "metric_for_best_model": "rougeL", "fp16": True}
    (tmp_path / "args.json").write_text(json.dumps({"training": training, "ema": {"ema_decay": 0.95}}))
    state = {"best_model_checkpoint": "out/checkpoint-40", "best_metric": 0.105, "global_step": 80, "log_history": []}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    lines = [{"step": 80, "loss": 1.0, "grad_norm": "inf"}, {"step": 80, "train_runtime": 1.0, "train_loss": 1.0}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps({"time": 0.0, **line}) + "\n" for line in lines))
    found = {notice.text: notice.severity for notice in find_problems(read_run(tmp_path))}
    assert found["The result is checkpoint-40, the best by rougeL (0.105); later steps are not in it."] == "note"
    assert found["Evaluations and the result are of the average of the weights (ema_decay 0.95)."] == "note"
    assert found["The gradient norm is not finite in 1 line of the log, first at step 80."] == "note"
