"""Pure functions on tensors: grids and rounding, the packing of codes, the sharing out of bits."""
