"""How tests/config_table.json and formats/gguf-configuration.md are made: by asking transformers.

    python tests/make_config_table.py [CLASS ...]     with torch, transformers 5.24 and llama_cpp

Run by hand, never by the suite. For every class of configuration and every field of it, set to
values other than its default, to null, and removed, this builds the model with transformers from
random weights, converts the directory with qconvert to F32, runs llama.cpp on the result, and
compares logits (hidden states of an encoder). The field's effect is measured too, between
transformers with it and without, so that a field that nobody reads cannot pass as equal. A
configuration may come out

- equal: as transformers computes it, within the error of llama.cpp's own arithmetic;
- without effect: the same, and transformers computes the same as without the field;
- refused, with qconvert's code, before anything is written;
- warned: equal up to a number of tokens that a warning of the conversion names.

Anything else ends the run with exit code 1, as does a field for which config_changes.py has no
value.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import multiprocessing
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from config_cases import (
    BASES,
    CONTEXT,
    EVERY,
    EXACT,
    POSITIONS,
    TOKENS,
    TOLERANCE,
    Directories,
    Fields,
    changed,
    folded,
    text,
)
from config_changes import (
    DEFAULT_IS_ANOTHER,
    RELATED,
    ROUNDING,
    TAKEN,
    UNUSED,
    Case,
    cases,
)
from config_document import document
from family_models import ENCODERS, NARROW, STACKS, WRAPPED
from gguf import GGUFReader
from numpy.typing import NDArray

from qconvert.errors import QconvertError
from qconvert.schemes import parse_scheme
from qconvert.stages.quantize import QuantizeOptions, quantize

HERE = Path(__file__).resolve().parent
TABLE = HERE / "config_table.json"
DOCUMENT = HERE.parent / "formats" / "gguf-configuration.md"

# --- transformers ---------------------------------------------------------------------------------


def is_encoder(config: Fields) -> bool:
    """Whether hidden states are compared, not logits of tokens."""
    if str(config.get("architectures")).endswith("T5EncoderModel']"):
        return True
    return config.get("model_type") in ENCODERS or any(
        config.get("architectures") == NARROW[name]["architectures"]
        for name in ENCODERS
        if name in NARROW
    )


def has_classifier(config: Fields) -> bool:
    """Whether values of labels are compared."""
    return "ForSequenceClassification" in str(config.get("architectures"))


def softmax(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """What llama.cpp gives of the scores of Qwen3; zero stands beside one alone."""
    powers = np.exp(np.append(scores, 0) if len(scores) == 1 else scores)
    return (powers / powers.sum()).astype(np.float32)


class Transformers:
    """What transformers makes of directories."""

    def __init__(self) -> None:
        os.environ["TRANSFORMERS_VERBOSITY"] = "error"
        import torch
        import transformers

        torch.set_num_threads(1)
        warnings.simplefilter("ignore")  # about configurations that are odd on purpose
        transformers.logging.disable_progress_bar()
        self.torch, self.package = torch, transformers
        self._saved: dict[str, dict[str, tuple[int, ...]]] = {}

    def fields(self, name: str) -> list[str]:
        """Fields of the class, its base's among them."""
        known = self.package.models.auto.configuration_auto.CONFIG_MAPPING[
            BASES[name]["model_type"]
        ]
        return [f.name for f in dataclasses.fields(known)]

    def _class(self, config: Fields) -> Any:
        p = self.package
        if config.get("model_type") in STACKS:
            return p.AutoModelForTextEncoding if is_encoder(config) else p.AutoModelForSeq2SeqLM
        if config.get("model_type") in WRAPPED:
            return p.AutoModelForImageTextToText
        if has_classifier(config):
            return p.AutoModelForSequenceClassification
        return p.AutoModel if is_encoder(config) else p.AutoModelForCausalLM

    def shapes(self, config: Fields) -> dict[str, tuple[int, ...]]:
        """Tensors of a checkpoint as transformers saves it."""
        from safetensors import safe_open

        with tempfile.TemporaryDirectory() as home:
            (Path(home) / "config.json").write_text(json.dumps(config))
            loaded = self.package.AutoConfig.from_pretrained(home)
            with self.torch.device("meta"):
                model = self._class(config).from_config(loaded)
            # the same modules are saved under the same names: most cases change none
            tied = bool(model.all_tied_weights_keys)
            known = f"{tied} {[(n, tuple(v.shape)) for n, v in model.state_dict().items()]}"
            if known not in self._saved:
                self._class(config).from_config(loaded).save_pretrained(home)
                with safe_open(Path(home) / "model.safetensors", "np") as file:
                    names = list(file.keys())
                    sizes = [tuple(file.get_slice(n).get_shape()) for n in names]
                self._saved[known] = dict(zip(names, sizes, strict=True))
            return self._saved[known]

    def outputs(self, home: Path, config: Fields) -> NDArray[np.float32]:
        """Logits, or hidden states of an encoder: (tokens, width); of a classifier: (labels)."""
        model = self._class(config).from_pretrained(
            home, dtype=self.torch.float32, attn_implementation="eager"
        )
        if config.get("model_type") == "llama4":
            # transformers 5.24 stumbles over outputs of images that its language model has not
            model = model.language_model
        with self.torch.no_grad():
            ids = self.torch.tensor([text()])
            both = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
            found = model.eval()(ids, **both)
        hidden = is_encoder(config) and not has_classifier(config)
        made = (found.last_hidden_state if hidden else found.logits)[0].numpy()
        if has_classifier(config) and config["model_type"] == "qwen3":
            made = softmax(made)
        if not np.isfinite(made).all():
            raise ValueError("outputs are not finite")
        return made


