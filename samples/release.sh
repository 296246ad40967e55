#!/bin/sh
# A release pipeline: from a model to a quantized file that is proven good, with its checksum.
# What it has to keep to stands in release.toml; junit.xml and the reports are for the machine.
#   sh samples/release.sh MODEL OUTPUT-DIRECTORY [ACTIVATIONS]
# ACTIVATIONS are recorded inputs of MODEL's layers, those of the sample model where none are given;
# what an earlier run left in OUTPUT-DIRECTORY is replaced.
# Every step stops the script when it fails; exit 1 means that the artefact is not good enough.
set -eu
usage="usage: sh release.sh MODEL OUTPUT-DIRECTORY [ACTIVATIONS]"
model=${1:?$usage}
out=${2:?$usage}
here=$(dirname "$0")
activations=${3:-$here/activations.safetensors}
name=$(basename "$model")
artefact=$out/$name.q4_block64.qblk
mkdir -p "$out"
rm -f "$out/SHA256SUMS"  # it vouches for a file that is about to be replaced

qconvert inspect "$model" --report "$out/inspect.json" --html "$out/inspect.html" \
    --strict --quiet --force > "$out/inspect.txt"
qconvert calibrate "$model" --activations "$activations" --observer mse \
    -o "$out/calibration.safetensors" --quiet --force
qconvert quantize "$model" --scheme q4_block64 --calibration "$out/calibration.safetensors" \
    -o "$artefact" --report "$out/quantize.json" --strict --quiet --force
qconvert verify "$artefact" --against "$model" --limits "$here/release.toml" \
    --samples "$activations" --rebuild \
    --calibration "$out/calibration.safetensors" --strict --quiet --force \
    --report "$out/verify.json" --html "$out/verify.html" --junit "$out/junit.xml" \
    --manifest "$out/SHA256SUMS"
(cd "$out" && sha256sum -c SHA256SUMS)
echo "released: $artefact"
