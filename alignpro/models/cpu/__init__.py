"""What replaces a model's modules on a CPU: packed weights, fused layers, the fused decoder; and float32
states with weights in bfloat16.

Each is tried on a few tokens when the model is loaded, and is left out where it computes something else. May import
`alignpro_kernels`, `models.attention_interface`, `models.paged_attention`, `models.peft_types` and `models.thresholds`.
"""
