"""Scales of activations and of the attention's cache, which no weight needs."""

from __future__ import annotations

from collections.abc import Sequence

# Ends of names, of compressed-tensors, ModelOpt, and Mistral's own.
ACTIVATIONS = (
    *(".input_scale", ".input_zero_point", ".input_global_scale", ".output_scale"),
    *(".k_scale", ".v_scale", ".q_scale", ".activation_scale", ".qscale_act"),
)


def dropped_note(names: Sequence[str]) -> tuple[str, ...]:
    """What is to be said of such tensors."""
    if not names:
        return ()
    return (
        f"{len(names)} scales of activations and caches are left, such as '{names[0]}': weights do "
        "not need them",
    )
