"""The benchmarks at toy sizes: all ways learn the same, what is counted is right, and docs say what the records say."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from dataclasses import replace
from typing import Any

import pytest
import runs
import torch

sys.path.insert(0, str(runs.ROOT / "benchmarks"))
import causal_step
import compile as compiling
import dpo_step
import engines
import evaluation
import gpu
import growth
import performance
import prepare
import records
import trainers
import turns
import wedlm_step
import workloads
from floor import products_seconds

from hf_sft import products
from hf_sft.attention.layout import Layout
from hf_sft.collators import WeDLMCollator
from hf_sft.memory.activations import MicroBatch
from hf_sft.memory.plan import Plan, estimate
from hf_sft.noise import MaskRule


class AtOnce:
    """A turn that nobody waits for."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def begin(self) -> None:
        self._start = time.perf_counter()

    def end(self) -> None:
        self.seconds.append(time.perf_counter() - self._start)

    of_trainer = turns.Turn.of_trainer


def one_by_one(ways: dict[str, turns.Way], steps: int, **_: Any) -> dict[str, turns.Course]:
    """``turns.alternate`` in this process."""
    courses = {}
    for name, (function, values) in ways.items():
        turn = AtOnce()
        losses = function(turn, steps=steps + turns.WARM_UP, **values)
        courses[name] = turns.Course(turn.seconds[turns.WARM_UP :], losses, 1.0, 2.0)
    return courses


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(trainers, "quiet", lambda: None)
    monkeypatch.setattr(trainers, "make_model", lambda size: workloads.make_model(size, width=32, layers=1))
    for module in (causal_step, compiling, dpo_step, evaluation, growth, gpu, wedlm_step):
        monkeypatch.setattr(module, "alternate", one_by_one)


# --- workloads --------------------------------------------------------------------------------------------------------


def test_packs_have_the_tokens_that_are_asked_for():
    packs = workloads.gsm8k_packs(3, 100, 1024)
    assert len(packs) == 3 and all(1000 <= workloads.tokens(pack) <= 1024 for pack in packs)
    assert all(0.5 < workloads.scored(pack) / workloads.tokens(pack) < 0.65 for pack in packs)
    for parts in (1, 7, 64):
        (pack,) = workloads.equal_packs(1, parts, 100, 1024)
        assert len(pack) == parts and workloads.tokens(pack) == 1024
        assert max(len(r["input_ids"]) for r in pack) - min(len(r["input_ids"]) for r in pack) <= 1


# --- trainers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
def test_all_trainers_learn_the_same_of_the_same_packs(here, accumulation):
    packs = workloads.gsm8k_packs(4, 64, 512)
    losses = {}
    for way in (trainers.ours, trainers.plain, trainers.hf, trainers.trl):
        losses[way.__name__] = way(AtOnce(), 2, packs=packs, vocabulary=64, accumulation=accumulation)
    for name, values in losses.items():
        assert values == pytest.approx(losses["plain"], rel=2e-6), name


def test_the_causal_step_gives_all_figures_and_says_what_it_missed(here):
    result = causal_step.run(64, 2, 512)
    assert set(result["seconds"]) == set(causal_step.WAYS) and all(
        seconds > 0 for seconds in result["products_seconds"].values()
    )
    assert result["faster_than"]["TRL"] == pytest.approx(result["seconds"]["TRL"] / result["seconds"]["SFTTrainer"])
    demanded = {**result, "vocab_size": 6400}
    slow = {
        **demanded,
        "faster_than": {**result["faster_than"], "TRL": 2.4},
        "seconds": {"SFTTrainer": 1.2, "limit": 1.0},
    }
    assert causal_step.missed([slow]) == ["TRL at 6,400", "the limit at 6,400"]
    fast = {**slow, "faster_than": {"TRL": 2.5}, "seconds": {"SFTTrainer": 1.1, "limit": 1.0}}
    assert causal_step.missed([fast]) == []
    table = causal_step.markdown({"runs": [result]})
    assert len(table.splitlines()) == 2 + len(causal_step.WAYS) + len(result["products_seconds"])


def test_evaluations_agree_with_the_plain_forward(here):
    result = evaluation.run(64, 2, 2, 512)
    ours = result["losses"].pop("SFTTrainer")
    for name, loss in result["losses"].items():  # the others are means of means of packs
        assert ours == pytest.approx(loss, rel=1e-6 if name == "plain forward" else 1e-3), name
    slow = {"vocab_size": 6400, "faster_than": {"plain forward": 0.99}}
    assert evaluation.missed([slow]) == ["the plain forward at 6,400"]
    assert evaluation.missed([{**slow, "faster_than": {"plain forward": 1.0}}]) == []


