"""What only a GPU can show: make gpu, or pytest tests/gpu.

FUSED_LORA_GPU_TESTS_ON=cpu runs what does not need CUDA itself on the CPU, to see that the tests are right.
"""
