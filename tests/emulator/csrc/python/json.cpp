#include "python/json.h"

#include <cstdio>

namespace emulator {

void Json::separate() {
  if (!first_) text_ += ',';
  first_ = false;
}

void Json::raw(const std::string& text) {
  separate();
  text_ += text;
}

void Json::open(char bracket) {
  separate();
  text_ += bracket;
  first_ = true;
}

void Json::close(char bracket) {
  text_ += bracket;
  first_ = false;
}

Json& Json::key(const std::string& name) {
  value(name);
  text_ += ':';
  first_ = true;
  return *this;
}

void Json::value(const std::string& text) {
  separate();
  text_ += '"';
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      text_ += '\\';
      text_ += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char escape[8];
      std::snprintf(escape, sizeof escape, "\\u%04x", c);
      text_ += escape;
    } else {
      text_ += c;
    }
  }
  text_ += '"';
}

namespace {

template <class T>
void triple(Json& json, const char* name, const T* values) {
  json.key(name).begin_array();
  for (int i = 0; i < 3; ++i) json.value(values[i]);
  json.end_array();
}

void finding(Json& json, const Finding& f) {
  json.begin_object();
  json.key("check").value(name_of(f.check));
  json.key("message").value(f.message);
  json.key("kernel").value(f.kernel);
  json.key("ptx_line").value(f.ptx_line);
  json.key("ptx_text").value(f.ptx_text);
  json.key("cuda_file").value(f.cuda_file);
  json.key("cuda_line").value(f.cuda_line);
  triple(json, "block", f.block);
  triple(json, "thread", f.thread);
  json.key("warp").value(f.warp);
  json.key("lane").value(f.lane);
  json.key("buffer").value(f.buffer);
  json.key("offset").value(f.offset);
  json.key("count").value(f.count);
  json.end_object();
}

}  // namespace

const char* name_of(Check check) {
  switch (check) {
    case Check::OutOfBounds:
      return "out of bounds";
    case Check::Misaligned:
      return "misaligned";
    case Check::Uninitialised:
      return "uninitialised";
    case Check::Race:
      return "race";
    case Check::Asynchronous:
      return "asynchronous";
    case Check::Proxy:
      return "proxy";
    case Check::Barrier:
      return "barrier";
    case Check::Deadlock:
      return "deadlock";
    case Check::Convergence:
      return "convergence";
    case Check::Assertion:
      return "assertion";
  }
  return "";
}

std::string to_json(const LaunchRecord& record) {
  Json json;
  json.begin_object();
  json.key("kernel").value(record.kernel);
  triple(json, "grid", record.shape.grid);
  triple(json, "block", record.shape.block);
  json.key("dynamic_shared_bytes").value(record.shape.dynamic_shared_bytes);
  json.key("completed").value(record.completed);
  json.key("findings").begin_array();
  for (const Finding& f : record.findings) finding(json, f);
  json.end_array();
  json.key("steps").begin_array();
  for (const StepCounters& s : record.counters.steps) {
    if (s.executed == 0) continue;
    json.begin_object();
    json.key("opcode").value(record.counters.opcodes[static_cast<size_t>(s.opcode)]);
    json.key("ptx_line").value(s.ptx_line);
    json.key("cuda_line").value(s.cuda_line);
    json.key("executed").value(s.executed);
    json.key("lanes").value(s.lanes);
    json.key("requests").value(s.requests);
    json.key("sectors").value(s.sectors);
    json.key("ideal_sectors").value(s.ideal_sectors);
    json.key("shared_requests").value(s.shared_requests);
    json.key("wavefronts").value(s.wavefronts);
    json.key("ideal_wavefronts").value(s.ideal_wavefronts);
    json.end_object();
  }
  json.end_array();
  json.key("buffers").begin_array();
  for (const BufferCounters& b : record.counters.buffers) {
    json.begin_object();
    json.key("name").value(b.name);
    json.key("bytes_read").value(b.bytes_read);
    json.key("bytes_written").value(b.bytes_written);
    json.key("unique_read").value(b.unique_read);
    json.key("unique_written").value(b.unique_written);
    json.end_object();
  }
  json.end_array();
  json.end_object();
  return json.text();
}

std::string to_json(const Program& program) {
  Json json;
  json.begin_object();
  json.key("name").value(program.name);
  json.key("parameters").begin_array();
  for (const Parameter& p : program.parameters) {
    json.begin_object();
    json.key("name").value(p.name);
    json.key("offset").value(p.offset);
    json.key("bytes").value(p.bytes);
    json.end_object();
  }
  json.end_array();
  json.key("parameter_bytes").value(program.parameter_bytes);
  json.key("static_shared_bytes").value(program.static_shared_bytes);
  json.key("local_bytes").value(program.local_bytes);
  json.key("registers").value(program.registers);
  json.key("opcodes").begin_array();
  for (const std::string& opcode : program.opcodes) json.value(opcode);
  json.end_array();
  json.end_object();
  return json.text();
}

}  // namespace emulator
