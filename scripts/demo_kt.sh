#!/usr/bin/env bash
# Knowledge transfer on the bundled models, from nothing but Python and bash: set up, invert, distill, compare.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
.venv/bin/python scripts/compare_kt.py --epochs 10 --images_per_epoch 100 --kd_steps 50 --eval_every 5 \
    --iterations 200 --tv2 0.02 --prune_it 10 20 30 40 --prune_ratio 0.3 0.3 0.3 0.3 \
    --datapool runs/demo_kt/datapool --output runs/demo_kt
