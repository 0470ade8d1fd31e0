#include "torch/path.h"

#include <atomic>

namespace fused_lora {
namespace {

std::atomic<Path> asked{Path::kAuto};

}  // namespace

void ask_for(Path path) {
  asked.store(path, std::memory_order_relaxed);
}

Path asked_path() {
  return asked.load(std::memory_order_relaxed);
}

}  // namespace fused_lora
