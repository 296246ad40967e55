"""What a look at a tensor suggests: symmetric or asymmetric, or more bits."""

from __future__ import annotations

import numpy as np

from qconvert import kernels
from qconvert.codecs.affine.decide import Decision, sample_rows
from qconvert.codecs.affine.encoder import planned
from qconvert.codecs.affine.shared import analyse
from qconvert.codecs.channels import ChannelStatistics
from qconvert.codecs.codec import Look
from qconvert.kernels.arithmetic import to_groups
from qconvert.kernels.records import F32
from qconvert.mapper import Mapper
from qconvert.model import Model, TensorInfo
from qconvert.schemes import AffineScheme

# 3 dB below a Gaussian: heavier tails than the width can take.
POOR_SQNR_DB = {2: 6.0, 3: 12.0, 4: 18.0}
SAFER_BITS = {2: 4, 3: 4, 4: 6}


def look(
    model: Model,
    tensor: TensorInfo,
    scheme: AffineScheme,
    mapper: Mapper,
    channels: ChannelStatistics | None = None,
) -> Look:
    """Statistics of a tensor, and what they suggest; tiles are added to ``channels`` too.

    Raises:
        WeightError: NaN, Inf, or beyond the range of binary32.
    """
    encoding, method = planned(scheme, tensor), scheme.default_range
    found = analyse(model, tensor, encoding, scheme.symmetric, method, mapper, channels=channels)
    d = found.decision
    both = d.symmetric_db is not None and d.asymmetric_db is not None
    return Look(
        found.statistics,
        *suggest(scheme, d),
        rule=d.rule,
        sqnr_db=d.symmetric_db if d.symmetric else d.asymmetric_db,
        gain_db=(d.asymmetric_db or 0.0) - (d.symmetric_db or 0.0) if both else None,
        cost_db=d.cost_db,
    )


def suggest(scheme: AffineScheme, decision: Decision) -> tuple[str, str]:
    """Scheme and reason in words, from a decision under ``scheme``."""
    chosen = decision.symmetric_db if decision.symmetric else decision.asymmetric_db
    kind = "symmetric" if decision.symmetric else "asymmetric"
    if chosen is None:
        return scheme.resolved(decision.symmetric).name, "nothing is lost"
    poor = POOR_SQNR_DB.get(scheme.bits)
    if poor is not None and chosen < poor:
        safer = scheme.resolved(decision.symmetric).with_bits(SAFER_BITS[scheme.bits])
        return safer.name, f"only {chosen:.1f} dB at {scheme.bits} bits: heavy tails"
    reason = f"{kind}, {chosen:.1f} dB"
    if decision.symmetric_db is not None and decision.asymmetric_db is not None:
        gain = decision.asymmetric_db - decision.symmetric_db
        reason += (
            f": zero points gain {gain:.2f} dB and cost {decision.cost_db:.2f} ({decision.rule})"
        )
    return scheme.resolved(decision.symmetric).name, reason


def grid_ends(model: Model, tensor: TensorInfo, scheme: AffineScheme) -> tuple[F32, F32]:
    """Lowest and highest value of the grid of each group of a sample; symmetry is settled."""
    encoding, method = planned(scheme, tensor), scheme.default_range
    rows = sample_rows(model, tensor, encoding)
    whole = rows.reshape(1, -1) if encoding.granularity == "tensor" else rows
    groups, counts = to_groups(whole, encoding.block)
    found = kernels.fit(groups, encoding, method, counts, None)
    low = 1 if encoding.symmetric and encoding.bits == 8 else 0
    codes = np.full((len(found.scale), 2), (low, encoding.levels), np.uint8)
    ends = kernels.decode(codes, found.scale, found.zero, encoding.bits, encoding.symmetric)
    return ends.min(axis=1), ends.max(axis=1)
