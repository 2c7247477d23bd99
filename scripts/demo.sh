#!/usr/bin/env bash
# The main job on the bundled model, from nothing but Python and bash: set up, invert, quantize, compare.
set -euo pipefail
source "$(dirname "$0")/environment.sh" requirements.txt
schedule=(--prune_it 50 100 200 300 --prune_ratio 0.3 0.3 0.3 0.3)
images=(--iterations 500 --tv2 0.02 --observer repq)
echo "== test_quant.py: images from the model alone, then 4-bit weights and activations"
.venv/bin/python test_quant.py "${schedule[@]}" "${images[@]}" --w_bit 4 --a_bit 4 --datapool runs/demo/datapool --output runs/demo/deit_nano_4_digits-smi-s0
echo
echo "== the same against real images, noise and dense inversion, three seeds each"
.venv/bin/python scripts/compare.py "${schedule[@]}" "${images[@]}" --bits 8/8 4/4 --seeds 0 1 2 \
    --datapool runs/demo/datapool --output runs/demo
