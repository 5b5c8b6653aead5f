"""Training steps on one GPU: tokens per second, MFU and peak memory of Qwen3-like models, beside TRL and the dense backend.

    python benchmarks/gpu.py [--models 0.6B 1.7B 8B] [--modes full lora qlora] [--objectives causal wedlm] [--output results.json]
    python benchmarks/gpu.py --dry_run        the same roads on a CPU with a model of toy size; its times mean nothing

Random weights; bf16 (float32 weights under autocast in full training), packs of ``--length`` tokens in documents as long as
gsm8k's times ``--stretch``, collated ahead by two workers (``dataloader_num_workers``, by default 0). Each way is a process of
its own and has the GPU for itself; figures are medians of ``--steps`` steps after two that warm up (kernels are compiled in
these). Of a model that is too large for the GPU so many layers are taken as the planner of memory says.

    ours            SFTTrainer with attention_backend auto: flash for causal, flex for WeDLM
    ours, compiled  the same with torch_compile, its regions; with --kernels
    ours, Liger     the same with use_liger_kernel, where it is installed; with --kernels
    dense           SFTTrainer with a mask [T, T]
    TRL             its SFTTrainer with its packing, causal alone, on SDPA with a mask
    TRL, flash      the same on transformers' FlashAttention: flash-attn's kernels, or those of the hub where ``kernels`` is
                    installed (``not_run`` says it where neither is there). In a dry run SDPA stands in for them

Without --checkpointing no way checkpoints activations. With it all have the same policy, "full" unless another is named. TRL has
"full" and "attention" (it says "selective"); beside our "products" it gets "attention". The table names what each way had.

WeDLM models are built as ``train.py`` does: an adapter trains the mask token's row of the embedding.

    MFU = useful FLOPs / (seconds * peak FLOP/s of the device in bf16)
      useful  = tokens * (6 trained + 4 frozen weights of linear layers) + the same of the head for scored rows
              + 12 * layers * heads * head_dim * pairs      pairs: (query, key) that the rule allows; noisy streams elided
      nothing that is computed twice, skipped or thrown away counts. Without a known peak there is no MFU.

The record is written after each case. It holds the operators of a profiled step of ours that take the most of the device, in a
training as all others: where the time goes. They are printed where a demand is missed: full training of the 8B shape at 50 %
MFU, causal; WeDLM on flex at 45 %, and at 3 times the dense backend's tokens per second in packs of 8,192 tokens. (Where dense
does not fit into memory there is nothing to compare with.)
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trainers
from records import conclude, parser, table, write_record
from torch import nn
from turns import WARM_UP, Turn, alternate
from workloads import GSM8K_LENGTHS, Row, row

from hf_sft.data.packing import pack_documents

# Dimensions of Qwen3 0.6B, 1.7B and 8B (arXiv 2505.09388, table 1): width, inner width, layers, heads, tied embeddings.
MODELS = {
    "0.6B": (1024, 3072, 28, 16, True), "1.7B": (2048, 6144, 28, 16, True), "8B": (4096, 12_288, 36, 32, False),
    "toy": (64, 128, 2, 4, True),
}  # fmt: skip
OPERATORS = 16  # of a profiled step that are kept
CAUSAL_MFU, WEDLM_MFU, OVER_DENSE = 0.50, 0.45, 3.0  # demanded
WAYS = ("ours", "ours, compiled", "ours, Liger", "dense", "TRL", "TRL, flash")
# What TRL's "gradient_checkpointing" has that is nearest to each policy of ours, and keeps no less than it can.
TRL_CHECKPOINTING = {"full": "full", "attention": "attention", "products": "attention"}


@dataclass(frozen=True)
class Case:
    """What a process trains, and how."""

    model: str
    mode: str
    objective: str
    length: int
    layers: int
    checkpointing: str | None = None
    kernels: bool = False
    dry: bool = False

    @property
    def vocabulary(self) -> int:
        return 512 if self.dry else 151_936

    @property
    def mask_token(self) -> int:
        return self.vocabulary - 1


def config_of(case: Case) -> Any:
    from transformers import Qwen3Config

    width, inner, _, heads, tied = MODELS[case.model]
    return Qwen3Config(
        vocab_size=case.vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=case.layers,
        num_attention_heads=heads, num_key_value_heads=min(8, heads // 2), head_dim=16 if case.dry else 128,
        max_position_embeddings=40_960, tie_word_embeddings=tied,
    )  # fmt: skip


def packs_of(case: Case, count: int, stretch: float) -> list[list[Row]]:
    rng = np.random.default_rng(0)
    drawn = np.interp(
        rng.random(4 * count * case.length // 200 + 20), np.linspace(0, 1, len(GSM8K_LENGTHS)), GSM8K_LENGTHS
    )
    lengths = np.minimum(drawn * stretch, case.length).astype(int).tolist()
    packs = sorted(pack_documents(lengths, case.length), key=lambda pack: -sum(lengths[n] for n in pack))[:count]
    return [[row(lengths[number], case.vocabulary - 1, rng) for number in pack] for pack in packs]


def build(case: Case) -> Any:
    """The model with random weights as ``train.py`` would hold it; a quantised one is written and read once."""
    from transformers import Qwen3ForCausalLM

    from hf_sft import LoraArguments, ModelArguments, load_model

    torch.manual_seed(0)
    full = case.mode == "full"
    with tempfile.TemporaryDirectory() as folder:
        model = Qwen3ForCausalLM._from_config(config_of(case), dtype=torch.float32 if full else torch.bfloat16)
        if full:
            return model
        model.save_pretrained(folder)
        del model
        mask = [case.mask_token] if case.objective == "wedlm" else []
        arguments = ModelArguments(model_name_or_path=folder, train_mode=case.mode)
        return load_model(arguments, LoraArguments(lora_rank=16), input_rows=mask)


def same(case: Case) -> dict[str, Any]:
    """What all trainers are told beside ``trainers.settings``: two workers collate ahead."""
    return {"bf16": not case.dry, "dataloader_num_workers": 0 if case.dry else 2}


def our_trainer(
    case: Case, packs: list[list[Row]], values: dict[str, Any], backend: str, kernels: Mapping[str, Any] | None = None
) -> Any:
    from hf_sft import WeDLMArguments

    how: dict[str, Any] = {"attention_backend": backend, "objective": case.objective, "model": build(case)}
    if case.checkpointing is not None:
        how["activation_checkpointing_policy"] = case.checkpointing
    if case.objective == "wedlm":
        how["wedlm_args"] = WeDLMArguments(mask_token_id=case.mask_token)
    own = {**same(case), "activation_checkpointing": case.checkpointing is not None}
    return trainers.our_trainer(packs, case.vocabulary, {**values, **own, **(kernels or {})}, **how)


def ours(turn: Turn, steps: int, case: Case, packs: list[list[Row]], backend: str, **how: Any) -> list[float]:
    return trainers.steps_of(turn, steps, lambda values: our_trainer(case, packs, values, backend, **how))


def trl(turn: Turn, steps: int, case: Case, packs: list[list[Row]], attention: str) -> list[float]:
    return trainers.steps_of(turn, steps, lambda values: trl_trainer(case, packs, values, attention))


def trl_trainer(case: Case, packs: list[list[Row]], values: dict[str, Any], attention: str) -> Any:
    """TRL's trainer with an attention of transformers."""
    from hf_sft.models.wrappers import base_model

    own = same(case)
    if case.checkpointing is not None:
        selective = TRL_CHECKPOINTING[case.checkpointing] == "attention"
        own |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"selective": selective}}
    model = build(case)
    base_model(model).set_attn_implementation(attention)
    return trainers.trl_trainer(packs, case.vocabulary, values, model=model, config=own)


