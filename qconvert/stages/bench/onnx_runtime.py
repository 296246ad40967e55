"""The integer products of ONNX Runtime, where it is installed: ``pip install onnx onnxruntime``.

Operators: MatMulInteger (onnx 10) and MatMulNBits (com.microsoft 1), whose accuracy level 4 lets it
compute in signed bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from qconvert.stages.bench.weights import F32

INT8_COMPUTE = 4  # accuracy_level of MatMulNBits
OPSETS = {"": 21, "com.microsoft": 1}
IR_VERSION = 10  # that of opset 21; later ones need a later ONNX Runtime
MISSING = "onnxruntime and onnx are not installed: pip install onnx onnxruntime"


@dataclass(frozen=True, slots=True)
class Operator:
    """The operator that a scheme is held against; ``block`` is 0 for one scale a tensor."""

    bits: int
    block: int

    @property
    def name(self) -> str:
        if self.bits == 8:
            return "MatMulInteger"
        return f"MatMulNBits block {self.block}"


def peer(bits: int, block: int) -> Operator:
    """MatMulNBits of the nearest block for codes up to 4 bits, else MatMulInteger; ``block`` is 0
    for a scale a row.
    """
    if bits > 4:
        return Operator(8, 0)
    return Operator(4, min(max(block or 128, 32), 128))


def product(
    operator: Operator, shape: tuple[int, ...], x: F32, threads: int
) -> Callable[[], object] | str:
    """A product of ``x`` (M, K) with arbitrary codes of a matrix (N, K), or why it cannot be had.

    Codes and scales are random: time does not depend on them.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError:
        return MISSING
    columns = shape[1]
    if operator.block and columns % operator.block:
        return f"{columns} columns do not divide into its blocks"
    inputs, model = (_n_bits if operator.block else _integer)(onnx, operator, shape, x)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        session.run(None, inputs)
    except Exception as e:  # its classes of errors have no common base of its own
        return str(e).splitlines()[0]
    return lambda: session.run(None, inputs)


def _integer(
    onnx: Any, operator: Operator, shape: tuple[int, ...], x: F32
) -> tuple[dict[str, Any], Any]:
    random = np.random.default_rng(2)
    codes = random.integers(-127, 128, shape[::-1], np.int8)
    inputs = {"A": random.integers(0, 256, x.shape, np.uint8)}
    return inputs, _model(onnx, "MatMulInteger", "", inputs["A"], {"B": codes}, np.int32, {})


def _n_bits(
    onnx: Any, operator: Operator, shape: tuple[int, ...], x: F32
) -> tuple[dict[str, Any], Any]:
    random = np.random.default_rng(2)
    rows, columns = shape
    blocks = columns // operator.block
    weights = {
        "B": random.integers(0, 256, (rows, blocks, operator.block * operator.bits // 8), np.uint8),
        "scales": random.random(rows * blocks, np.float32),
    }
    attributes = {
        "K": columns,
        "N": rows,
        "bits": operator.bits,
        "block_size": operator.block,
        "accuracy_level": INT8_COMPUTE,
    }
    model = _model(onnx, "MatMulNBits", "com.microsoft", x, weights, np.float32, attributes)
    return {"A": x}, model


def _model(
    onnx: Any,
    name: str,
    domain: str,
    a: Any,
    weights: dict[str, Any],
    result: type[np.generic],
    attributes: dict[str, int],
) -> Any:
    """A model of one operator: input A, constant weights, output Y."""
    helper = onnx.helper

    def tensor(label: str, dtype: Any) -> Any:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return helper.make_tensor_value_info(label, kind, [None, None])

    node = helper.make_node(name, ["A", *weights], ["Y"], domain=domain, **attributes)
    constants = [onnx.numpy_helper.from_array(value, label) for label, value in weights.items()]
    graph = helper.make_graph([node], "g", [tensor("A", a.dtype)], [tensor("Y", result)], constants)
    opsets = [helper.make_opsetid(d, version) for d, version in OPSETS.items()]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
