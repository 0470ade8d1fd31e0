#include "runtime/streams.h"

#include <algorithm>
#include <memory>
#include <string>
#include <thread>
#include <utility>

#include "runtime/errors.h"
#include "runtime/handles.h"

namespace emulator {

namespace {

struct Capture {
  cudaStreamCaptureMode mode;
  bool blocking;  // its stream synchronises with the legacy stream
  std::thread::id thread;
  bool invalidated = false;
  GraphNodes nodes;
};

struct Stream {
  unsigned flags = cudaStreamDefault;
  int priority = 0;
  std::shared_ptr<Capture> capture;
};

struct Event {
  unsigned flags = cudaEventDefault;
  bool recorded = false;
  std::shared_ptr<Capture> capture;  // that of the stream it was last recorded in
};

struct State {
  Handles<Stream, cudaStream_t> streams{"stream"};
  Handles<Event, cudaEvent_t> events{"event"};
  Stream per_thread;                               // cudaStreamPerThread
  std::vector<std::shared_ptr<Capture>> captures;  // that were begun and not ended
};

// Never destroyed: a stream may be destroyed while the process exits.
State& state() {
  static State& state = *new State;
  return state;
}

thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

bool is_legacy(cudaStream_t stream) {
  return stream == nullptr || stream == cudaStreamLegacy;
}

// The legacy stream never captures and has no flags, so that one object stands for it.
Stream& find_stream(cudaStream_t stream) {
  static Stream legacy;
  if (is_legacy(stream)) return legacy;
  return stream == cudaStreamPerThread ? state().per_thread : state().streams.get(stream);
}

void invalidate(const std::vector<std::shared_ptr<Capture>>& captures) {
  for (const auto& capture : captures) capture->invalidated = true;
}

std::vector<std::shared_ptr<Capture>> blocking_captures() {
  std::vector<std::shared_ptr<Capture>> blocking;
  std::copy_if(state().captures.begin(), state().captures.end(), std::back_inserter(blocking),
               [](const auto& capture) { return capture->blocking; });
  return blocking;
}

void drop_capture(Stream& stream) {
  auto& captures = state().captures;
  captures.erase(std::remove(captures.begin(), captures.end(), stream.capture), captures.end());
  stream.capture = nullptr;
}

// The stream, for work that is put into it.
Stream& use_stream(cudaStream_t handle) {
  Stream& stream = find_stream(handle);
  const auto captures = blocking_captures();
  if (is_legacy(handle) && !captures.empty()) {
    invalidate(captures);
    throw CudaError(cudaErrorStreamCaptureImplicit,
                    "the legacy stream is used while a stream that waits for it captures");
  }
  if (stream.capture != nullptr && stream.capture->invalidated) {
    throw CudaError(cudaErrorStreamCaptureInvalidated, "an earlier call invalidated the capture");
  }
  return stream;
}

void refuse_captured(const Event& event) {
  if (event.capture == nullptr) return;
  event.capture->invalidated = true;
  throw CudaError(cudaErrorCapturedEvent, "the event was last recorded in a capture");
}

}  // namespace

void enqueue(cudaStream_t handle, cudaGraphNodeType type, std::function<void()> work) {
  Stream& stream = use_stream(handle);
  if (stream.capture == nullptr) {
    work();
  } else {
    stream.capture->nodes.push_back({type, std::move(work)});
  }
}

bool is_capturing(cudaStream_t stream) {
  return find_stream(stream).capture != nullptr;
}

void refuse_while_capturing() {
  if (thread_mode == cudaStreamCaptureModeRelaxed) return;
  std::vector<std::shared_ptr<Capture>> captures;
  for (const auto& capture : state().captures) {
    const bool own = capture->thread == std::this_thread::get_id() &&
                     capture->mode != cudaStreamCaptureModeRelaxed;
    const bool other =
        thread_mode == cudaStreamCaptureModeGlobal && capture->mode == cudaStreamCaptureModeGlobal;
    if (own || other) captures.push_back(capture);
  }
  if (captures.empty()) return;
  invalidate(captures);
  throw CudaError(cudaErrorStreamCaptureUnsupported,
                  "a call that may synchronise, while a stream captures");
}

void refuse_if_capturing(cudaStream_t handle, const char* why) {
  const Stream& stream = find_stream(handle);
  if (stream.capture == nullptr) return;
  stream.capture->invalidated = true;
  throw CudaError(cudaErrorStreamCaptureUnsupported, why);
}

void reset_streams() {
  state().streams.clear();
  state().events.clear();
  state().per_thread = {};
  state().captures.clear();
  thread_mode = cudaStreamCaptureModeGlobal;
}

}  // namespace emulator

