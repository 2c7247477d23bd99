"""Post-training quantization of a Vision Transformer, simulated with torch's fake-quantize operators."""

from quant.calibration import calibrate, quantize
from quant.config import QuantConfig, check_bits
from quant.evaluation import evaluate
from quant.observers import OBSERVERS

__all__ = ["OBSERVERS", "QuantConfig", "calibrate", "check_bits", "evaluate", "quantize"]
