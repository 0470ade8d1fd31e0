// Runs the fused LoRA linear of one shape, forward and backward, without torch: to be timed, or
// profiled by
//
//     ncu --set full profile_lora --rows 4096 --warm-up 0 --iterations 1
//
// Exits with 2 for a wrong command line and with 3 where there is no GPU.
#include <algorithm>
#include <cstdio>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/lora_linear.h"
#include "kernels/plan.h"
#include "profile_lora/operands.h"
#include "profile_lora/options.h"

namespace fused_lora::profile {
namespace {

constexpr int kBadCommandLine = 2, kNoGpu = 3;

class Event {
 public:
  Event() { FUSED_LORA_CHECK(cudaEventCreate(&event_)); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  void record(cudaStream_t stream) { FUSED_LORA_CHECK(cudaEventRecord(event_, stream)); }
  float milliseconds_since(const Event& start) const {
    FUSED_LORA_CHECK(cudaEventSynchronize(event_));
    float milliseconds = 0;
    FUSED_LORA_CHECK(cudaEventElapsedTime(&milliseconds, start.event_, event_));
    return milliseconds;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

// Median microseconds of a run. Between the runs memory twice as large as the L2 is written, so
// that each finds its operands in DRAM.
double median_microseconds(const Options& options, void* flushed, int64_t flushed_bytes,
                           const std::function<void()>& run) {
  for (int i = 0; i < options.warm_up; ++i) run();
  std::vector<float> times;
  Event start, stop;
  for (int i = 0; i < options.iterations; ++i) {
    FUSED_LORA_CHECK(
        cudaMemsetAsync(flushed, i & 0xff, static_cast<size_t>(flushed_bytes), nullptr));
    start.record(nullptr);
    run();
    stop.record(nullptr);
    times.push_back(stop.milliseconds_since(start));
  }
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return 1e3 * times[times.size() / 2];
}

void print_plan(const char* half, const std::string& described, int launches, size_t workspace) {
  std::printf("%s: %d launches, workspace %zu bytes\n%s\n", half, launches, workspace,
              described.c_str());
}

void print_time(const char* half, double microseconds, double products, const kernels::Problem& p) {
  const double flops = 2.0 * products * static_cast<double>(p.rows);
  std::printf("%s: %.1f us, %.1f TFLOP/s\n", half, microseconds, flops / microseconds * 1e-6);
}

int plan_only(const Options& options) {
  const kernels::Device device = device_named(options.plan_for);
  kernels::ForwardCall forward;
  kernels::BackwardCall backward;
  describe_calls(options, &forward, &backward);
  const auto forward_plan = kernels::plan(forward, device);
  const auto backward_plan = kernels::plan(backward, device);
  print_plan("forward", kernels::describe(forward_plan), forward_plan.launches,
             forward_plan.workspace_bytes);
  print_plan("backward", kernels::describe(backward_plan), backward_plan.launches,
             backward_plan.workspace_bytes);
  return 0;
}

int profile(const Options& options) {
  int devices = 0;
  const cudaError_t found = cudaGetDeviceCount(&devices);
  if (found != cudaSuccess || devices == 0) {
    std::fprintf(stderr,
                 "profile_lora: no GPU to run on (%s). --plan a100 prints a plan without one\n",
                 found == cudaSuccess ? "none is visible" : cudaGetErrorString(found));
    return kNoGpu;
  }
  cudaDeviceProp properties;
  FUSED_LORA_CHECK(cudaGetDeviceProperties(&properties, 0));
  kernels::Device device;
  FUSED_LORA_CHECK(kernels::current_device(&device));
  std::printf("%s, compute capability %d.%d, %d multiprocessors\n", properties.name,
              properties.major, properties.minor, device.multiprocessors);

  Operands operands(options);
  const kernels::Problem& p = options.problem;
  const auto forward = kernels::plan(operands.forward, device);
  const auto backward = kernels::plan(operands.backward, device);
  const size_t workspace_bytes = std::max(forward.workspace_bytes, backward.workspace_bytes);
  void* workspace = operands.allocate(static_cast<int64_t>(std::max<size_t>(workspace_bytes, 1)));
  const int64_t flushed_bytes = 2 * static_cast<int64_t>(properties.l2CacheSize);
  void* flushed = operands.allocate(flushed_bytes);

  // Backward needs the h that forward makes.
  FUSED_LORA_CHECK(kernels::run(operands.forward, forward, workspace, nullptr));
  FUSED_LORA_CHECK(cudaDeviceSynchronize());
  const auto k = static_cast<double>(p.in_features), n = static_cast<double>(p.out_features),
             r = static_cast<double>(p.rank), frozen = options.base ? 0.0 : k * n;
  if (options.forward) {
    print_plan("forward", kernels::describe(forward), forward.launches, forward.workspace_bytes);
    const double time = median_microseconds(options, flushed, flushed_bytes, [&] {
      FUSED_LORA_CHECK(kernels::run(operands.forward, forward, workspace, nullptr));
    });
    print_time("forward", time, frozen + r * (k + n), p);
  }
  if (options.backward) {
    print_plan("backward", kernels::describe(backward), backward.launches,
               backward.workspace_bytes);
    const double time = median_microseconds(options, flushed, flushed_bytes, [&] {
      FUSED_LORA_CHECK(kernels::run(operands.backward, backward, workspace, nullptr));
    });
    print_time("backward", time, frozen + 2 * r * (k + n), p);
  }
  FUSED_LORA_CHECK(cudaDeviceSynchronize());
  return 0;
}

}  // namespace
}  // namespace fused_lora::profile

int main(int count, char** arguments) {
  using namespace fused_lora::profile;
  if (count == 2 && (std::string(arguments[1]) == "--help" || std::string(arguments[1]) == "-h")) {
    std::fputs(kUsage, stdout);
    return 0;
  }
  try {
    const Options options = parse(count, arguments);
    return options.plan_for.empty() ? profile(options) : plan_only(options);
  } catch (const std::invalid_argument& error) {
    std::fprintf(stderr, "profile_lora: %s\n\n%s", error.what(), kUsage);
    return kBadCommandLine;
  } catch (const std::runtime_error& error) {
    std::fprintf(stderr, "profile_lora: %s\n", error.what());
    return 1;
  }
}
