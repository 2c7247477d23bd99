"""Post-training quantization of a Vision Transformer, simulated with torch's fake-quantize operators."""

from quant.calibration import calibrate, fitting, quantize
from quant.config import QuantConfig, check_bits
from quant.evaluation import evaluate
from quant.observers import OBSERVERS
from quant.storage import load_quantized, require_own_folder, save_quantized

__all__ = [
    "OBSERVERS",
    "QuantConfig",
    "calibrate",
    "check_bits",
    "evaluate",
    "fitting",
    "load_quantized",
    "quantize",
    "require_own_folder",
    "save_quantized",
]