def flash_attention(dry: bool) -> str | None:
    """The name under which transformers has FlashAttention here, which TRL's packing is made for; None where it has none."""
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    if dry:
        return "sdpa"
    if is_flash_attn_3_available():
        return "flash_attention_3"
    if is_flash_attn_2_available():
        return "flash_attention_2"
    return "kernels-community/flash-attn2" if importlib.util.find_spec("kernels") else None


# ---- what counts ----


def measured_facts(case: Case, packs: list[list[Row]], backend: str) -> dict[str, Any]:
    """In a process of its own: useful FLOPs of a step, what ran, and the operators of the last step of a training."""
    steps = WARM_UP + 1
    with tempfile.TemporaryDirectory() as folder:
        trainer = our_trainer(case, packs, trainers.settings(folder, steps), backend)
        batches = trainer.get_train_dataloader()
        flops = [useful_flops(trainer.model, batch) for _, batch in zip(packs, batches, strict=False)]
        watch = profiled_step(steps)
        trainer.add_callback(watch)
        trainer.train()
    key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    events = sorted(watch.profile.key_averages(), key=lambda event: -getattr(event, key))
    return {
        "backend": trainer.layout.name,
        "useful_flops": float(np.median(flops)),
        "all_operators_ms": sum(getattr(event, key) for event in events) / 1e3,
        "operators_ms": {event.key[:80]: getattr(event, key) / 1e3 for event in events[:OPERATORS]},
    }


