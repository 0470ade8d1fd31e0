// The kernels behind C functions, for ctypes, with threads of the test's own.
#include <atomic>
#include <thread>
#include <vector>

#include "cpu/fused/lora_linear.h"
#include "cpu/fused/weight_panels.h"

namespace {

using namespace fused_lora::cpu::fused;

// Tasks go to whichever thread asks next, so that who takes what differs from run to run.
void run_on_threads(void* context, int64_t tasks, Parallel::Body body, void* closure) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t task = next++; task < tasks; task = next++) body(closure, task, task + 1);
  };
  std::vector<std::thread> threads;
  for (int i = 1; i < *static_cast<int*>(context); ++i) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) int level_supported(int level) {
  return supported(static_cast<Level>(level));
}

__attribute__((visibility("default"))) int level_best() {
  return static_cast<int>(best_level());
}

// By which a description of the structs in another language is known to be theirs.
__attribute__((visibility("default"))) int forward_call_bytes() {
  return sizeof(ForwardCall);
}

__attribute__((visibility("default"))) int backward_call_bytes() {
  return sizeof(BackwardCall);
}

__attribute__((visibility("default"))) void forward(const ForwardCall* calls, int64_t count,
                                                    int level, int threads) {
  run(std::span(calls, count), static_cast<Level>(level), {run_on_threads, &threads, threads});
}

__attribute__((visibility("default"))) void backward(const BackwardCall* calls, int64_t count,
                                                     int level, int threads) {
  run(std::span(calls, count), static_cast<Level>(level), {run_on_threads, &threads, threads});
}

__attribute__((visibility("default"))) int weight_fits_panels(int64_t out_features,
                                                              int64_t in_features) {
  return fits_panels(out_features, in_features);
}

__attribute__((visibility("default"))) void pack(const MatrixView* weight, int64_t out_features,
                                                 int64_t in_features, int dtype, void* panels,
                                                 int threads) {
  pack_weight(*weight, out_features, in_features, static_cast<DType>(dtype), panels,
              {run_on_threads, &threads, threads});
}

__attribute__((visibility("default"))) void unpack(const void* panels, int64_t out_features,
                                                   int64_t in_features, int dtype, void* weight,
                                                   int threads) {
  unpack_weight(panels, out_features, in_features, static_cast<DType>(dtype), weight,
                {run_on_threads, &threads, threads});
}
}
