// The device code that nvcc puts into a host object: PTX to run, machine code to read register
// counts from.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace emulator {

// What code was compiled for. sm_90a is specific to one compute capability, sm_100f to a family:
// the same major, and no lower minor. Others run on every later device too (PTX ISA, ".target").
struct Architecture {
  int number = 0;     // 10 · major + minor
  char specific = 0;  // 'a', 'f' or none

  bool runs_on(int major, int minor) const;
  std::string name() const;  // "sm_90a"
};

class Fatbin {
 public:
  struct Ptx {
    Architecture architecture;
    std::string text;
  };

  // `wrapper` is what __cudaRegisterFatBinary gets. Throws CudaError(cudaErrorInvalidKernelImage).
  explicit Fatbin(const void* wrapper);

  // The newest PTX that runs on the device. Throws CudaError(cudaErrorNoKernelImageForDevice).
  const Ptx& ptx_for(int major, int minor) const;

  // A thread's registers by the compiler's report in the machine code for the device, or for the
  // nearest older device, or else for the nearest newer one; 0: there is none, or it lacks the
  // kernel.
  int registers(const std::string& kernel, int major, int minor) const;

 private:
  struct Cubin {
    Architecture architecture;
    std::map<std::string, int> registers;  // by kernel
  };
  void add(const uint8_t* entry, const uint8_t* end, const uint8_t** next);

  std::vector<Ptx> ptx_;
  std::vector<Cubin> cubins_;
};

}  // namespace emulator
