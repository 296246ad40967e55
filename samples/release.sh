#!/bin/sh
# A release pipeline: from a model to a quantized file that is proven good, with its checksum.
# What it has to keep to stands in release.toml; junit.xml and the reports are for the machine.
#   sh samples/release.sh MODEL OUTPUT-DIRECTORY
# Every step stops the script when it fails; exit 1 means that the artefact is not good enough.
set -eu
model=$1
out=$2
here=$(dirname "$0")
name=$(basename "$model")
artefact=$out/$name.q4_block64.qblk
mkdir -p "$out"

qconvert inspect "$model" --report "$out/inspect.json" --html "$out/inspect.html" --strict --quiet > "$out/inspect.txt"
qconvert calibrate "$model" --activations "$here/activations.safetensors" --observer mse \
    -o "$out/calibration.safetensors" --quiet
qconvert quantize "$model" --scheme q4_block64 --calibration "$out/calibration.safetensors" \
    -o "$artefact" --report "$out/quantize.json" --strict --quiet
qconvert verify "$artefact" --against "$model" --limits "$here/release.toml" \
    --samples "$here/activations.safetensors" --rebuild \
    --calibration "$out/calibration.safetensors" --strict --quiet \
    --report "$out/verify.json" --html "$out/verify.html" --junit "$out/junit.xml" --manifest "$out/SHA256SUMS"
(cd "$out" && sha256sum -c SHA256SUMS)
echo "released: $artefact"
