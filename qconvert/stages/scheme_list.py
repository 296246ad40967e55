"""Every scheme that may be named: bits per weight, the file it goes into, what runs it, and why."""

from __future__ import annotations

from collections.abc import Iterator

from qconvert import kernels
from qconvert.codecs import codec_of
from qconvert.containers import container_for
from qconvert.exchange_schemes import AWQ, BNB, COMPRESSED_TENSORS, FP8, GPTQ, MLX, ExchangeScheme
from qconvert.ggml_types import GGML_TYPES
from qconvert.mixes import MixOptions, ModelFacts, parse_mix
from qconvert.model import TensorInfo
from qconvert.report import ListedScheme, SchemesReport
from qconvert.schemes import (
    PLACED,
    SCHEMES,
    AffineScheme,
    CastScheme,
    CodebookScheme,
    GgmlScheme,
    KeepScheme,
    LevelScheme,
    MixScheme,
    TensorScheme,
)
from qconvert.stages.plan import PlanOptions, plan_mix

MATRIX = TensorInfo("model.layers.0.mlp.up_proj.weight", (4096, 4096), "BF16", 2 * 4096 * 4096)
# As `samples/directories.md` and the reports of quantize say it.
RUNS = {
    "qblk": "transformers by qconvert.torch, NumPy",
    "gguf": "llama.cpp, Ollama, LM Studio",
    COMPRESSED_TENSORS: "vLLM, SGLang, transformers",
    FP8: "vLLM, SGLang, transformers",
    MLX: "mlx-lm, LM Studio",
    GPTQ: "vLLM, SGLang, GPTQModel",
    AWQ: "vLLM, SGLang, GPTQModel, mlx-lm",
    BNB: "transformers, peft, unsloth",
}
# What mixes are for, where their base type does not say it.
MIXED = {
    "q4_k_m": "the usual choice",
    "q8_0": "hardly any loss; blocks of 32",
    "mxfp4_moe": "experts as MXFP4, the rest as Q8_0",
    "tq1_0": "weights that are ternary already",
    "tq2_0": "weights that are ternary already",
}
ANY = ("any", "what runs that file")


def list_schemes() -> SchemesReport:
    """All of `qconvert.schemes.SCHEMES`."""
    return SchemesReport(kernels.describe(), [_listed(name) for name in SCHEMES])


def _listed(name: str) -> ListedScheme:
    scheme = SCHEMES[name]
    if isinstance(scheme, KeepScheme):
        return ListedScheme(name, None, *ANY, "codes of a quantized source, as they are")
    if isinstance(scheme, MixScheme | GgmlScheme):
        return ListedScheme(name, _mix_bits(name), "gguf", RUNS["gguf"], _of_mix(name))
    bits = 8 * codec_of(scheme).planned(scheme, MATRIX).size(MATRIX.shape) / MATRIX.size
    if isinstance(scheme, CastScheme):
        return ListedScheme(name, bits, *ANY, "no codes: floating tensors as this type")
    container = container_for(scheme.family).name
    return ListedScheme(name, bits, container, RUNS[container], _purpose(scheme))


def _of_mix(name: str) -> str:
    mix = parse_mix(name)
    blocks = f"blocks of {GGML_TYPES[mix.base].block}"
    told = MIXED.get(name) or (blocks if mix.uniform else f"{mix.base}, more bits where it counts")
    return told if mix.name == name else f"the same as {mix.name}"


def _purpose(scheme: TensorScheme) -> str:
    """What a scheme of one tensor is for."""
    if isinstance(scheme, AffineScheme):
        kind = {None: "", True: ", zero points 0", False: ", with zero points"}[scheme.symmetric]
        if scheme.granularity == "block":
            return f"a scale for {scheme.block} weights{kind}"
        if scheme.granularity == "tensor":
            return f"one scale for a tensor{kind}"
        return f"a scale for a row{kind}"
    if isinstance(scheme, LevelScheme):
        where = ", with heavy tails above all" if scheme.variant == PLACED else ""
        return f"least loss of its size{where}; blocks of {scheme.block}"
    if isinstance(scheme, CodebookScheme):
        double = ", scales quantized" if scheme.double else ""
        return f"{scheme.book} of bitsandbytes{double}"
    assert isinstance(scheme, ExchangeScheme)
    return _exchange_purpose(scheme)


def _exchange_purpose(scheme: ExchangeScheme) -> str:
    unit = f"a scale for {scheme.group} weights" if scheme.group else "a scale for a row"
    zero = "" if scheme.symmetric or scheme.family == MLX else ", zero points"
    number = "" if scheme.number == "int" else f", {scheme.number} codes"
    inputs = f", inputs too ({scheme.activations})" if scheme.activations else ""
    return f"{unit}{zero}{number}{inputs}"


def _mix_bits(name: str) -> float:
    """Bits per weight of Llama 3.1 8B as this mix."""
    tensors = list(_llama())
    wanted = MixOptions(parse_mix(name))
    facts = ModelFacts("llama", n_layer=32, n_head=32, n_head_kv=8)
    plan, _ = plan_mix(tensors, PlanOptions(), wanted, facts)
    total = sum(p.encoding.size(p.tensor.shape) for p in plan)
    return 8 * total / sum(t.size for t in tensors)


def _llama() -> Iterator[TensorInfo]:
    """Tensors of Llama 3.1 8B under the names of GGUF."""

    def tensor(name: str, *shape: int) -> TensorInfo:
        found = TensorInfo(f"{name}.weight", shape, "F32", 0)
        return TensorInfo(found.name, shape, "F32", 4 * found.size)

    yield tensor("token_embd", 128256, 4096)
    yield tensor("output_norm", 4096)
    yield tensor("output", 128256, 4096)
    for i in range(32):
        for name, *shape in (
            ("attn_norm", 4096),
            ("ffn_norm", 4096),
            ("attn_q", 4096, 4096),
            ("attn_k", 1024, 4096),
            ("attn_v", 1024, 4096),
            ("attn_output", 4096, 4096),
            ("ffn_gate", 14336, 4096),
            ("ffn_up", 14336, 4096),
            ("ffn_down", 4096, 14336),
        ):
            yield tensor(f"blk.{i}.{name}", *shape)
