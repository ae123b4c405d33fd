"""PQ and CAD: calibration, fake quantization, reconstruction and distillation."""
