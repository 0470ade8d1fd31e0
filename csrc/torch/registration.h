// Under which name and dispatch key the ops are registered. The tests build these sources once
// more, on the emulated GPU: under another name, with the CUDA implementation serving CPU tensors.
#pragma once

#ifndef FUSED_LORA_LIBRARY
#define FUSED_LORA_LIBRARY fused_lora
#endif
#ifndef FUSED_LORA_CUDA_KEY
#define FUSED_LORA_CUDA_KEY CUDA
#endif

// torch's own macros paste their argument as it stands; these expand it first.
#define FUSED_LORA_DEFINE_LIBRARY(name, m) TORCH_LIBRARY(name, m)
#define FUSED_LORA_DEFINE_FRAGMENT(name, m) TORCH_LIBRARY_FRAGMENT(name, m)

#define FUSED_LORA_QUOTE(text) #text
#define FUSED_LORA_QUOTED(macro) FUSED_LORA_QUOTE(macro)
