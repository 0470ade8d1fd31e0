// Which path the compiled ops were asked to take. The plain-torch path is Python's, and never
// reaches them.
#pragma once

namespace fused_lora {

enum class Path { kAuto, kFused, kComposed };

// Of every thread, from now on.
void ask_for(Path path);
Path asked_path();

}  // namespace fused_lora
