"""How tests/projectors.json and the table of projectors in formats/gguf.md are made.

    LLAMA_CPP=DIR python tests/make_projectors.py [NAME ...]

with torch, transformers 5.24, a compiler, and a directory of llama.cpp's sources built in
``DIR/build`` with shared libraries. Run by hand, never by the suite. For every model of
`projector_models` a directory with weights that follow from their names is given to llama.cpp's
own converter, whose tensors and keys are recorded; qconvert's file in F32 is loaded by clip.cpp,
and the embeddings of an image compared with those of transformers on the same pixels; so are those
of quantized files, whose types are compared with what llama-quantize announces.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import traceback
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from config_cases import folded
from gguf import GGUFReader
from make_mixes import chosen
from numpy.typing import NDArray
from projector_document import PAGE, with_table
from projector_models import (
    BREAK,
    HUB,
    IMAGES,
    MODELS,
    WITHOUT_CONVERTER,
    written,
)

from qconvert.schemes import parse_scheme
from qconvert.stages.quantize import QuantizeOptions, quantize
from qconvert.stages.quantize_options import GgufOptions

HERE = Path(__file__).resolve().parent
TABLE = HERE / "projectors.json"
SCHEMES = ("f32", "f16", "bf16", "q8_0")  # that llama.cpp's converter has
MIXES = ("q8_0", "q4_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m")  # llama-quantize fails at iq4_xs
RUN = ("f16", "q8_0", "q4_0")
LIMIT = 2e-4  # of the largest value, with what ggml rounds rounded in transformers as well
LLAMA_CPP = Path(os.environ.get("LLAMA_CPP", "."))


# --- transformers -------------------------------------------------------------------------------


def saved(config: dict[str, Any], home: Path) -> dict[str, tuple[int, ...]]:
    """Tensors as transformers saves them."""
    import transformers
    from safetensors import safe_open

    (home / "config.json").write_text(json.dumps(config))
    loaded = transformers.AutoConfig.from_pretrained(home)
    transformers.AutoModelForImageTextToText.from_config(loaded).save_pretrained(home)
    with safe_open(home / "model.safetensors", "np") as file:
        return {n: tuple(file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118


def on_hub(name: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The same under the names of published checkpoints."""
    found = {}
    for tensor, shape in shapes.items():
        for start, instead in HUB.get(name, ()):
            if tensor.startswith(start):
                tensor = instead + tensor.removeprefix(start)
                break
        found[tensor] = shape
    return found


def pixels(name: str) -> NDArray[np.float32]:
    """Of the image: (height, width, 3)."""
    width, height = IMAGES[name]
    stream = np.random.RandomState(5)
    found = stream.rand(height, width, 3) if name == "gemma4" else stream.randn(height, width, 3)
    return found.astype(np.float32)


def features(name: str, directory: Path, *, as_ggml: bool) -> NDArray[np.float32]:
    """Embeddings of the image: (tokens, width).

    Args:
        as_ggml: with what ggml rounds: pixels and kernels to binary16, and GELU, which is its
            approximation by tanh whatever was asked for, from a table of binary16.
    """
    import torch
    import transformers

    model = transformers.AutoModelForImageTextToText.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    image = torch.from_numpy(pixels(name)).permute(2, 0, 1)[None]
    if as_ggml:
        _with_tables(model)
        if name == "gemma4":  # whose graph takes pixels from -1 to 1
            image = ((2 * image - 1).half().float() + 1) / 2
        elif name != "llama4":  # whose patches are cut by a product in binary32
            image = image.half().float()
    with torch.no_grad():
        return np.concatenate(
            [f.reshape(-1, f.shape[-1]).numpy() for f in _features(name, model, image)], -1
        )


def _with_tables(model: Any) -> None:
    """Put ggml's activations in the place of transformers', and round the kernels of patches."""
    import torch

    class Table(torch.nn.Module):
        def __init__(self, quick: bool) -> None:
            super().__init__()
            self.quick = quick

        def forward(self, x: Any) -> Any:
            rounded = x.half().float()
            if self.quick:
                return (rounded * torch.sigmoid(1.702 * rounded)).half().float()
            found = torch.nn.functional.gelu(rounded, approximate="tanh").half().float()
            return torch.where(x >= 10, x, torch.where(x <= -10, torch.zeros_like(x), found))

    kernels = ("patch_embedding.weight", "patch_conv.weight", "patch_embed.proj.weight")
    kernels += ("patch_embedder.input_proj.weight", "patch_embeddings.projection.weight")
    for name, values in model.named_parameters():
        if name.endswith(kernels):
            values.data = values.data.half().float()
        if name.endswith("mm_input_projection_weight"):  # F16 in every file, and so its inputs are
            values.data = values.data.half().float()
            norm = model.model.multi_modal_projector.mm_soft_emb_norm
            norm.register_forward_hook(lambda module, given, made: made.half().float())
    quick = ("QuickGELUActivation",)
    for module in list(model.modules()):
        for name, child in module.named_children():
            kind = type(child).__name__
            if kind in (*quick, "GELUActivation", "GELUTanh", "PytorchGELUTanh", "GELU"):
                setattr(module, name, Table(kind in quick))


