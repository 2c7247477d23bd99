"""Post-training quantization of a Vision Transformer, simulated with torch's fake-quantize operators."""

from quant.calibration import calibrate, check_model, quantize
from quant.config import QuantConfig, check_bits
from quant.evaluation import evaluate
from quant.observers import OBSERVERS
from quant.storage import load_quantized, save_quantized

__all__ = [
    "OBSERVERS",
    "QuantConfig",
    "calibrate",
    "check_bits",
    "check_model",
    "evaluate",
    "load_quantized",
    "quantize",
    "save_quantized",
]
