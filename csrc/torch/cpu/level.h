// Which instructions the CPU kernels of this process use.
#pragma once

#include <string>

#include "cpu/fused/lora_linear.h"

namespace fused_lora::cpu {

// The processor's widest, unless another was asked for.
fused::Level level();

// Why `auto` and `fused` leave a call to other paths here: the processor has none of the
// instructions that the kernels are worth having for. Empty where it has, or a level was asked for.
std::string level_obstacle();

// name: "plain", "avx2", "avx512" or "avx512_bf16"; "best" for the widest. Throws for another name,
// and where the processor lacks the level's instructions.
void ask_for_level(const std::string& name);
const char* level_name();

}  // namespace fused_lora::cpu
