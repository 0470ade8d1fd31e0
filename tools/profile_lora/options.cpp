#include "profile_lora/options.h"

#include <charconv>
#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>

namespace fused_lora::profile {

using kernels::Device;
using kernels::DType;

const char* const kUsage =
    R"(profile_lora: a fused LoRA linear, forward and backward, for ncu and for timing

  --rows N  --in N  --out N  --rank N     the shape (8192, 4096, 4096, 16)
  --dtype bf16|fp16|fp32                  of x, W, y (bf16)
  --adapters same|fp32|rounded            of A and B: x's dtype, fp32 masters, masters as autocast rounds them
  --tf32                                  fp32 products on tf32 matrix units
  --dropout P                             (0.1)
  --bias                                  add one
  --conv1d                                W stored in×out
  --base                                  add to what a frozen layer gave, without its product
  --only forward|backward
  --warm-up N  --iterations N             (10, 50); 0 and 1 suit ncu
  --plan DEVICE                           print the plan for a100, h100, l4, rtx4090, b200 or rtx5090 and run nothing

Times are medians over the iterations, by CUDA events, with the L2 cache written over in between.
)";

namespace {

[[noreturn]] void fail(const std::string& message) {
  throw std::invalid_argument(message);
}

int64_t number(const std::string& option, const char* text, int64_t least) {
  int64_t value = 0;
  const char* end = text + std::strlen(text);
  const auto [stop, error] = std::from_chars(text, end, value);
  if (error != std::errc() || stop != end || value < least) {
    fail(option + " takes a whole number of at least " + std::to_string(least) + ", got '" + text +
         "'");
  }
  return value;
}

double probability(const std::string& option, const char* text) {
  char* stop = nullptr;
  const double value = std::strtod(text, &stop);
  if (stop == text || *stop != '\0' || !(value >= 0.0 && value <= 1.0)) {
    fail(option + " takes a number from 0 to 1, got '" + text + "'");
  }
  return value;
}

template <typename T>
T one_of(const std::string& option, const std::string& text,
         const std::map<std::string, T>& known) {
  const auto found = known.find(text);
  if (found != known.end()) return found->second;
  std::string names;
  for (const auto& [name, value] : known) names += (names.empty() ? "" : ", ") + name;
  fail(option + " takes one of " + names + ", got '" + text + "'");
}

}  // namespace

Options parse(int count, char** arguments) {
  Options options;
  options.problem.rows = 8192;
  options.problem.in_features = options.problem.out_features = 4096;
  options.problem.rank = 16;
  options.problem.dtype = DType::kBFloat16;
  std::string adapters = "same";
  for (int i = 1; i < count; ++i) {
    const std::string option = arguments[i];
    const auto value = [&]() -> const char* {
      if (i + 1 >= count) fail(option + " takes a value");
      return arguments[++i];
    };
    if (option == "--rows") {
      options.problem.rows = number(option, value(), 0);
    } else if (option == "--in") {
      options.problem.in_features = number(option, value(), 1);
    } else if (option == "--out") {
      options.problem.out_features = number(option, value(), 1);
    } else if (option == "--rank") {
      options.problem.rank = number(option, value(), 1);
    } else if (option == "--dtype") {
      options.problem.dtype = one_of<DType>(
          option, value(),
          {{"bf16", DType::kBFloat16}, {"fp16", DType::kFloat16}, {"fp32", DType::kFloat32}});
    } else if (option == "--adapters") {
      adapters = one_of<std::string>(option, value(),
                                     {{"same", "same"}, {"fp32", "fp32"}, {"rounded", "rounded"}});
    } else if (option == "--tf32") {
      options.problem.allow_tf32 = true;
    } else if (option == "--dropout") {
      options.dropout = probability(option, value());
    } else if (option == "--bias") {
      options.bias = true;
    } else if (option == "--conv1d") {
      options.weight_transposed = true;
    } else if (option == "--base") {
      options.base = true;
    } else if (option == "--only") {
      const bool forward = one_of<bool>(option, value(), {{"forward", true}, {"backward", false}});
      options.forward = forward;
      options.backward = !forward;
    } else if (option == "--warm-up") {
      options.warm_up = static_cast<int>(number(option, value(), 0));
    } else if (option == "--iterations") {
      options.iterations = static_cast<int>(number(option, value(), 1));
    } else if (option == "--plan") {
      options.plan_for = value();
    } else {
      fail("unknown option '" + option + "'");
    }
  }
  const bool half = options.problem.dtype != DType::kFloat32;
  options.problem.adapter_dtype = adapters == "same" ? options.problem.dtype : DType::kFloat32;
  options.problem.round_adapters = half && adapters == "rounded";
  return options;
}

Device device_named(const std::string& name) {
  // The shared memory of an SM less the 1 KiB that the driver keeps of it.
  constexpr int kKib = 1024;
  return one_of<Device>("--plan", name,
                        {{"a100", {80, 108, 163 * kKib}},
                         {"l4", {89, 58, 99 * kKib}},
                         {"rtx4090", {89, 128, 99 * kKib}},
                         {"h100", {90, 132, 227 * kKib}},
                         {"b200", {100, 148, 227 * kKib}},
                         {"rtx5090", {120, 170, 99 * kKib}}});
}

}  // namespace fused_lora::profile