def test_both_dpo_trainers_learn_the_same_of_the_same_pairs(here):
    result = dpo_step.run(64, 1, 2)
    assert result["losses"]["DPOTrainer"][0] == pytest.approx(math.log(2), rel=1e-7)
    assert result["losses"]["DPOTrainer"] == pytest.approx(result["losses"]["TRL"], rel=1e-5)
    assert result["largest_relative_loss_difference"] < 1e-5 and len(set(result["losses"]["TRL"])) == 3
    assert result["pairs_per_second"]["TRL"] == pytest.approx(2 / result["seconds"]["TRL"])
    table = dpo_step.markdown({"runs": [result]})
    assert len(table.splitlines()) == 4 and "| 64 | TRL |" in table
    good = {"vocab_size": 64, "faster_than": {"TRL": 1.0}, "largest_relative_loss_difference": 9e-5}
    assert dpo_step.missed([good]) == []
    bad = {**good, "faster_than": {"TRL": 0.99}, "largest_relative_loss_difference": 2e-4}
    assert dpo_step.missed([bad]) == ["TRL at 64", "the same losses at 64"]


def test_a_compiled_step_is_compared_with_the_eager_one(here):
    result = compiling.run(64, 1, 256, backend="eager", ways=("eager", "regions"))
    assert result["largest_relative_loss_difference"] < 1e-5 and "| 64 | regions |" in compiling.markdown(
        {"runs": [result]}
    )


def test_preparation_may_take_a_third_of_the_time_of_trl():
    assert prepare.missed({"hf_sft / TRL": 0.33}) == [] and len(prepare.missed({"hf_sft / TRL": 0.34})) == 1


def test_growth_measures_every_point_of_an_axis(here, monkeypatch):
    monkeypatch.setattr(growth, "DOCUMENTS", (2, 4))
    monkeypatch.setattr(growth, "VOCABULARY", 64)
    monkeypatch.setitem(growth.AXES, "documents", (lambda count: growth.documents(count, 128), "documents"))
    found = growth.run("documents", 1)
    assert [(name, [p["at"] for p in points]) for name, points in found["series"].items()] == [
        ("causal", [2, 4]), ("WeDLM", [2, 4]),
    ]  # fmt: skip
    assert all(p["tokens"] == 128 and p["seconds"] > 0 for points in found["series"].values() for p in points)
    monkeypatch.setattr(growth, "ACCUMULATIONS", (1, 2))
    assert [per_step for _, per_step in growth.accumulation(1).values()] == pytest.approx([2048, 4096], abs=40)


def test_growth_names_the_points_that_cost_too_much():
    def axis(*costs: float) -> dict[str, Any]:
        points = [{"at": 2**n, "microseconds_per_token": cost} for n, cost in enumerate(costs)]
        return {"title": "things", "series": {"causal": points}}

    assert growth.missed({"documents": axis(100, 90, 109), "accumulation": axis(100, 109), "length": axis(1, 9)}) == []
    found = growth.missed({"documents": axis(100, 90, 111), "accumulation": axis(100, 100, 120)})
    assert [line.split(":")[0] for line in found] == ["causal, 4 things"] * 2


def test_engines_are_measured_with_more_and_more_processes(monkeypatch):
    def launch(engine: str, steps: int, processes: int, growing: bool = False) -> dict[str, Any]:
        assert growing and steps == 3
        return {"full": {"step": [9, 9, 0.5], "processor": [9, 9, 0.4 * processes], "peak_mb": 700 + processes}}

    monkeypatch.setattr(engines, "launch", launch)
    found = engines.growth([1, 2, 4], 3)
    assert list(found["series"]) == ["DDP", "ZeRO-2", "ZeRO-3", "FSDP2"]
    for points in found["series"].values():
        assert [(p["at"], p["peak_mb"]) for p in points] == [(1, 701), (2, 702), (4, 704)]
        assert [p["processor_seconds_per_pack"] for p in points] == pytest.approx([0.4] * 3)
    table = engines.markdown({"processes": found}, "processes")
    assert len(table.splitlines()) == 2 + 3 * 4 and "| 4 | FSDP2 | 0.50 | 0.40 | 704 |" in table


def test_an_engine_writes_what_it_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(workloads, "make_model", lambda size, make=workloads.make_model: make(size, width=32, layers=1))
    engines.work(engines.ALONE, 2, tmp_path / "found.json", growing=True)
    (found,) = json.loads((tmp_path / "found.json").read_text()).values()
    assert len(found["step"]) == len(found["processor"]) == len(found["loss"]) == 2 and found["save"] == []
    assert found["peak_mb"] > 100


