"""Post-training quantization of a Vision Transformer, simulated with torch's fake-quantize operators."""

from quant.calibration import calibrate, check_bits
from quant.evaluation import evaluate

__all__ = ["calibrate", "check_bits", "evaluate"]
