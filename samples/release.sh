#!/bin/sh
# A release pipeline: from a model to a quantized file that is proven good, with its checksum.
#   sh samples/release.sh MODEL OUTPUT-DIRECTORY
# Every step stops the script when it fails; exit 1 means that the artefact is not good enough.
set -eu
model=$1
out=$2
here=$(dirname "$0")
name=$(basename "$model")
artefact=$out/$name.q4_block64.qblk
mkdir -p "$out"

qconvert inspect "$model" --report "$out/inspect.json" --strict --quiet > "$out/inspect.txt"
qconvert calibrate "$model" --activations "$here/activations.safetensors" --observer mse \
    -o "$out/calibration.safetensors" --quiet
qconvert quantize "$model" --scheme q4_block64 --calibration "$out/calibration.safetensors" \
    -o "$artefact" --report "$out/quantize.json" --strict --quiet
qconvert verify "$artefact" --against "$model" --min-sqnr 18 --min-output-sqnr 18 \
    --samples "$here/activations.safetensors" --strict --report "$out/verify.json" --quiet
(cd "$out" && sha256sum "$name.q4_block64.qblk" > SHA256SUMS && sha256sum --check --quiet SHA256SUMS)
echo "released: $artefact"