using namespace emulator;

extern "C" {

// ---- streams
// --------------------------------------------------------------------------------------

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  return run_call("cudaStreamCreateWithPriority", [&] {
    require(stream, "pStream");
    if (flags != cudaStreamDefault && flags != cudaStreamNonBlocking) {
      throw ArgumentError("flags is " + std::to_string(flags));
    }
    *stream = state().streams.add(Stream{flags, priority, nullptr});
  });
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithPriority(stream, cudaStreamDefault, 0);
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  return run_call("cudaStreamDestroy", [&] {
    drop_capture(state().streams.get(stream));
    state().streams.remove(stream);
  });
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return run_call("cudaStreamSynchronize", [&] {
    refuse_if_capturing(stream, "the stream captures, it has no work to wait for");
    if (is_legacy(stream)) refuse_while_capturing();
  });
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
  return run_call("cudaStreamQuery", [&] {
    refuse_if_capturing(stream, "the stream captures, it has no work to ask for");
    if (is_legacy(stream)) refuse_while_capturing();
  });
}

cudaError_t cudaDeviceSynchronize() {
  return run_call("cudaDeviceSynchronize", [&] {
    if (state().captures.empty()) return;
    invalidate(state().captures);
    throw CudaError(cudaErrorStreamCaptureUnsupported, "a stream of the device captures");
  });
}

cudaError_t cudaStreamGetFlags(cudaStream_t stream, unsigned* flags) {
  return run_call("cudaStreamGetFlags", [&] {
    require(flags, "flags");
    *flags = find_stream(stream).flags;
  });
}

cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  return run_call("cudaStreamGetPriority", [&] {
    require(priority, "priority");
    *priority = find_stream(stream).priority;
  });
}

cudaError_t cudaStreamGetDevice(cudaStream_t stream, int* device) {
  return run_call("cudaStreamGetDevice", [&] {
    require(device, "device");
    find_stream(stream);
    *device = 0;
  });
}

// ---- events
// ---------------------------------------------------------------------------------------

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  return run_call("cudaEventCreateWithFlags", [&] {
    require(event, "event");
    constexpr unsigned kKnown = cudaEventBlockingSync | cudaEventDisableTiming;
    if ((flags & ~kKnown) != 0) throw ArgumentError("flags is " + std::to_string(flags));
    *event = state().events.add(Event{flags, false, nullptr});
  });
}