def test_a_wedlm_step_is_the_same_by_all_ways(here, monkeypatch):
    for name, value in (("VOCABULARY", 64), ("CLEAN_TOKENS", 192), ("DOCUMENTS", 3), ("BLOCK", 8)):
        monkeypatch.setattr(wedlm_step, name, value)
    results = wedlm_step.measure(1)
    loops = {"limit", "sdpa", "sdpa, same products", "reference"}
    assert set(results["seconds"]) == {"SFTTrainer", *loops} and set(results["faster_than"]) == loops
    ratio = results["seconds"]["sdpa"] / results["seconds"]["SFTTrainer"]
    assert results["faster_than"]["sdpa"] == pytest.approx(ratio)
    assert results["largest_relative_loss_difference"] < 1e-6 and results["largest_gradient_difference"] < 1e-6
    fast = {"faster_than": {"sdpa": 2.5, "reference": 5}, "share_of_peak": {"sdpa": 0.5, "reference": 0.4}}
    assert wedlm_step.missed({**fast, "elision_gain": 1.2, "collating_share": 0.01}) == []
    slow = {"faster_than": {"sdpa": 2.4, "reference": 5}, "share_of_peak": {"sdpa": 0.5, "reference": 0.5}}
    assert len(wedlm_step.missed({**slow, "elision_gain": 1.1, "collating_share": 0.06})) == 4
    assert "| reference |" in wedlm_step.markdown(results)


def test_products_are_those_of_the_linear_layers():
    model = workloads.make_model(128, width=32, layers=2)
    assert 0 < products_seconds(model, 64, 16, repeats=2) < 5


# --- GPU --------------------------------------------------------------------------------------------------------------


def toy(**changes: Any) -> gpu.Case:
    return gpu.Case(
        **{"model": "toy", "mode": "full", "objective": "causal", "length": 128, "layers": 2, "dry": True, **changes}
    )


def test_pairs_are_those_of_the_rule(tmp_path):
    case = toy()
    (pack,) = gpu.packs_of(case, 1, 0.2)
    (causal,) = trainers.our_trainer([pack], 512, trainers.settings(str(tmp_path), 1)).get_train_dataloader()
    wedlm = WeDLMCollator(511, MaskRule(8), seed=0)([pack])
    for batch in (causal, wedlm):
        assert gpu.allowed_pairs(batch) == int(Layout.from_batch(batch).allowed().sum())


@pytest.mark.parametrize(("mode", "objective"), [("full", "causal"), ("lora", "causal"), ("lora", "wedlm")])
def test_useful_flops_are_those_that_torch_counts_of_the_linear_layers(mode, objective, monkeypatch, tmp_path):
    from torch.utils.flop_counter import FlopCounterMode

    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)  # the counter does not know its operator
    case = toy(mode=mode, objective=objective)
    packs = gpu.packs_of(case, 1, 0.2)
    trainer = gpu.our_trainer(case, packs, trainers.settings(str(tmp_path), 1), "segment")
    (batch,) = trainer.get_train_dataloader()
    with FlopCounterMode(display=False) as counter:
        trainer.training_step(trainer.model, trainer._prepare_inputs(batch))
    counts = counter.get_flop_counts()["Global"].items()
    counted = sum(n for op, n in counts if "attention" not in str(op))  # mm, addmm, bmm
    config = trainer.model.config
    width = config.num_attention_heads * config.head_dim
    attention = 12.0 * config.num_hidden_layers * width * gpu.allowed_pairs(batch)
    # The first layer's frozen weights need no gradient of their input under LoRA; rotary tables are products as well.
    useful = gpu.useful_flops(trainer.model, batch) - attention
    assert useful == pytest.approx(counted, rel=0.02 if mode == "full" else 0.1)
    one_row = gpu.useful_flops(trainer.model, {**batch, "target_ids": batch["target_ids"][:1]}) - attention
    of_a_row = (
        (6 if mode == "full" else 4) * config.hidden_size * case.vocabulary
    )  # the head works on scored rows alone
    assert useful - one_row == (len(batch["target_ids"]) - 1) * of_a_row


def test_an_adapter_of_wedlm_trains_the_row_of_the_mask_token():
    case = toy(mode="lora", objective="wedlm")
    model = gpu.build(case)
    rows = [parameter for name, parameter in model.named_parameters() if "trainable_tokens_delta" in name]
    assert rows and all(row.shape == (1, 64) and row.requires_grad for row in rows)
    assert model.get_input_embeddings().token_adapter.token_indices["default"] == [case.mask_token]


