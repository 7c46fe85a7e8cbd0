"""A run → files that other programs read: a Hugging Face checkpoint, a PEFT adapter, plain safetensors."""