def profiled_step(number: int) -> Any:
    """A callback whose ``profile`` sees step ``number``, counted from 1, whole."""
    from torch.profiler import ProfilerActivity, profile
    from transformers import TrainerCallback

    on_cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]

    class Profiled(TrainerCallback):
        def __init__(self) -> None:
            self.profile = profile(activities=activities)

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == number - 1:
                self.profile.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == number:
                if on_cuda:
                    torch.cuda.synchronize()
                self.profile.stop()

    return Profiled()


def useful_flops(model: Any, batch: dict[str, Any]) -> float:
    """Of one step on ``batch``: the formula above."""
    from hf_sft.models.head import active_head, linear_of
    from hf_sft.models.wrappers import base_model

    base = base_model(model)
    config, head = base.config, linear_of(active_head(base.get_output_embeddings()))
    tokens, rows, flops = sum(batch["doc_lengths"]), len(batch["target_ids"]), 0
    for module in base.modules():  # NF4's layers are linear ones too, and so are the two factors of an adapter
        if isinstance(module, nn.Linear):
            products = 6 if module.weight.requires_grad else 4
            flops += products * (rows if module is head else tokens) * module.in_features * module.out_features
    return flops + 12.0 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * allowed_pairs(batch)


def allowed_pairs(batch: dict[str, Any]) -> int:
    """(query, key) pairs of the rule, counted from the integers."""
    pos = batch["position_ids"][0].numpy()
    if "block_ids" not in batch:
        return int((pos + 1).sum())
    block, limit = batch["block_ids"][0].numpy(), batch["limits"][0].numpy()
    begins = np.flatnonzero(np.diff(block, prepend=-2))
    in_block = np.arange(len(block)) - np.repeat(begins, np.diff(begins, append=len(block))) + 1
    return int((limit + np.where(block >= 0, in_block, 0)).sum())


# ---- cases ----


def _facts_way(turn: Turn, steps: int, case: Case, packs: list[list[Row]], path: str) -> list[float]:
    """The facts come back through a file: the process, and with it the device's memory, is given back before the next."""
    trainers.quiet()
    for _ in range(steps):
        turn.begin()
        turn.end()
    Path(path).write_text(json.dumps(measured_facts(case, packs, "auto" if not case.dry else "segment")))
    return []


def layers_of(case: Case, memory: float | None) -> int:
    """The most layers, the model's own at most, with which the planner says that a case fits into ``memory`` GiB; at least 1."""
    from hf_sft import LoraArguments
    from hf_sft.memory.activations import MicroBatch
    from hf_sft.memory.plan import Plan, estimate, fits

    own = MODELS[case.model][2]
    if memory is None:
        return own

    def total(layers: int) -> int:
        checkpointing = {} if case.checkpointing is None else {"checkpointing": True, "policy": case.checkpointing}
        plan = Plan(
            config_of(replace(case, layers=layers)), case.mode, LoraArguments(lora_rank=16),
            batch=MicroBatch(1, case.length, case.objective), **checkpointing,
        )  # fmt: skip
        return estimate(plan).total

    return next((layers for layers in (own, *range(own - own % 4, 0, -4)) if fits(total(layers), memory)), 1)


