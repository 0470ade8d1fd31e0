// An op of ours as the dispatcher knows it.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <string>

#include "torch/registration.h"

namespace fused_lora::ops {

// Internal to each file: two libraries in one process may be built under different names.
template <typename Signature>
static auto find(const char* name) {
  const std::string full = std::string(FUSED_LORA_QUOTED(FUSED_LORA_LIBRARY) "::") + name;
  return c10::Dispatcher::singleton().findSchemaOrThrow(full.c_str(), "").typed<Signature>();
}

}  // namespace fused_lora::ops
