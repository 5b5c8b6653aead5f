"""The matrix of model families: what tests/test_families.py measures and docs/families.md says.

``python tests/family_table.py`` writes the table of the docs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs" / "families.md"
BEGIN, END = "<!-- table: written by tests/family_table.py -->", "<!-- end of the table -->"

_LLAMA = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
_ATTENTION = ("k_proj", "o_proj", "q_proj", "v_proj")
_BLOOM = ("dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value")
_LATENT = ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj")
_EXPERTS = ("experts.down_proj", "experts.gate_up_proj")
_DENSE_OF_MIXTURES = "down_proj, gate_proj, up_proj of dense layers and shared experts (under these names PEFT adapts"
# Configs of older versions do not name the kinds of layers: there it is measured.
_RECURRENT = (
    "layers of type linear_attention follow a rule that packed attention does not know|documents see each other"
)
_ALIBI = r"the forward takes no packed row \(its ALiBi biases are made from a mask of padding\)"
_OWN_ATTENTION = "computes its attention by itself and calls no function of ours"


@dataclass(frozen=True)
class Row:
    """What holds for a family.

    Attributes:
        name, models: for readers.
        tiny: names of the tiny models in tests/tiny.py that show it.
        layout: what ``auto`` chooses: the name of a backend, or padded.
        refused: for each backend that cannot be had, a pattern in the sentence that says why.
        adapted: the layers that all-linear finds.
        left_out: parts of the line that says what it leaves out.
        whole: matrices that NF4 does not reach, as the warning names them.
        router_loss: whether the config has the weight of one.
        note: for readers.
    """

    name: str
    models: str
    tiny: tuple[str, ...]
    layout: str = "segment"
    refused: dict[str, str] = field(default_factory=dict)
    adapted: tuple[str, ...] = _LLAMA
    left_out: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    router_loss: bool = False
    note: str = ""

    @property
    def line(self) -> str:
        """The row of the table in the docs."""
        lora = "yes" if not self.left_out else f"{', '.join(self.adapted)}"
        qlora = "yes" if not self.whole else f"yes; whole: {', '.join(self.whole)}"
        laid_out = self.layout if self.layout == "padded" else f"packed, {self.layout}"
        backends = [name if name not in self.refused else f"no {name}" for name in ("segment", "dense")]
        cells = [self.name, self.models, "yes", lora, qlora, laid_out, ", ".join(backends), "yes", "yes", self.note]
        return f"| {' | '.join(cells)} |"


TABLE = (
    Row("Llama 2, 3", "Llama-2-7b, Llama-3.1-8B", ("llama2", "llama3"), note="with and without grouped keys"),
    Row("Mistral", "Mistral-7B", ("mistral",), note="sliding windows count within a document"),
    Row("Gemma", "gemma-2b", ("gemma",)),
    Row("Gemma 2", "gemma-2-9b", ("gemma2",), note="soft caps: dense runs through eager attention"),
    Row("Gemma 3", "gemma-3-1b", ("gemma3_text",), note="the text model"),
    Row("Qwen 1.5, 2, 2.5", "Qwen2.5-7B", ("qwen2",)),
    Row("Qwen 3", "Qwen3-8B", ("qwen3",)),
    Row("Phi-3", "Phi-3-mini", ("phi3",), adapted=("down_proj", "gate_up_proj", "o_proj", "qkv_proj")),
    Row("OLMo 2", "OLMo-2-7B", ("olmo2",)),
    Row("Granite", "granite-3.3-8b", ("granite",), note="the scales of logits, residuals and embeddings are honoured"),
    Row("GPT-2", "gpt2-xl", ("gpt2",), adapted=("c_attn", "c_fc", "c_proj"), note="its Conv1D layers included"),
    Row("GPT-NeoX", "pythia-410m", ("gpt_neox",), adapted=_BLOOM),
    Row(
        "StableLM", "stablelm-2-1_6b", ("stablelm",), layout="dense", refused={"segment": "packed and apart differ by"},
        note="its layers drop the keyword that carries the layout",
    ),
    Row(
        "Falcon", "falcon-7b, falcon-40b", ("falcon", "falcon_new"), layout="dense", adapted=_BLOOM,
        refused={"segment": _OWN_ATTENTION}, note="transformers alone leaves all of it unquantised",
    ),
    Row(
        "Falcon with ALiBi", "falcon-rw-1b", ("falcon_alibi",), layout="padded", adapted=_BLOOM,
        refused={"segment": _OWN_ATTENTION, "dense": _ALIBI}, note="ALiBi is made from a mask of padding",
    ),
    Row(
        "BLOOM", "bloom-1b1", ("bloom",), layout="padded", adapted=_BLOOM,
        refused={"segment": _OWN_ATTENTION, "dense": _ALIBI}, note="ALiBi is made from a mask of padding",
    ),
    Row(
        "Mixtral", "Mixtral-8x7B", ("mixtral",), adapted=_ATTENTION, left_out=(", ".join(_EXPERTS),),
        whole=(*_EXPERTS, "mlp.gate"), router_loss=True, note="router loss",
    ),
    Row(
        "Qwen-MoE", "Qwen1.5-MoE-A2.7B", ("qwen2_moe",), adapted=tuple(sorted((*_LLAMA, "shared_expert_gate"))),
        left_out=(", ".join(_EXPERTS),), whole=(*_EXPERTS, "mlp.gate"), router_loss=True,
        note="router loss; its shared expert is adapted",
    ),
    Row(
        "Qwen3-MoE", "Qwen3-30B-A3B", ("qwen3_moe",), adapted=_ATTENTION, left_out=(", ".join(_EXPERTS),),
        whole=(*_EXPERTS, "mlp.gate"), router_loss=True, note="router loss",
    ),
    Row(
        "gpt-oss", "gpt-oss-20b in bf16", ("gpt_oss",), adapted=_ATTENTION, left_out=(", ".join(_EXPERTS),),
        whole=(_EXPERTS[0], "experts.down_proj_bias", _EXPERTS[1], "experts.gate_up_proj_bias", "mlp.router"), router_loss=True,
        note="router loss; attention sinks are honoured",
    ),
    Row(
        "DeepSeek-V2, -V3", "DeepSeek-V2-Lite", ("deepseek_v2", "deepseek_v3"), adapted=_LATENT,
        left_out=(_DENSE_OF_MIXTURES, ", ".join(_EXPERTS)), whole=(*_EXPERTS, "mlp.gate"),
        note="no router loss; PEFT takes the names of its dense layers for experts",
    ),
    Row(
        "Mamba", "mamba-2.8b", ("mamba",), layout="padded", refused={"segment": _RECURRENT, "dense": _RECURRENT},
        adapted=("in_proj",), left_out=("conv1d, dt_proj, out_proj, x_proj",),
        whole=("mixer.A_log", "mixer.conv1d", "mixer.dt_proj", "mixer.out_proj", "mixer.x_proj"),
        note="recurrent; PEFT refuses out_proj and conv1d, the kernels read x_proj and dt_proj directly",
    ),
    Row(
        "Mamba-2", "mamba2-2.7b", ("mamba2",), layout="padded", refused={"segment": _RECURRENT, "dense": _RECURRENT},
        adapted=("in_proj",), left_out=("conv1d, out_proj",), whole=("mixer.conv1d", "mixer.out_proj"),
        note="recurrent; PEFT refuses out_proj and conv1d",
    ),
)  # fmt: skip

ROWS = {tiny: row for row in TABLE for tiny in row.tiny}


def table() -> str:
    """The table of the docs."""
    heads = [
        "family",
        "for example",
        "full",
        "LoRA, all-linear",
        "QLoRA, NF4",
        "laid out",
        "backends",
        "checkpointing",
        "saved",
    ]
    heads.append("notes")
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *(row.line for row in TABLE)]
    return "\n".join(lines)


def documented() -> str:
    """The table as it stands in the docs."""
    return DOCS.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip()


if __name__ == "__main__":
    text = DOCS.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    DOCS.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")
