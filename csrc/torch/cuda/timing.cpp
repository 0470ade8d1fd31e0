#include "torch/cuda/timing.h"

#include <algorithm>
#include <array>

#include "torch/cuda/device.h"

namespace fused_lora::cuda {
namespace {

constexpr const char* kDoing = "timing the paths";

class Event {
 public:
  Event() { check(cudaEventCreate(&event_), kDoing); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  ~Event() { static_cast<void>(cudaEventDestroy(event_)); }

  void record(cudaStream_t stream) { check(cudaEventRecord(event_, stream), kDoing); }
  void wait() { check(cudaEventSynchronize(event_), kDoing); }
  double milliseconds_since(const Event& start) const {
    float elapsed = 0;
    check(cudaEventElapsedTime(&elapsed, start.event_, event_), kDoing);
    return elapsed;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

// Waiting is forbidden while any thread captures a graph in the default mode, and would spoil that
// capture. This thread does not capture, and is out of it.
class ApartFromCaptures {
 public:
  ApartFromCaptures() { exchange(); }
  ApartFromCaptures(const ApartFromCaptures&) = delete;
  ApartFromCaptures& operator=(const ApartFromCaptures&) = delete;
  ~ApartFromCaptures() { exchange(); }

 private:
  void exchange() { static_cast<void>(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace

Times time_in_turns(const std::function<void()>& fused, const std::function<void()>& composed,
                    cudaStream_t stream) {
  constexpr int kRounds = 7;
  const ApartFromCaptures apart;
  // Once unmeasured: kernels are loaded and the allocator's blocks made at a first call.
  fused();
  composed();
  std::array<Event, 2 * kRounds + 1> marks;
  marks[0].record(stream);
  for (int round = 0; round < kRounds; ++round) {
    fused();
    marks[2 * round + 1].record(stream);
    composed();
    marks[2 * round + 2].record(stream);
  }
  marks.back().wait();
  std::array<double, kRounds> times[2];
  for (int i = 0; i < 2 * kRounds; ++i) {
    times[i % 2][i / 2] = marks[i + 1].milliseconds_since(marks[i]);
  }
  for (auto& of_path : times) std::sort(of_path.begin(), of_path.end());
  return {times[0][kRounds / 2], times[1][kRounds / 2]};
}

}  // namespace fused_lora::cuda
