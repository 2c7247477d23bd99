#!/usr/bin/env bash
# SMI's transfer table (Hu et al., ICML 2024): linear students of DeiT-Tiny and DeiT-Base on CIFAR-10 and CIFAR-100, taught with
# real images, noise, dense inversion and SMI. Nothing is quantized.
#   DATASET=/data/cifar MODEL_PATH=/data/teachers bash scripts/paper/kt.sh [flags of compare_kt.py]
# DATASET: folder with cifar10/ and cifar100/, image folders or torchvision's roots. MODEL_PATH: folder with NAME.pth.
# OUTPUT: the folder that everything goes to.
#   bash scripts/paper/kt.sh --tiny        # the same on the bundled pair, in minutes
set -euo pipefail
source "$(dirname "$0")/compared.sh"
grid=(--methods dense smi --students linear)
if [ "${1:-}" = --tiny ]; then
    shift
    compared smi compare_kt "${OUTPUT:-runs/paper_kt_tiny}" "${grid[@]}" --seeds 0 1 2 --epochs 2 --images_per_epoch 50 \
        --inversion-batchsize 50 --kd_steps 100 --iterations 100 --tv2 0.01 --no-flip --prune_it 4 8 12 16 \
        --kd_lr_schedule cosine --augment contrast grey mix shift scatter noise "$@"
else
    required DATASET "a folder with cifar10/ and cifar100/"
    required MODEL_PATH "a folder with the teachers as NAME.pth"
    for data in cifar10 cifar100; do
        compared smi compare_kt "${OUTPUT:-runs/paper_kt}/$data" "${grid[@]}" --models deit_tiny_16_$data deit_base_16_$data \
            --dataset "$DATASET/$data" --model_path "$MODEL_PATH" --epochs 1000 --eval_every 50 "$@"
    done
fi
