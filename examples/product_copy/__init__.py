"""Tunes a small language model on a shop's product copy, once with fused_lora and once with stock PEFT."""
