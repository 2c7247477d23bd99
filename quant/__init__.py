"""Post-training quantization of a Vision Transformer, simulated to the bit as torch's fake-quantize operators do.

`quantize` makes a quantized copy from calibration images, a `QuantConfig` says how, `save_quantized` and
`load_quantized` keep it. `OBSERVERS` are the ways to choose ranges.
"""

from utils.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "quant.calibration": ("calibrate", "fitting", "quantize"),
        "quant.config": ("QuantConfig", "check_bits"),
        "quant.observers": ("OBSERVERS",),
        "quant.storage": ("load_quantized", "require_own_folder", "save_quantized"),
    },
)
