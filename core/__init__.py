"""Arrays in, arrays out: the Llama, its bridge to Hugging Face, and the heads of the recommenders."""

from core.platform import quiet_without_gpu

quiet_without_gpu()
