"""What diffusers and transformers call to load, quantize and save a model, and what a user asks of one."""
