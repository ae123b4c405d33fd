"""What a packed model does on this computer: fused blocks, memory format, methods of its own."""
