#!/usr/bin/env bash
# Knowledge transfer on the bundled models, from nothing but Python and bash: set up, invert, distill, compare.
set -euo pipefail
source "$(dirname "$0")/environment.sh" requirements.txt
.venv/bin/python scripts/compare_kt.py --epochs 4 --images_per_epoch 100 --eval_every 1 --iterations 100 --tv2 0.01 --no-flip \
    --prune_it 4 8 12 16 --prune_ratio 0.3 0.3 0.3 0.3 --kd_lr_schedule cosine --optimizer adamw --lr 1e-3 --kd_steps 50 \
    --augment contrast grey mix shift noise \
    --linear "--optimizer sgd --lr 0.1 --kd_steps 150 --augment contrast grey mix shift scatter noise" \
    --scratch "--kd_steps 250" --datapool runs/demo_kt/datapool --output runs/demo_kt
