#!/usr/bin/env bash
# SMI's quantization table (Hu et al., ICML 2024): DeiT-Tiny and DeiT-Base at W8/A8 and W4/A8, calibrated with real images,
# noise, PSAQ-ViT's images, dense inversion and SMI. The quantizer is SMI's and PSAQ-ViT's own, --observer published.
#   DATASET=/data/imagenet bash scripts/paper/quant.sh [flags of compare.py]
# DATASET: image folder with train/ and val/. MODEL_PATH: folder with NAME.pth; without it timm downloads the weights.
# OUTPUT: the folder that everything goes to.
#   bash scripts/paper/quant.sh --tiny     # the same on the bundled model, in minutes
set -euo pipefail
source "$(dirname "$0")/compared.sh"
grid=(--bits 8/8 4/8 --observer published --methods psaq-dense dense smi --with psaq "--preset psaq_vit")
if [ "${1:-}" = --tiny ]; then
    shift
    output=${OUTPUT:-runs/paper_quant_tiny}
    what=(--iterations 150 --prune_it 15 30 45 60 --seeds 0 1 2 --with psaq "--warmup 30" --with deepinversion "--tv2 0.02")
else
    required DATASET "a folder with train/ and val/ of ImageNet"
    output=${OUTPUT:-runs/paper_quant}
    what=(--models deit_tiny_16_imagenet deit_base_16_imagenet --dataset "$DATASET" ${MODEL_PATH:+--model_path "$MODEL_PATH"})
fi
compared smi compare "$output" "${grid[@]}" "${what[@]}" "$@"
