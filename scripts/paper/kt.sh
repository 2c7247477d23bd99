#!/usr/bin/env bash
# The knowledge-transfer tables: DeiT-Tiny and DeiT-Base on CIFAR-10 and CIFAR-100, dense, SMI and PRI inversion.
#   DATASET=/data/cifar MODEL_PATH=/data/teachers bash scripts/paper/kt.sh [flags of compare_kt.py]
# DATASET: folder with cifar10/ and cifar100/, image folders or torchvision's roots. MODEL_PATH: folder with NAME.pth.
#   bash scripts/paper/kt.sh --tiny        # the same grid on the bundled pair, in minutes
set -euo pipefail
source "$(dirname "$0")/../environment.sh" requirements.txt
grid=(--strategies dense smi pri --students linear)
if [ "${1:-}" = --tiny ]; then
    shift
    .venv/bin/python scripts/compare_kt.py "${grid[@]}" --seeds 0 1 2 --epochs 4 --images_per_epoch 100 --kd_steps 100 \
        --iterations 100 --tv2 0.01 --no-flip --prune_it 4 8 12 16 --kd_lr_schedule cosine --augment contrast grey mix shift scatter noise \
        --datapool runs/paper_kt_tiny/datapool --output runs/paper_kt_tiny "$@"
else
    : "${DATASET:?give DATASET=, a folder with cifar10/ and cifar100/ (or --tiny)}"
    : "${MODEL_PATH:?give MODEL_PATH=, a folder with the teachers as NAME.pth}"
    for data in cifar10 cifar100; do
        .venv/bin/python scripts/compare_kt.py "${grid[@]}" --models deit_tiny_16_$data deit_base_16_$data \
            --dataset "$DATASET/$data" --model_path "$MODEL_PATH" --epochs 1000 --eval_every 50 \
            --datapool runs/paper_kt/datapool --output runs/paper_kt/$data "$@"
    done
fi
