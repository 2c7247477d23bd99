"""Post-training quantization of a Vision Transformer, simulated with torch's fake-quantize operators.

`quantize` makes a quantized copy from calibration images, a `QuantConfig` says how, `save_quantized` and
`load_quantized` keep it. `OBSERVERS` are the ways to choose ranges.
"""

from quant.calibration import calibrate, fitting, quantize
from quant.config import QuantConfig, check_bits
from quant.observers import OBSERVERS
from quant.storage import load_quantized, require_own_folder, save_quantized

__all__ = [
    "OBSERVERS",
    "QuantConfig",
    "calibrate",
    "check_bits",
    "fitting",
    "load_quantized",
    "quantize",
    "require_own_folder",
    "save_quantized",
]