def _features(name: str, model: Any, image: Any) -> list[Any]:
    import torch

    height, width = image.shape[-2:]
    inner, config = getattr(model, "model", None), model.config
    if name.startswith("qwen"):
        patch, merge = config.vision_config.patch_size, 2
        rows, columns = height // patch // merge, width // patch // merge
        both = image.expand(2, -1, -1, -1)  # an image is two pictures of a film
        cut = both.reshape(2, 3, rows, merge, patch, columns, merge, patch)
        flat = cut.permute(2, 5, 3, 6, 1, 0, 4, 7).reshape(rows * columns * merge**2, -1)
        grid = torch.tensor([[1, rows * merge, columns * merge]])
        found = inner.get_image_features(flat, grid)
        more = getattr(found, "deepstack_features", None) or []
        return [found.pooler_output[0], *(f[0] for f in more)]
    if name in ("idefics3", "smolvlm"):
        return [inner.get_image_features(image[None]).pooler_output[0]]
    if name in ("pixtral", "mistral3"):
        sizes = torch.tensor([[height, width]])
        return [_with_breaks(name, model, inner.get_image_features(image, image_sizes=sizes))]
    if name in ("llava", "llava_next"):
        hidden = inner.vision_tower(image, output_hidden_states=True).hidden_states
        taken = hidden[config.vision_feature_layer]
        # llama.cpp's graph has the class token last, and takes all but the first
        taken = torch.cat([taken[:, 2:], taken[:, :1]], 1)
        return [inner.multi_modal_projector(taken)]
    if name == "llama4":
        seen = model.multi_modal_projector(model.get_image_features(image).last_hidden_state)[0]
        side = math.isqrt(len(seen))  # llama.cpp has the tokens column by column
        return [seen.reshape(side, side, -1).transpose(0, 1)]
    if name == "gemma4":
        patch = config.vision_config.patch_size
        rows, columns = height // patch, width // patch
        cut = image.reshape(3, rows, patch, columns, patch).permute(1, 3, 2, 4, 0)
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        places = torch.stack([x.flatten(), y.flatten()], -1)[None]
        return [
            inner.get_image_features(cut.reshape(1, rows * columns, -1), places).pooler_output[0]
        ]
    found = inner.get_image_features(image).pooler_output
    return [found[0]]


def _with_breaks(name: str, model: Any, found: Any) -> Any:
    """With the embedding of a token after each row of patches but the last, as llama.cpp has it."""
    import torch

    config = model.config
    step = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
    columns = IMAGES[name][0] // step
    embeddings = model.get_input_embeddings().weight
    rows = torch.split(found.pooler_output[0], columns)
    parts = []
    for row in rows:
        parts += [row, embeddings[BREAK[name][1]][None]]
    return torch.cat(parts[:-1])


# --- llama.cpp ----------------------------------------------------------------------------------


def driver(home: Path) -> Path:
    """clip_driver.cpp, compiled."""
    program = home / "clip_driver"
    include = ("tools/mtmd", "include", "ggml/include", "common", "vendor")
    libraries = ("mtmd", "ggml", "ggml-base", "llama")
    place = LLAMA_CPP / "build" / "bin"
    subprocess.run(
        [
            *("g++", "-O1", "-std=c++17", "-w", *(f"-I{LLAMA_CPP / i}" for i in include)),
            *(HERE / "clip_driver.cpp", "-o", program, f"-L{place}", f"-Wl,-rpath,{place}"),
            *(f"-l{name}" for name in libraries),
        ],
        check=True,
    )
    return program


def encoded(program: Path, file: Path, name: str) -> NDArray[np.float32]:
    """Embeddings of the image by clip.cpp.

    Raises:
        ValueError: it does not load the file, or does not run it.
    """
    width, height = IMAGES[name]
    given, made = file.with_suffix(".pixels"), file.with_suffix(".embeddings")
    pixels(name).tofile(given)
    ran = subprocess.run(
        [program, file, given, str(width), str(height), made], capture_output=True, text=True
    )
    if ran.returncode:
        raise ValueError(f"clip.cpp: {ran.returncode}: {ran.stderr[-400:]}")
    tokens = int(ran.stderr.strip().splitlines()[-1].split()[0])
    return np.fromfile(made, np.float32).reshape(tokens, -1)


