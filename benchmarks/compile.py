"""Where torch.compile pays in a training step: which parts of the model are compiled, and what a step costs then.

    python benchmarks/compile.py [--vocab_size 6400 32000] [--steps 20] [--output FILE] [--note TEXT]

SFTTrainer takes packs of 2,048 tokens with gsm8k's lengths on a Qwen3-like model (4 layers, 256 wide, float32; under bfloat16
autocast on CUDA), in four ways side by side, each in a process of its own, step by step in turn. Figures are medians after the
steps that warm up, which hold the compilations:

- eager: nothing is compiled.
- regions: ``torch_compile``, that is, norms and feed-forward networks in place.
- layers: each decoder layer whole, attention kept out of its graph (a break on either side of it).
- scoring: softmax and gradient of a chunk of logits.

What does not pay is a result too.
"""

from __future__ import annotations

from typing import Any

import torch
from records import conclude, parser, table
from trainers import our_trainer, steps_of
from turns import Turn, alternate, figures, largest_difference
from workloads import Row, gsm8k_packs, tokens

WAYS = ("eager", "regions", "layers", "scoring")


def step_way(
    turn: Turn, steps: int, packs: list[list[Row]], vocabulary: int, compiled: str, backend: str
) -> list[float]:
    """SFTTrainer with one of ``WAYS`` compiled."""

    def make(values: dict[str, Any]) -> Any:
        values |= {"bf16": torch.cuda.is_available()}
        if compiled == "regions":
            values |= {"torch_compile": True, "torch_compile_backend": backend}
        trainer = our_trainer(packs, vocabulary, values)
        if compiled == "layers":
            compile_layers(trainer.model, backend)
        elif compiled == "scoring":
            from hf_sft import losses

            losses._score_chunk = torch.compile(losses._score_chunk, dynamic=True, backend=backend)
        return trainer

    return steps_of(turn, steps, make)


def compile_layers(model: Any, backend: str) -> None:
    """Each decoder layer whole; the attention function, whose loop over documents differs from batch to batch, stays out."""
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    torch._dynamo.config.recompile_limit = 64
    name = model.config._attn_implementation
    AttentionInterface.register(name, torch.compiler.disable(ALL_ATTENTION_FUNCTIONS[name]))
    for layer in model.model.layers:
        layer.compile(dynamic=True, backend=backend)


def run(
    vocabulary: int, steps: int, length: int = 2048, backend: str = "inductor", ways: tuple[str, ...] = WAYS
) -> dict[str, Any]:
    """One vocabulary, all ways."""
    packs = gsm8k_packs(steps + 4, vocabulary, length)
    common = dict(packs=packs, vocabulary=vocabulary, backend=backend)
    found = alternate({way: (step_way, common | {"compiled": way}) for way in ways}, steps)
    differs = largest_difference(found, "eager")
    assert differs < (5e-2 if torch.cuda.is_available() else 1e-4), f"the losses differ by {differs:.0e}"
    return {
        "vocab_size": vocabulary, "steps": steps, "tokens_per_step": sum(map(tokens, packs)) / len(packs),
        **figures(found, "eager"),
        "largest_relative_loss_difference": differs,
    }  # fmt: skip


def markdown(record: dict[str, Any]) -> str:
    """The table of a record."""
    body = [
        [
            f"{r['vocab_size']:,}",
            way,
            f"{r['seconds'][way]:.3f}",
            f"{r['seconds'][way] / r['seconds']['eager']:.2f}",
            f"{r['peak_mb'][way]:,.0f}",
        ]
        for r in record["runs"]
        for way in r["seconds"]
    ]
    return table(["vocabulary", "compiled", "s / step", "of eager", "peak MB"], body)


def main() -> None:
    words = parser(__doc__, "compile", steps=20)
    words.add_argument("--vocab_size", type=int, nargs="+", default=[6400, 32000])
    words.add_argument("--length", type=int, default=2048)
    options = words.parse_args()
    results = [run(vocabulary, options.steps, options.length) for vocabulary in options.vocab_size]
    record = {"note": options.note, "missed": [], "runs": results}  # nothing is demanded
    print(markdown(record))
    conclude("compile", record, options.output)


if __name__ == "__main__":
    main()
