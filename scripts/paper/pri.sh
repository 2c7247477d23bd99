#!/usr/bin/env bash
# Patch Rebirth Inversion's comparison (2025): DeiT-Tiny and DeiT-Base at W8/A8 and W4/A8, calibrated with real images,
# noise, and dense, SMI and PRI inversion, 4 images of a trajectory. The quantizer is SMI's own, --observer published.
# Of transfer: kt.sh --methods dense smi pri.
#   DATASET=/data/imagenet bash scripts/paper/pri.sh [flags of compare.py]
# DATASET: image folder with train/ and val/. MODEL_PATH: folder with NAME.pth; without it timm downloads the weights.
# OUTPUT: the folder that everything goes to.
#   bash scripts/paper/pri.sh --tiny     # the same on the bundled model, in minutes
set -euo pipefail
source "$(dirname "$0")/compared.sh"
grid=(--bits 8/8 4/8 --observer published --methods dense smi pri)
if [ "${1:-}" = --tiny ]; then
    shift
    output=${OUTPUT:-runs/paper_pri_tiny}
    what=(--iterations 300 --tv2 0.02 --prune_it 30 60 120 180 --seeds 0 1 2)
else
    required DATASET "a folder with train/ and val/ of ImageNet"
    output=${OUTPUT:-runs/paper_pri}
    what=(--models deit_tiny_16_imagenet deit_base_16_imagenet --dataset "$DATASET" ${MODEL_PATH:+--model_path "$MODEL_PATH"})
fi
compared pri compare "$output" "${grid[@]}" "${what[@]}" "$@"