def ways_of(case: Case, packs: list[list[Row]]) -> tuple[dict[str, Any], dict[str, str]]:
    """The ways to take a case's steps, and what cannot be taken here, with the reason."""
    how, not_run = {"case": case, "packs": packs}, {}
    ways: dict[str, Any] = {"ours": (ours, own := {**how, "backend": "segment" if case.dry else "auto"})}
    if case.kernels:
        if case.checkpointing not in (None, "full"):
            not_run["ours, compiled"] = "policies do not see inside of what is compiled"
        else:
            kernels = {"torch_compile": True, "torch_compile_backend": "eager" if case.dry else "inductor"}
            ways["ours, compiled"] = (ours, {**own, "kernels": kernels})
        if case.dry or importlib.util.find_spec("liger_kernel") is None:
            not_run["ours, Liger"] = "liger-kernel is not installed, or there is no GPU"
        else:
            ways["ours, Liger"] = (ours, {**own, "kernels": {"use_liger_kernel": True}})
    ways["dense"] = (ours, {**how, "backend": "dense"})
    if case.objective != "causal":
        return ways, not_run
    ways["TRL"] = (trl, {**how, "attention": "sdpa"})
    flash = flash_attention(case.dry)
    if flash is None:
        not_run["TRL, flash"] = "neither flash-attn nor kernels is installed"
    else:
        ways["TRL, flash"] = (trl, {**how, "attention": flash})
    return ways, not_run


def run(case: Case, steps: int, stretch: float) -> dict[str, Any]:
    from hf_sft.training.profiling import device_peak

    packs = packs_of(case, steps + WARM_UP, stretch)
    ways, not_run = ways_of(case, packs)
    clean = float(np.median([sum(len(r["input_ids"]) for r in pack) for pack in packs]))
    result: dict[str, Any] = {**asdict(case), "clean_tokens": clean, "not_run": not_run, "failed": {}}
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "facts.json")
        try:
            alternate({"facts": (_facts_way, {"case": case, "packs": packs, "path": path})}, 1)
            result |= json.loads(Path(path).read_text())
        except RuntimeError as error:
            result["failed"]["facts"] = str(error).strip()
    useful = result.get("useful_flops")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = device_peak(device, torch.bfloat16)
    for name, way in ways.items():
        try:
            course = alternate({name: way}, steps)[name]
        except RuntimeError as error:  # out of memory, mostly: that is a result too
            result["failed"][name] = str(error).strip()
            continue
        policy = case.checkpointing and (TRL_CHECKPOINTING[case.checkpointing] if way[0] is trl else case.checkpointing)
        result[name] = {
            "seconds": course.median, "tokens_per_second": clean / course.median, "peak_mb": course.peak,
            "mfu": None if peak is None or useful is None else useful / (course.median * peak), "losses": course.losses,
            "attention": way[1].get("attention") or (result.get("backend", "auto") if name.startswith("ours") else name),
            "checkpointing": policy,
        }  # fmt: skip
    return result


# ---- what comes of it ----


def missed(runs: list[dict[str, Any]]) -> list[str]:
    """What was demanded and is not met; nothing without the peak of a device."""
    return [f"{_words(r)}: {what}" for r in runs for what in _missed_by(r)]


def _missed_by(r: dict[str, Any]) -> list[str]:
    wedlm = r["objective"] == "wedlm"
    if not wedlm and (r["model"], r["mode"]) != ("8B", "full"):
        return []
    if "ours" not in r:
        return ["ours did not run"]
    if "facts" in r["failed"]:
        return ["the useful FLOPs were not counted"]
    mfu, demanded = r["ours"]["mfu"], WEDLM_MFU if wedlm else CAUSAL_MFU
    if mfu is None:
        return []
    found = [f"{mfu:.0%} MFU of {demanded:.0%}"] if mfu < demanded else []
    if wedlm and r["length"] == 8192 and "dense" in r:
        faster = r["dense"]["seconds"] / r["ours"]["seconds"]
        found += [f"{faster:.1f} times dense of {OVER_DENSE:.1f}"] if faster < OVER_DENSE else []
    return found


