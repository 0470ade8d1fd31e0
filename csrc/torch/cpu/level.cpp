#include "torch/cpu/level.h"

#include <c10/util/Exception.h>

#include <array>
#include <atomic>
#include <utility>

namespace fused_lora::cpu {
namespace {

using fused::Level;

// In the order of their values.
constexpr std::array<std::pair<const char*, Level>, 4> kNames = {{
    {"plain", Level::kPlain},
    {"avx2", Level::kAvx2},
    {"avx512", Level::kAvx512},
    {"avx512_bf16", Level::kAvx512Bf16},
}};
constexpr int kBest = -1;
std::atomic<int> asked{kBest};

Level best() {
  static const Level found = fused::best_level();
  return found;
}

}  // namespace

Level level() {
  const int named = asked.load(std::memory_order_relaxed);
  return named == kBest ? best() : static_cast<Level>(named);
}

std::string level_obstacle() {
  const bool forced = asked.load(std::memory_order_relaxed) != kBest;
  if (forced || best() != Level::kPlain) return "";
  return "there are no fused kernels for this processor: it has no AVX2";
}

void ask_for_level(const std::string& name) {
  if (name == "best") {
    asked.store(kBest, std::memory_order_relaxed);
    return;
  }
  for (const auto& [known, level] : kNames) {
    if (name != known) continue;
    TORCH_CHECK_VALUE(fused::supported(level), "level: this processor, or this build, has no ",
                      name);
    asked.store(static_cast<int>(level), std::memory_order_relaxed);
    return;
  }
  TORCH_CHECK_VALUE(false, "level must be one of best, plain, avx2, avx512, avx512_bf16, got '",
                    name, "'");
}

const char* level_name() {
  return kNames[static_cast<size_t>(level())].first;
}

}  // namespace fused_lora::cpu