cudaError_t cudaEventCreate(cudaEvent_t* event) {
  return cudaEventCreateWithFlags(event, cudaEventDefault);
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  return run_call("cudaEventDestroy", [&] { state().events.remove(event); });
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return run_call("cudaEventRecord", [&] {
    Event& recorded = state().events.get(event);
    recorded.capture = use_stream(stream).capture;
    recorded.recorded = true;
  });
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  if (flags == cudaEventRecordDefault) return cudaEventRecord(event, stream);
  return run_call("cudaEventRecordWithFlags",
                  [&] { throw ArgumentError("flags is " + std::to_string(flags)); });
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  return run_call("cudaEventSynchronize", [&] { refuse_captured(state().events.get(event)); });
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  return run_call("cudaEventQuery", [&] { refuse_captured(state().events.get(event)); });
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned flags) {
  return run_call("cudaStreamWaitEvent", [&] {
    if (flags != cudaEventWaitDefault) throw ArgumentError("flags is " + std::to_string(flags));
    const Stream& stream = use_stream(handle);
    const Event& waited = state().events.get(event);
    if (!waited.recorded || waited.capture == stream.capture) return;
    if (waited.capture == nullptr) {
      stream.capture->invalidated = true;
      throw CudaError(
          cudaErrorStreamCaptureIsolation,
          "a capturing stream waits for an event that was recorded outside of the capture");
    }
    waited.capture->invalidated = true;
    throw CudaError(
        cudaErrorNotSupported,
        "a wait for another capture's event: captures of several streams are not emulated");
  });
}

// Zero, whatever lies between: the emulator does not model time.
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  return run_call("cudaEventElapsedTime", [&] {
    require(milliseconds, "ms");
    for (const cudaEvent_t event : {start, end}) {
      const Event& bound = state().events.get(event);
      if (!bound.recorded || (bound.flags & cudaEventDisableTiming) != 0) {
        throw CudaError(cudaErrorInvalidResourceHandle,
                        "an event was not recorded, or takes no times");
      }
    }
    *milliseconds = 0;
  });
}

// ---- capture
// --------------------------------------------------------------------------------------

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  return run_call("cudaStreamBeginCapture", [&] {
    if (mode < cudaStreamCaptureModeGlobal || mode > cudaStreamCaptureModeRelaxed) {
      throw ArgumentError("mode is " + std::to_string(mode));
    }
    if (is_legacy(handle)) {
      throw CudaError(cudaErrorStreamCaptureUnsupported, "the legacy stream cannot be captured");
    }
    Stream& stream = find_stream(handle);
    if (stream.capture != nullptr) throw CudaError(cudaErrorIllegalState, "the stream captures");
    const bool blocking = stream.flags != cudaStreamNonBlocking;
    stream.capture =
        std::make_shared<Capture>(Capture{mode, blocking, std::this_thread::get_id(), false, {}});
    state().captures.push_back(stream.capture);
  });
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  return run_call("cudaStreamEndCapture", [&] {
    require(graph, "pGraph");
    Stream& stream = find_stream(handle);
    const std::shared_ptr<Capture> capture = stream.capture;
    if (capture == nullptr) {
      throw CudaError(cudaErrorIllegalState, "the stream does not capture");
    }
    if (capture->mode != cudaStreamCaptureModeRelaxed &&
        capture->thread != std::this_thread::get_id()) {
      throw CudaError(cudaErrorStreamCaptureWrongThread, "another thread began the capture");
    }
    drop_capture(stream);
    *graph = nullptr;
    if (capture->invalidated) {
      throw CudaError(cudaErrorStreamCaptureInvalidated, "an earlier call invalidated the capture");
    }
    *graph = add_graph(std::move(capture->nodes));
  });
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  return run_call("cudaStreamIsCapturing", [&] {
    require(status, "pCaptureStatus");
    if (is_legacy(handle) && !blocking_captures().empty()) {
      throw CudaError(cudaErrorStreamCaptureImplicit,
                      "a stream that waits for the legacy stream captures");
    }
    const Stream& stream = find_stream(handle);
    *status = stream.capture == nullptr     ? cudaStreamCaptureStatusNone
              : stream.capture->invalidated ? cudaStreamCaptureStatusInvalidated
                                            : cudaStreamCaptureStatusActive;
  });
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  return run_call("cudaThreadExchangeStreamCaptureMode", [&] {
    require(mode, "mode");
    if (*mode < cudaStreamCaptureModeGlobal || *mode > cudaStreamCaptureModeRelaxed) {
      throw ArgumentError("mode is " + std::to_string(*mode));
    }
    std::swap(*mode, thread_mode);
  });
}
}
