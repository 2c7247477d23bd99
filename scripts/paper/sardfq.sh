#!/usr/bin/env bash
# SARDFQ's comparison (ICCV 2025): DeiT-T, S, B, ViT-S, B and Swin-S, B at W4/A4, calibrated with real images, noise, and the
# images of PSAQ-ViT, SMI and SARDFQ, each by its preset. The quantizer is the nearest here to the paper's, RepQ-ViT's
# (--observer repq), and not the paper's own: ours and published differ by more than the images.
#   DATASET=/data/imagenet bash scripts/paper/sardfq.sh [flags of compare.py]
# DATASET: image folder with train/ and val/. MODEL_PATH: folder with NAME.pth; without it timm downloads the weights.
# Full precision of these weights as published: 72.21, 79.85, 81.80; 81.39, 84.54; 83.23, 85.27.
# OUTPUT: the folder that everything goes to.
#   bash scripts/paper/sardfq.sh --tiny     # the same on the bundled model, in minutes
set -euo pipefail
source "$(dirname "$0")/compared.sh"
grid=(--bits 4/4 --observer repq --methods psaq-dense smi sardfq-dense
    --with psaq "--preset psaq_vit" --with smi "--preset smi" --with sardfq "--preset sardfq")
if [ "${1:-}" = --tiny ]; then
    shift
    output=${OUTPUT:-runs/paper_sardfq_tiny}
    what=(--iterations 150 --warmup 30 --prune_it 15 30 45 60 --seeds 0 1 2 --with smi "--tv2 0.02")
else
    required DATASET "a folder with train/ and val/ of ImageNet"
    output=${OUTPUT:-runs/paper_sardfq}
    # The tags say which of timm's weights: those of its plain names are others for three of them.
    what=(--models deit_tiny_16_imagenet deit_small_16_imagenet deit_base_16_imagenet
        vit_small_patch16_224.augreg_in21k_ft_in1k vit_base_patch16_224.augreg_in21k_ft_in1k
        swin_small_patch4_window7_224.ms_in1k swin_base_patch4_window7_224.ms_in22k_ft_in1k
        --dataset "$DATASET" ${MODEL_PATH:+--model_path "$MODEL_PATH"})
fi
compared sardfq compare "$output" "${grid[@]}" "${what[@]}" "$@"