# --- llama.cpp, in a process of its own: it ends its process at what it does not like -------------


def _serve(pipe: Any) -> None:
    import llama_cpp

    quiet = llama_cpp.llama_log_callback(lambda level, line, data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    with contextlib.suppress(EOFError):  # nobody asks any more
        while True:
            path, encoder, pooled = pipe.recv()
            pipe.send(_run(llama_cpp, path, encoder, pooled))


def _run(llama_cpp: Any, path: str, encoder: bool, pooled: bool) -> NDArray[np.float32] | str:
    settings = llama_cpp.llama_model_default_params()
    settings.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(path.encode(), settings)
    if not model:
        return "llama.cpp does not load it"
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = CONTEXT
    parameters.n_threads = parameters.n_threads_batch = 1
    parameters.type_k = parameters.type_v = 0  # a cache in F32, as transformers has it
    parameters.flash_attn_type = 0
    if encoder or pooled:
        parameters.embeddings = True
    if encoder and not pooled:
        parameters.pooling_type = 0  # otherwise as the file says
    context = llama_cpp.llama_init_from_model(model, parameters)
    if not context:
        return "llama.cpp makes no context for it"
    ids = text()
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
    batch.n_tokens = len(ids)
    run = llama_cpp.llama_encode if encoder else llama_cpp.llama_decode
    found: NDArray[np.float32] | str = "llama.cpp does not run it"
    both = llama_cpp.llama_model_has_encoder(model) and llama_cpp.llama_model_has_decoder(model)
    if both and llama_cpp.llama_encode(context, batch):  # the same text for encoder and decoder
        return found
    if run(context, batch) == 0:
        if pooled:
            ranks = llama_cpp.llama_pooling_type(context) == 4
            of = llama_cpp.llama_model_n_cls_out if ranks else llama_cpp.llama_model_n_embd
            width = of(model)
            found = np.ctypeslib.as_array(
                llama_cpp.llama_get_embeddings_seq(context, 0), (width,)
            ).copy()
        elif encoder:
            width, row = llama_cpp.llama_model_n_embd(model), llama_cpp.llama_get_embeddings_ith
        else:
            vocabulary = llama_cpp.llama_model_get_vocab(model)
            width, row = llama_cpp.llama_vocab_n_tokens(vocabulary), llama_cpp.llama_get_logits_ith
        if not pooled:
            rows = [np.ctypeslib.as_array(row(context, i), (width,)) for i in range(len(ids))]
            found = np.stack(rows)
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return found


class LlamaCpp:
    """Runs files; a process that ended is replaced."""

    def __init__(self) -> None:
        self._process: Any = None

    def outputs(self, path: Path, encoder: bool, pooled: bool = False) -> NDArray[np.float32] | str:
        """As `Transformers.outputs`, or why there are none."""
        if self._process is None or not self._process.is_alive():
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
        self._pipe.send((str(path), encoder, pooled))
        try:
            found: NDArray[np.float32] | str = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            return "llama.cpp ends its process"
        return found


# --- one case -------------------------------------------------------------------------------------


@dataclass(slots=True)
class Outcome:
    """What came of a case.

    Attributes:
        verdict: ``equal``, ``no effect``, ``refused``, ``warned``, ``taken`` or ``FAILED``.
        code: of a refusal.
        warnings: kinds of warnings.
        transformers: why it does not take the configuration.
        effect: largest change of transformers' outputs against the base, of the largest output.
        difference: between llama.cpp and transformers, likewise.
        tokens: up to how many they are equal, if not for all.
        keys: what of the metadata differs from the base's, and the factors of rotary positions.
        outputs: some of transformers', where they are not the base's.
        largest: of all of them.
        why: of a failure.
    """

    verdict: str = "FAILED"
    code: str | None = None
    warnings: list[str] = field(default_factory=list)
    transformers: str | None = None
    effect: float | str | None = None
    difference: float | None = None
    tokens: int | None = None
    keys: dict[str, Any] = field(default_factory=dict)
    outputs: list[list[float]] | None = None
    largest: float | None = None
    why: str | None = None


def warning_kinds(warnings: list[str]) -> list[str]:
    """Which of the warnings about configurations these are."""
    kinds = {
        "attends to all tokens": "window",
        "rotary factors": "longrope",
        "without effect": "unread",
        "by which transformers goes": "class",
        "rounds the bounds": "rounded",
        "by the length of a text": "dynamic",
    }
    return sorted({kind for w in warnings for words, kind in kinds.items() if words in w})


def sampled(outputs: NDArray[np.float32], tokens: int) -> list[list[float]]:
    """Some of the outputs, of the first so many tokens."""
    return [[float(f"{v:.5g}") for v in outputs[p, ::EVERY]] for p in POSITIONS if p < tokens]


_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation", "activation_function")


class Runner:
    """Runs the cases of one class against its base."""

    def __init__(self, name: str, ours: Transformers, llama: LlamaCpp, home: Path) -> None:
        self.name, self.home = name, home
        self.transformers, self.llama = ours, llama
        self.encoder = name in ENCODERS
        self.tolerance = TOLERANCE.get(name, EXACT)
        self.config = BASES[name]
        self.shapes = ours.shapes(self.config)
        self.directories = Directories(home / "models")
        base = self.directories.made(name, self.config, self.shapes)
        self.outputs = ours.outputs(base, self.config)
        self.keys: dict[str, Any] = {}
        converted = self._convert(base)
        if isinstance(converted, Outcome):
            raise SystemExit(f"{name}: the base is refused: {converted.why}")
        self.keys = converted[1]
        found = llama.outputs(converted[0], self.encoder)
        self.difference = self._distance(found, self.outputs)
        if self.difference > self.tolerance:
            raise SystemExit(f"{name}: the base differs by {self.difference:.1e}")

    def run(self, case: Case) -> tuple[Outcome, dict[str, tuple[int, ...]]]:
        """What comes of a case, and the tensors of its checkpoint."""
        config = changed(self.config, case.changes)
        shapes, refusal = self.shapes, None
        another = case.value == "absent" and case.field in DEFAULT_IS_ANOTHER
        if self.name == "qwen3_moe" and case.field == "intermediate_size":
            another = False  # of dense layers, of which there are none
        try:
            if not another:
                weights = case.changes if case.weights is None else case.weights
                shapes = self.transformers.shapes(changed(self.config, weights))
        except Exception as error:
            refusal = _brief(error)
        place = self.directories.made(self.name, config, shapes)
        theirs: NDArray[np.float32] | None = None
        if another:
            refusal = "another model, by the default of the class"
        elif refusal is None:
            try:
                theirs = self.transformers.outputs(place, config)
            except Exception as error:
                refusal = _brief(error)
        converted = self._convert(place)
        outcome = converted if isinstance(converted, Outcome) else Outcome()
        outcome.transformers = refusal
        if theirs is not None:
            same = theirs.shape == self.outputs.shape and shapes == self.shapes
            outcome.effect = self._distance(theirs, self.outputs) if same else "shapes"
        if isinstance(converted, Outcome):
            self._judge_refusal(case, outcome)
        else:
            path, outcome.keys, outcome.warnings = converted
            self._judge(case, outcome, path, theirs)
        return outcome, shapes

    def _convert(self, place: Path) -> Outcome | tuple[Path, dict[str, Any], list[str]]:
        """The file, how its hyper-parameters differ from the base's, and kinds of warnings."""
        path = self.home / "model.gguf"
        options = QuantizeOptions(scheme=parse_scheme("f32"), output=path, force=True)
        try:
            report = quantize(place, options)
        except QconvertError as error:
            return Outcome("refused", error.code, why=f"{error} {error.hint or ''}")
        return path, self._differences(path), warning_kinds(report.warnings)

    def _differences(self, path: Path) -> dict[str, Any]:
        reader = GGUFReader(path)
        arch = reader.fields["general.architecture"].contents()
        keys = {n: f.contents() for n, f in reader.fields.items() if n.startswith(f"{arch}.")}
        made = [t for t in reader.tensors if t.name.startswith("rope_")]
        keys |= {t.name: [float(f"{v:.6g}") for v in t.data.ravel()] for t in made}
        names = [*self.keys, *(n for n in keys if n not in self.keys)]
        return {n: keys.get(n) for n in names if keys.get(n) != self.keys.get(n)}

    @staticmethod
    def _distance(found: NDArray[np.float32] | str, wanted: NDArray[np.float32]) -> float:
        if isinstance(found, str):
            return float("inf")
        return float(np.abs(found - wanted).max() / np.abs(wanted).max())

    def _judge_refusal(self, case: Case, outcome: Outcome) -> None:
        own = case.field.rpartition(".")[2]
        named = {own, *_names(case.changes), *RELATED.get(own, ())}
        names_it = any(name in (outcome.why or "") for name in named)
        by_field = outcome.code in ("ARCH-CONFIG", "ARCH-CONFIG-VALUE", "ARCH-ROPE")
        if outcome.code is None or (by_field and not names_it):
            outcome.verdict = "FAILED"
        else:
            outcome.why = None

    def _judge(
        self, case: Case, outcome: Outcome, path: Path, theirs: NDArray[np.float32] | None
    ) -> None:
        found = self.llama.outputs(path, self.encoder)
        if isinstance(found, str):
            outcome.why = found
            return
        if theirs is None:
            same = not outcome.keys and self._distance(found, self.outputs) <= self.tolerance
            if (case.field in UNUSED or case.value == "others") and same:
                outcome.verdict = "no effect"
            elif case.value in TAKEN:
                outcome.verdict, outcome.why = "taken", TAKEN[case.value]
            else:
                outcome.why = "taken, though transformers does not load it"
            return
        outcome.difference = self._distance(found, theirs)
        effect = outcome.effect
        if outcome.difference > self.tolerance:
            self._judge_warned(case, outcome, found, theirs)
        elif effect == 0 or (case.field in ROUNDING and float(effect or 0) < EXACT / 10):
            outcome.verdict = "no effect"
        elif isinstance(effect, str) or effect > 10 * max(outcome.difference, self.difference):
            outcome.verdict = "equal"
        elif case.field in _ACTIVATIONS and self.name in TOLERANCE:
            outcome.verdict = "equal"  # one GELU or another: less than ggml's table rounds away
        elif not outcome.keys:
            outcome.why = "equal, but an effect so small would not be seen"
        else:
            outcome.verdict = "equal"  # it has reached the file
        if outcome.verdict in ("equal", "warned") and outcome.tokens != 0:
            outcome.largest = float(f"{np.abs(theirs).max():.6g}")
            outcome.outputs = sampled(theirs, outcome.tokens or len(theirs))

    def _judge_warned(
        self, case: Case, outcome: Outcome, found: NDArray[np.float32], theirs: NDArray[np.float32]
    ) -> None:
        """Different: a warning must say so, and up to where."""
        errors = np.abs(found - theirs).max(axis=1) / np.abs(theirs).max()
        beyond = np.flatnonzero(errors > self.tolerance)
        equal = int(beyond[0]) if len(beyond) else len(theirs)
        if "window" in outcome.warnings:
            fields = changed(self.config, case.changes)
            window = fields.get("text_config", fields).get("sliding_window", 4096)
            if equal >= window:
                outcome.verdict, outcome.tokens = "warned", window
                return
        if "longrope" in outcome.warnings and "context longer" in case.value:
            outcome.verdict, outcome.tokens = "warned", 0
            return
        if "rounded" in outcome.warnings:
            outcome.verdict, outcome.tokens = "warned", 0
            return
        outcome.why = f"differs from token {equal} on, without a warning that says so"


def _names(fields: Any) -> Iterator[str]:
    if isinstance(fields, dict):
        for name, value in fields.items():
            yield name
            yield from _names(value)


def _brief(error: Exception) -> str:
    return type(error).__name__


# --- what is written ------------------------------------------------------------------------------


def main() -> None:
    wanted = sys.argv[1:] or list(BASES)
    ours, llama = Transformers(), LlamaCpp()
    failures = 0
    for name in wanted:
        shapes: dict[str, Any] = {}
        table: dict[str, list[dict[str, Any]]] = {}
        bases: dict[str, Any] = {}
        failed = 0
        with tempfile.TemporaryDirectory() as home:
            runner = Runner(name, ours, llama, Path(home))
            table[name] = []
            bases[name] = {
                "tensors": _shape_set(shapes, name, runner.shapes),
                "difference": float(f"{runner.difference:.2g}"),
                "largest": float(f"{np.abs(runner.outputs).max():.6g}"),
                "outputs": sampled(runner.outputs, len(runner.outputs)),
            }
            for case in cases(name, ours.fields(name)):
                try:
                    outcome, tensors = runner.run(case)
                except Exception:
                    traceback.print_exc()
                    outcome, tensors = Outcome(why="the script itself fails"), runner.shapes
                if outcome.verdict == "FAILED":
                    failed += 1
                    print(
                        f"FAILED: {name}: {case.field}: {case.value}: {outcome.code} "
                        f"{outcome.why}, difference {outcome.difference}, effect {outcome.effect}",
                        flush=True,
                    )
                table[name].append(_row(case, outcome, _shape_set(shapes, name, tensors)))
        print(
            f"{name}: {len(table[name])} cases, base differs by {runner.difference:.1e}", flush=True
        )
        failures += failed
        if failed == 0:
            _update(table, bases, shapes)
    raise SystemExit(f"{failures} failed" if failures else 0)


def _update(table: dict[str, Any], bases: dict[str, Any], shapes: dict[str, Any]) -> None:
    """Write what was found, beside what is known of other classes."""
    known = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    sets = {n: s for n, s in known.get("tensors", {}).items() if n.split()[0] not in table}
    sets |= shapes
    cases_ = known.get("cases", {}) | table
    bases = known.get("bases", {}) | bases
    table = {n: cases_[n] for n in BASES if n in cases_}
    bases = {n: bases[n] for n in table}
    sets = {n: s for b in table for n, s in sets.items() if n.split()[0] == b}
    _write(table, bases, sets)
    DOCUMENT.write_text(document(table, bases, TOKENS))


def _shape_set(sets: dict[str, Any], name: str, tensors: dict[str, tuple[int, ...]]) -> str:
    """The name of a set of tensors, entered if it is new."""
    plain = folded(tensors)
    for known, found in sets.items():
        if found == plain and known.startswith(name + " "):
            return known
    new = f"{name} {sum(k.startswith(name + ' ') for k in sets)}"
    sets[new] = plain
    return new


def _row(case: Case, outcome: Outcome, tensors: str) -> dict[str, Any]:
    """A case as JSON, without what is empty."""
    row = {"field": case.field, "value": case.value, "changes": case.changes, "tensors": tensors}
    found = dataclasses.asdict(outcome)
    for name in ("effect", "difference"):
        if isinstance(found[name], float):
            found[name] = float(f"{found[name]:.2g}")
    return row | {n: v for n, v in found.items() if v not in (None, [], {})}


def _write(table: dict[str, list[Any]], bases: dict[str, Any], shapes: dict[str, Any]) -> None:
    """One line for each set of tensors, base and case."""

    def line(value: Any) -> str:
        return json.dumps(value, separators=(",", ":"))

    parts = [
        f'"{part}": {{\n' + ",\n".join(f"{line(n)}: {line(v)}" for n, v in values.items()) + "\n}"
        for part, values in (("tensors", shapes), ("bases", bases))
    ]
    cases_ = (f"{line(n)}: [\n" + ",\n".join(map(line, r)) + "\n]" for n, r in table.items())
    parts.append('"cases": {\n' + ",\n".join(cases_) + "\n}")
    TABLE.write_text("{\n" + ",\n".join(parts) + "\n}\n")


if __name__ == "__main__":
    main()