def test_trl_gets_flash_attention_where_there_is_one_and_a_record_says_where_there_is_none(monkeypatch):
    import transformers.utils as found

    for name in ("is_flash_attn_2_available", "is_flash_attn_3_available"):
        monkeypatch.setattr(found, name, lambda: False)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda _: None)
    ways, not_run = gpu.ways_of(toy(dry=False), [])
    assert list(ways) == ["ours", "dense", "TRL"] and "installed" in not_run["TRL, flash"]
    monkeypatch.setattr(found, "is_flash_attn_2_available", lambda: True)
    ways, not_run = gpu.ways_of(toy(dry=False), [])
    assert ways["TRL, flash"][1]["attention"] == "flash_attention_2" and not_run == {}
    assert list(gpu.ways_of(toy(dry=False, objective="wedlm"), [])[0]) == ["ours", "dense"]


def test_kernels_stand_beside_ours_where_they_are_installed(monkeypatch):
    case = toy(dry=False, objective="wedlm", kernels=True)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda _: None)
    ways, not_run = gpu.ways_of(case, [])
    assert list(ways) == ["ours", "ours, compiled", "dense"] and "liger" in not_run["ours, Liger"]
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda _: "there")
    ways, not_run = gpu.ways_of(case, [])
    assert [name for name in gpu.WAYS if name in ways] == list(ways) and not_run == {}
    assert ways["ours, Liger"][1]["kernels"] == {"use_liger_kernel": True}
    ways, not_run = gpu.ways_of(replace(case, checkpointing="products"), [])
    assert list(ways) == ["ours", "ours, Liger", "dense"] and "policies" in not_run["ours, compiled"]


def test_demands_on_a_gpu_that_are_missed_are_named():
    def measured(mfu: float | None, dense: float = 3.0, **changes: Any) -> dict[str, Any]:
        case = {"model": "8B", "mode": "full", "objective": "causal", "length": 8192, **changes}
        return {**case, "ours": {"mfu": mfu, "seconds": 1.0}, "dense": {"seconds": dense}, "failed": {}}

    assert gpu.missed([measured(0.5), measured(0.1, model="1.7B"), measured(0.1, mode="lora"), measured(None)]) == []
    assert gpu.missed([measured(0.49)]) == ["8B full causal: 49% MFU of 50%"]
    assert gpu.missed([measured(0.45, objective="wedlm", mode="lora")]) == []
    assert len(gpu.missed([measured(0.44, 2.9, objective="wedlm")])) == 2
    assert gpu.missed([measured(0.45, 2.9, objective="wedlm", length=4096)]) == []
    broken = {key: value for key, value in measured(0.5).items() if key != "ours"}
    assert gpu.missed([broken]) == ["8B full causal: ours did not run"]


def test_the_profiled_step_is_one_of_a_training(monkeypatch):
    """Under autocast, in bf16, with activation checkpointing: what every other step is as well."""
    seen: list[tuple[bool, bool]] = []

    def build(case: gpu.Case) -> Any:
        model = whole(case)
        model.model.register_forward_pre_hook(
            lambda module, _: (
                seen.append((torch.is_autocast_enabled("cpu"), module.is_activation_checkpointing))
                if module.training
                else None
            )
        )
        return model

    whole = gpu.build
    monkeypatch.setattr(gpu, "build", build)
    monkeypatch.setattr(gpu, "same", lambda _: {"bf16": True})
    monkeypatch.setattr(trainers, "quiet", lambda: None)
    case = toy(checkpointing="full")
    facts = gpu.measured_facts(case, gpu.packs_of(case, 3, 0.2), "segment")
    assert seen == [(True, True)] * 3 and facts["useful_flops"] > 0
    assert facts["all_operators_ms"] > sum(facts["operators_ms"].values()) * 0.99 > 0


def test_what_fails_costs_no_other_result(monkeypatch, here):
    def facts(*_: Any, **__: Any) -> Any:
        raise RuntimeError("worker:\nout of memory")

    course = turns.Course([1.0], [2.0], 0.0, 3.0)
    monkeypatch.setattr(
        gpu, "alternate", lambda ways, _: facts() if {"facts", "TRL"} & ways.keys() else dict.fromkeys(ways, course)
    )
    result = gpu.run(toy(), 1, 0.2)
    assert result["failed"] == {"facts": "worker:\nout of memory", "TRL": "worker:\nout of memory"}
    assert result["ours"]["seconds"] == result["dense"]["seconds"] == 1.0 and result["ours"]["mfu"] is None
    assert "out of memory" in gpu.markdown({"runs": [result]}) and gpu.where_time_goes(result) == ""
    assert gpu.missed([{**result, "model": "8B"}]) == ["8B full causal: the useful FLOPs were not counted"]


