"""Quantized layers as torch modules: codes stay packed, products run in integers.

The only module here that needs torch at import: import it inside functions, after
`hugging_face.require`.
"""

from __future__ import annotations

from typing import Any

import torch

from qconvert.kernels.activations import DynamicInput, StaticInput
from qconvert.running.integer_path import StoredMatrix


class QuantizedLinear(torch.nn.Module):  # type: ignore[misc]
    """``out = weight · input + bias`` with a quantized weight; for inference on the CPU.

    Takes and gives what `torch.nn.Linear` does. Arithmetic is that of `StoredMatrix.linear` in
    float32, or, with float inputs, torch's own with the dequantized weight.

    Attributes:
        in_features, out_features: as of `torch.nn.Linear`.
        activations: how inputs become signed bytes; None for products in float.
    """

    def __init__(
        self,
        matrix: StoredMatrix,
        bias: torch.Tensor | None,
        activations: StaticInput | DynamicInput | None,
    ) -> None:
        super().__init__()
        self.matrix = matrix
        self.in_features, self.out_features = matrix.columns, matrix.rows
        self.activations = activations
        self.register_buffer("bias", bias)

    @property
    def weight(self) -> torch.Tensor:
        """The dequantized weight, float32, made anew each time."""
        return torch.from_numpy(self.matrix.values(0, self.out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.activations is None:
            return torch.nn.functional.linear(x, self.weight.to(x.dtype), self.bias)
        rows = x.detach().to("cpu", torch.float32).reshape(-1, self.in_features).numpy()
        bias = None if self.bias is None else self.bias.to(torch.float32).numpy()
        out = torch.from_numpy(self.matrix.linear(rows, bias, self.activations))
        return out.reshape(*x.shape[:-1], self.out_features).to(x.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, weight={self.matrix.scheme}, "
            f"activations={self.activations}"
        )


class QuantizedEmbedding(torch.nn.Module):  # type: ignore[misc]
    """A table whose rows are dequantized when they are looked up.

    Attributes:
        num_embeddings, embedding_dim: as of `torch.nn.Embedding`.
    """

    def __init__(self, matrix: StoredMatrix, padding_idx: int | None = None) -> None:
        super().__init__()
        self.matrix = matrix
        self.num_embeddings, self.embedding_dim = matrix.rows, matrix.columns
        self.padding_idx = padding_idx

    @property
    def weight(self) -> torch.Tensor:
        """The dequantized table, float32, made anew each time."""
        return torch.from_numpy(self.matrix.values(0, self.num_embeddings))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        used, place = torch.unique(ids, return_inverse=True)
        rows = [self.matrix.values(i, i + 1) for i in used.tolist()]
        found: Any = torch.cat([torch.from_numpy(row) for row in rows])
        return found[place]

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.matrix.scheme}"