def _words(r: dict[str, Any]) -> str:
    return f"{r['model']} {r['mode']} {r['objective']}"


def where_time_goes(r: dict[str, Any]) -> str:
    """The operators of a run as a table: those of the profiled step that take the most; "" where none was."""
    if "operators_ms" not in r:
        return ""
    shares = {name: spent / r["all_operators_ms"] for name, spent in r["operators_ms"].items()}
    body = [[name, f"{spent:.1f}", f"{shares[name]:.0%}"] for name, spent in r["operators_ms"].items()]
    return table([f"operators of {_words(r)}", "ms", "of the step's"], body)


def markdown(record: dict[str, Any]) -> str:
    """The table of a record."""
    body = []
    for r in record["runs"]:
        for name in WAYS:
            what = [f"{r['model']}, {r['layers']} layers", r["mode"], r["objective"], name]
            reason = r["failed"].get(name) or r["not_run"].get(name)
            if reason:
                body.append([*what, "", reason.splitlines()[-1][:60], "", "", ""])
            elif name in r:
                one, mfu = r[name], r[name]["mfu"]
                rest = ["-" if mfu is None else f"{mfu:.0%}", f"{one['peak_mb'] / 1e3:.1f}"]
                how = f"{one['attention']}, {one['checkpointing'] or 'nothing'}"
                body.append([*what, how, f"{one['seconds']:.3f}", f"{one['tokens_per_second']:,.0f}", *rest])
    head = ["model", "mode", "objective", "", "attention, checkpointing", "s / step", "tokens / s", "MFU", "peak GB"]
    return table(head, body)


def tell(r: dict[str, Any], *, where: bool) -> None:
    """Print what came of a case: figures, errors in full, and, if asked for or a demand is missed, where the time goes."""
    print(markdown({"runs": [r]}), flush=True)
    for name, error in r["failed"].items():
        print(f"{_words(r)}, {name} failed:\n{error}", flush=True)
    if where or missed([r]):
        print(where_time_goes(r), flush=True)


def main() -> None:
    words = parser(__doc__, "gpu", steps=6)
    words.add_argument("--models", nargs="+", choices=list(MODELS), default=["0.6B", "1.7B", "8B"])
    words.add_argument("--modes", nargs="+", choices=("full", "lora", "qlora"), default=["full", "lora", "qlora"])
    words.add_argument("--objectives", nargs="+", choices=("causal", "wedlm"), default=["causal", "wedlm"])
    words.add_argument("--length", type=int, default=8192)
    words.add_argument("--stretch", type=float, default=4.0, help="documents are so many times as long as gsm8k's")
    words.add_argument("--layers", type=int, help="of every model; default: its own, fewer where memory asks")
    words.add_argument(
        "--checkpointing", nargs="?", const="full", choices=list(TRL_CHECKPOINTING), help="of all ways; default: none"
    )
    words.add_argument(
        "--kernels", action="store_true", help="ours with compiled regions and with Liger's layers as well"
    )
    words.add_argument("--dry_run", action="store_true", help="a toy model on this machine, whatever it has")
    options = words.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        words.error("no CUDA device is here: run it where there is one, or with --dry_run")
    memory = None if options.dry_run else torch.cuda.get_device_properties(0).total_memory / 2**30
    name, runs = "gpu_dry_run" if options.dry_run else "gpu", []
    for model in ["toy"] if options.dry_run else options.models:
        for mode in options.modes:
            for objective in options.objectives:
                length = 256 if options.dry_run else options.length
                how = {"checkpointing": options.checkpointing, "kernels": options.kernels, "dry": options.dry_run}
                case = Case(model, mode, objective, length, MODELS[model][2], **how)
                case = replace(case, layers=options.layers or layers_of(case, memory))
                runs.append(run(case, options.steps, 0.3 if options.dry_run else options.stretch))
                record = {"note": options.note, "missed": missed(runs), "runs": runs}
                write_record(name, record, options.output)
                tell(runs[-1], where=options.dry_run)
    conclude(name, record, options.output)


if __name__ == "__main__":
    main()
