// What goes to Python, as JSON.
#pragma once

#include <cstdint>
#include <string>

#include "core/program.h"
#include "runtime/machine.h"

namespace emulator {

class Json {
 public:
  void begin_object() { open('{'); }
  void end_object() { close('}'); }
  void begin_array() { open('['); }
  void end_array() { close(']'); }
  Json& key(const std::string& name);
  void value(const std::string& text);
  void value(const char* text) { value(std::string(text)); }
  void value(uint64_t number) { raw(std::to_string(number)); }
  void value(int64_t number) { raw(std::to_string(number)); }
  void value(int number) { raw(std::to_string(number)); }
  void value(uint32_t number) { raw(std::to_string(number)); }
  void value(bool truth) { raw(truth ? "true" : "false"); }
  const std::string& text() const { return text_; }

 private:
  void separate();
  void raw(const std::string& text);
  void open(char bracket);
  void close(char bracket);

  std::string text_;
  bool first_ = true;
};

std::string to_json(const LaunchRecord& record);
std::string to_json(const Program& program);

}  // namespace emulator