def test_the_planner_says_how_many_layers_are_taken(monkeypatch):
    monkeypatch.setattr(gpu, "MODELS", {**gpu.MODELS, "toy": (64, 128, 12, 4, True)})
    case = toy(layers=12)
    assert gpu.layers_of(case, None) == gpu.layers_of(case, 80.0) == 12
    plan = Plan(gpu.config_of(replace(case, layers=8)), case.mode, batch=MicroBatch(1, case.length))
    room = (1.1 * estimate(plan).total + 2 * 2**30) / 2**30
    assert gpu.layers_of(case, room * 1.00001) == 8 and gpu.layers_of(case, 0.1) == 1
    fewer = gpu.layers_of(replace(case, objective="wedlm"), room * 1.00001)
    assert fewer < 8  # noisy streams stand in memory as well


def test_a_dry_run_takes_the_road_of_the_gpu(here, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "MODELS", {**gpu.MODELS, "toy": (64, 128, 1, 4, True)})
    target = tmp_path / "gpu.json"
    words = [
        "--dry_run",
        "--steps",
        "1",
        "--modes",
        "full",
        "--checkpointing",
        "full",
        "--kernels",
        "--output",
        str(target),
    ]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *words])
    gpu.main()
    results = json.loads(target.read_text())["results"]
    causal, wedlm = results["runs"]
    assert causal["failed"] == wedlm["failed"] == {} and results["missed"] == []
    assert list(causal["not_run"]) == list(wedlm["not_run"]) == ["ours, Liger"]
    for run, names in (
        (causal, ("ours, compiled", "dense", "TRL", "TRL, flash")),
        (wedlm, ("ours, compiled", "dense")),
    ):
        for name in names:
            assert run["ours"]["losses"] == pytest.approx(run[name]["losses"], rel=1e-5), name
    policies = {name: causal[name]["checkpointing"] for name in gpu.WAYS if name in causal}
    assert policies == dict.fromkeys(("ours", "ours, compiled", "dense", "TRL", "TRL, flash"), "full")
    assert causal["ours"]["mfu"] is None and causal["operators_ms"] and causal["useful_flops"] > 0
    printed = capsys.readouterr().out
    assert "| toy, 1 layers | full | wedlm | dense | dense, full |" in printed
    assert "| operators of toy full wedlm |" in printed
    if not torch.cuda.is_available():
        monkeypatch.setattr(sys, "argv", ["gpu.py"])
        with pytest.raises(SystemExit):
            gpu.main()


# --- records and docs -------------------------------------------------------------------------------------------------


def test_the_page_says_what_the_records_say():
    page = performance.PAGE.read_text(encoding="utf-8")
    assert performance.filled(page) == page, "run python benchmarks/performance.py"
    pictures = re.findall(r"\(pictures/([\w-]+\.png)\)", page)
    assert pictures and all((performance.PICTURES / name).is_file() for name in pictures)
    assert set(re.findall(r"growth-(\w+)\.png", page)) == set(performance.DRAWN) == {*growth.AXES, "processes"}


def test_pictures_are_drawn_of_every_axis(tmp_path, monkeypatch):
    monkeypatch.setattr(performance, "PICTURES", tmp_path)
    for axis, (found, conditions) in performance.drawn().items():
        assert performance.draw(axis, found, conditions).stat().st_size > 10_000


def test_a_script_that_misses_its_demands_ends_with_an_error(tmp_path):
    words = records.parser("What it is.\n\nAnd how.", "growth", steps=7).parse_args(["--note", "why"])
    assert (words.steps, words.note, words.output) == (7, "why", None)
    path = tmp_path / "one.json"
    records.conclude("growth", {"missed": []}, str(path))
    with pytest.raises(SystemExit, match=r"^demands that are not met: this; that$"):
        records.conclude("growth", {"missed": ["this", "that"]}, str(path))
    assert json.loads(path.read_text())["results"] == {"missed": ["this", "that"]}


@pytest.mark.parametrize("path", sorted(records.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_a_record_names_its_conditions(path):
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["benchmark"] == path.stem and (records.FOLDER.parent / f"{path.stem}.py").is_file()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", record["conditions"]["date"])
    assert {"processor", "cores", "versions"} <= set(record["conditions"]) and "torch" in record["conditions"][
        "versions"
    ]
