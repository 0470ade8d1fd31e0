// Tasks on the caller's threads.
#pragma once

#include <type_traits>

#include "cpu/fused/lora_linear.h"

namespace fused_lora::cpu::fused {

// Calls body(begin, end) until every task of 0 .. tasks-1 is done.
template <typename Body>
void run_tasks(const Parallel& parallel, int64_t tasks, const Body& body) {
  if (tasks <= 0) return;
  if (parallel.run == nullptr || parallel.threads <= 1 || tasks <= 1) {
    body(int64_t{0}, tasks);
    return;
  }
  parallel.run(
      parallel.context, tasks,
      [](void* closure, int64_t begin, int64_t end) {
        (*static_cast<const Body*>(closure))(begin, end);
      },
      const_cast<std::remove_const_t<Body>*>(&body));
}

}  // namespace fused_lora::cpu::fused
