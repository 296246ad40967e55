"""qconvert: convert model weights to quantized files, and prove the result.

Six functions do what the commands of the same names do, with the same options; `load` gives the
tensors of a file::

    import qconvert

    done = qconvert.quantize("model-directory", "q4_k_m", output="model.gguf")
    done.model_bits_per_weight
    proof = qconvert.verify("model.gguf", against="model-directory", min_sqnr=18)
    proof.status  # "pass" or "fail"

Each returns a report of `qconvert.report`, prints nothing, and raises a `QconvertError`, whose
``hint`` says what to do, where the command would end with an error. `qconvert.torch` runs a
quantized model with transformers.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as of `typing`, whose import would delay the handling of signals
if TYPE_CHECKING:
    from qconvert.commands.bench import bench
    from qconvert.commands.calibrate import calibrate
    from qconvert.commands.inspect import inspect
    from qconvert.commands.quantize import quantize, quantize_set
    from qconvert.commands.tune import tune
    from qconvert.commands.verify import verify
    from qconvert.errors import (
        FormatError,
        InputError,
        MachineError,
        OutputExistsError,
        QconvertError,
        Stopped,
        UnsupportedError,
        UsageError,
        WeightError,
    )
    from qconvert.loading import load

__version__ = "0.1.0"

__all__ = [
    "FormatError",
    "InputError",
    "MachineError",
    "OutputExistsError",
    "QconvertError",
    "Stopped",
    "UnsupportedError",
    "UsageError",
    "WeightError",
    "__version__",
    "bench",
    "calibrate",
    "inspect",
    "load",
    "quantize",
    "quantize_set",
    "tune",
    "verify",
]

if not TYPE_CHECKING:  # a type checker sees the imports above

    def __getattr__(name):
        """A public name, from its module when it is first asked for: most of them need NumPy."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        home = "loading" if name == "load" else "errors"
        if name in ("bench", "calibrate", "inspect", "quantize", "tune", "verify"):
            home = f"commands.{name}"
        elif name == "quantize_set":
            home = "commands.quantize"
        globals()[name] = found = getattr(import_module(f"{__name__}.{home}"), name)
        return found


def __dir__() -> list[str]:
    return sorted(__all__)
