#!/usr/bin/env bash
# The quantization tables: DeiT-Tiny and DeiT-Base calibrated with noise, real images, and dense, SMI and PRI inversion.
#   DATASET=/data/imagenet bash scripts/paper/quant.sh [flags of compare.py]
# DATASET: image folder with train/ and val/. MODEL_PATH: folder with NAME.pth; without it timm downloads the weights.
#   bash scripts/paper/quant.sh --tiny     # the same grid on the bundled model, in minutes
set -euo pipefail
source "$(dirname "$0")/../environment.sh" requirements.txt
if [ "${1:-}" = --tiny ]; then
    shift
    what=(--iterations 300 --tv2 0.02 --prune_it 30 60 120 180 --seeds 0 1 2 --datapool runs/paper_quant_tiny/datapool --output runs/paper_quant_tiny)
else
    : "${DATASET:?give DATASET=, a folder with train/ and val/ of ImageNet (or --tiny)}"
    what=(--models deit_tiny_16_imagenet deit_base_16_imagenet --dataset "$DATASET"
        --datapool runs/paper_quant/datapool --output runs/paper_quant)
    [ -z "${MODEL_PATH:-}" ] || what+=(--model_path "$MODEL_PATH")
fi
.venv/bin/python scripts/compare.py --bits 8/8 4/8 --strategies dense smi pri "${what[@]}" "$@"
