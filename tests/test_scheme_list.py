"""`quantize --list-schemes`: every name, with bits by hand and by llama.cpp's own table."""

from __future__ import annotations

import pytest
from conftest import Call, Run, environment

from qconvert.containers import WRITTEN
from qconvert.schemes import SCHEMES
from qconvert.stages.scheme_list import list_schemes

# tools/quantize/README.md of llama.cpp at 0c1e57098: bits/weight of Llama 3.1 8B.
LLAMA_CPP = {
    **{"iq4_xs": 4.4597, "iq4_nl": 4.6818, "q2_k": 3.1593, "q3_k_s": 3.6429, "q3_k_m": 3.9960},
    **{"q3_k_l": 4.2979, "q4_k_s": 4.6672, "q4_k_m": 4.8944, "q5_k_s": 5.5704, "q5_k_m": 5.7036},
    **{"q6_k": 6.5633, "q8_0": 8.5008, "q4_k": 4.8944},
}
# Of a row of 4,096 weights: bits of a code, and of scales and zero points by the group.
BY_HAND = {
    "q4_block64_sym": 4 + 16 / 64,
    "q4_block64_asym": 4 + (16 + 6) / 64,
    "q8_channel_sym": 8 + 32 / 4096,
    "nf4_block64": 4 + 32 / 64,
    "bf16": 16,
    "w4a16": 4 + 16 / 128,
    "mlx_4bit_g64": 4 + (16 + 16) / 64,
    "mxfp4a16": 4 + 8 / 32,
    "fp8_dynamic": 8 + 16 / 4096,
}


def test_every_scheme_is_listed_with_a_container_that_takes_it() -> None:
    rows = list_schemes().schemes
    assert [s.name for s in rows] == list(SCHEMES)
    families = {c.name: c.takes for c in WRITTEN}
    for s in rows:
        assert s.container == "any" or SCHEMES[s.name].family in families[s.container]
        assert s.runs
        assert s.purpose


def test_bits_are_those_of_llama_cpp_and_of_arithmetic() -> None:
    bits = {s.name: s.bits for s in list_schemes().schemes}
    for name, wanted in LLAMA_CPP.items():
        # Its file has a metadata of some megabytes, and a tensor of rope factors.
        assert bits[name] == pytest.approx(wanted, abs=0.002), name
    for name, wanted in BY_HAND.items():
        assert bits[name] == pytest.approx(wanted, rel=1e-5), name


def test_the_list_fits_and_needs_no_model(run: Run, call: Call) -> None:
    done = run("quantize", "--list-schemes", env=environment(COLUMNS="60"))
    assert done.code == 0
    assert max(map(len, done.out.splitlines())) <= 60
    shown = {line.split()[0] for line in done.out.splitlines() if line.strip()}
    ours = {n for n in SCHEMES if SCHEMES[n].family == "affine" and n.endswith("sym")}
    assert set(SCHEMES) - ours <= shown
    assert not ours & shown
    told = call("quantize", "--list-schemes", "--json").json
    assert told["schema"] == "qconvert.schemes/1"
    assert {s["name"] for s in told["schemes"]} == set(SCHEMES)
    missing = call("quantize")
    assert (missing.code, "MODEL" in missing.err) == (2, True)
