"""The words of the trade that commands and reports use, each explained in a sentence or two."""

from __future__ import annotations

import textwrap
from types import MappingProxyType
from typing import Final

WORDS: Final = MappingProxyType(
    {
        "scale, zero point": "A weight x is stored as a small integer, its code: "
        "code = round(x / scale + zero point), read back as (code - zero point) x scale. A "
        "symmetric scheme has the zero point fixed at 0.",
        "step": "The distance of two neighbouring codes, which is the scale.",
        "block": "Weights that share a scale, such as 64 in a row; a channel is a row of them, the "
        "weights of one output.",
        "scheme": "How a tensor is stored: codes of so many bits, and what shares a scale. "
        "q4_block64: 4 bits, a scale for each 64 weights.",
        "bits per weight": "All bits of a tensor, or file, by its number of weights: scales and "
        "what is kept as it was are counted too.",
        "SQNR": "Signal-to-quantization-noise ratio in decibels, 10 log10(sum of x^2 / sum of "
        "(x - x')^2). More is better: each 6 dB halve the error. 4 bits give about 22 dB.",
        "NMSE": "Normalised mean squared error: the same as a share, 10^(-SQNR / 10).",
        "KL divergence": "How far the predictions of next tokens are from the source's, in nats; "
        "0 where they agree. A loss of 0.01 is hardly noticed.",
        "perplexity": "How many tokens a model hesitates between on a text, on average; less is "
        "better.",
        "activations": "What enters a layer. Static: its scale is in the file, from a calibration. "
        "Dynamic: it is computed for each row as it comes.",
        "calibration": "What was seen of activations on real text: ranges for static scales, and "
        "how much errors of each weight matter.",
        "observer": "The rule that makes a scale of the values that were seen.",
        "outlier": "A weight or channel far larger than the rest, which takes the codes from "
        "those around it.",
        "kurtosis, crest": "How heavy the tails of a distribution are (3 for a Gaussian one), and "
        "the largest value by the root mean square.",
        "imatrix": "An importance matrix, llama.cpp's file of mean squares of activations.",
    }
)


def words_text(width: int) -> str:
    """All of them, in lines of at most ``width`` columns, one paragraph each."""
    found = []
    for word, meaning in WORDS.items():
        lines = textwrap.wrap(
            f"{word}: {meaning}", width, subsequent_indent="  ", break_on_hyphens=False
        )
        found.append("\n".join(lines))
    return "\n".join(found)
