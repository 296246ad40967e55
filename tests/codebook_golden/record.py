"""Record what bitsandbytes makes of Gaussian weights, on a CPU: bitsandbytes.npz.

python -m pip install bitsandbytes==0.50.2; python tests/codebook_golden/record.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from bitsandbytes import functional

BLOCK, BLOCKS = 64, 300  # scales of two blocks of 256
WEIGHTS = 4 * BLOCK  # of which codes and values are recorded; of the rest, the scales alone


def main() -> None:
    x = np.random.default_rng(11).standard_normal(BLOCK * BLOCKS).astype(np.float32)
    found = {"dynamic": functional.create_dynamic_map().numpy()}
    for table in ("nf4", "fp4"):
        for double in (False, True):
            codes, state = functional.quantize_4bit(
                torch.from_numpy(x), blocksize=BLOCK, quant_type=table, compress_statistics=double
            )
            values = functional.dequantize_4bit(codes, state).numpy().ravel()
            name = f"{table}_block{BLOCK}{'_dq' if double else ''}"
            found[f"{name}.codes"] = codes.numpy().ravel()[: WEIGHTS // 2]
            found[f"{name}.values"] = values[:WEIGHTS]
            found[f"{name}.scales"] = state.absmax.numpy()
            if double:
                found[f"{name}.scale_scales"] = state.state2.absmax.numpy()
                found[f"{name}.scale_offset"] = state.offset.numpy().reshape(1)
    np.savez_compressed(Path(__file__).with_name("bitsandbytes.npz"), **found)


if __name__ == "__main__":
    main()