def theirs(directory: Path, scheme: str) -> GGUFReader:
    """The file of llama.cpp's own converter."""
    path = directory.with_name(f"{directory.name}.theirs.{scheme}.gguf")
    script = LLAMA_CPP / "convert_hf_to_gguf.py"
    ran = subprocess.run(
        [sys.executable, script, directory, "--mmproj", "--outtype", scheme, "--outfile", path],
        capture_output=True,
        text=True,
    )
    if ran.returncode:
        raise ValueError(ran.stderr.strip().splitlines()[-1])
    return GGUFReader(path)


def listed(file: GGUFReader) -> dict[str, list[Any]]:
    """Of each tensor: type, shape, and a checksum of its bytes."""
    return {
        t.name: [t.tensor_type.name, [int(n) for n in t.shape[::-1]], zlib.crc32(t.data.tobytes())]
        for t in sorted(file.tensors, key=lambda t: t.name)
    }


def keys(file: GGUFReader) -> dict[str, Any]:
    """What it says, but for names and what it says of itself."""
    return {
        k: [[t.name for t in f.types], f.contents()]
        for k, f in sorted(file.fields.items())
        if not k.startswith("GGUF.") and k not in ("general.name", "general.file_type")
    }


# --- qconvert -----------------------------------------------------------------------------------


def converted(directory: Path, scheme: str) -> Path:
    path = directory.with_name(f"{directory.name}.{scheme}.gguf")
    wanted = GgufOptions(mmproj=True)
    options = QuantizeOptions(scheme=parse_scheme(scheme), output=path, force=True, gguf=wanted)
    quantize(directory, options)
    return path


def measured(name: str, program: Path, home: Path) -> dict[str, Any]:
    """What is recorded of a model.

    Raises:
        ValueError: llama.cpp does not take a file.
    """
    place = home / "saved"
    place.mkdir()
    shapes = on_hub(name, saved(MODELS[name], place))
    directory = written(name, shapes, home / name)
    golden: dict[str, Any] = {}
    if name not in WITHOUT_CONVERTER:
        files = {scheme: theirs(directory, scheme) for scheme in SCHEMES}
        golden = {"tensors": {s: listed(f) for s, f in files.items()}, "keys": keys(files["f32"])}
    whole = converted(directory, "f32")
    wanted = features(name, directory, as_ggml=False)
    tabled = features(name, directory, as_ggml=True)
    largest = np.abs(wanted).max()
    found = {s: encoded(program, converted(directory, s), name) for s in ("f32", *RUN)}
    if found["f32"].shape != wanted.shape:
        raise ValueError(f"{found['f32'].shape}, not {wanted.shape}")
    differ = {s: float(f"{np.abs(f - wanted).max() / largest:.1e}") for s, f in found.items()}
    differ["tables"] = float(f"{np.abs(found['f32'] - tabled).max() / largest:.1e}")
    otherwise = {}
    for mix in MIXES:
        own = {t.name: t.tensor_type.name for t in GGUFReader(converted(directory, mix)).tensors}
        them = chosen(whole, [], mix)
        otherwise |= {f"{mix} {t}": [own[t], them[t]] for t in own if own[t] != them[t]}
    return {
        "shapes": folded(shapes),
        "golden": golden,
        "differences": differ,
        "tokens": len(wanted),
        "otherwise": otherwise,
    }


def main() -> None:
    wanted = sys.argv[1:] or list(MODELS)
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    failed = 0
    with tempfile.TemporaryDirectory() as tools:
        program = driver(Path(tools))
        for name in wanted:
            try:
                with tempfile.TemporaryDirectory() as home:
                    found = measured(name, program, Path(home))
            except Exception:
                traceback.print_exc()
                print(f"FAILED: {name}", flush=True)
                failed += 1
                continue
            good = found["differences"]["tables"] <= LIMIT
            failed += not good
            shown = {k: found[k] for k in ("differences", "tokens", "otherwise")}
            print("      " if good else "FAILED", name, shown, flush=True)
            table[name] = found
    table = {n: table[n] for n in MODELS if n in table}
    TABLE.write_text(json.dumps(table, separators=(",", ":")).replace('},"', '},\n"') + "\n")
    PAGE.write_text(with_table(PAGE.read_text(), table))
    raise SystemExit(f"{failed} failed" if failed else 0)


if __name__ == "__main__":
    main()
