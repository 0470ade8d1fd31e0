// What stops a run: each becomes a Python exception of the same name.
#pragma once

#include <stdexcept>
#include <string>

namespace emulator {

// The base of all: also an emulator limit that a program ran into.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
  virtual const char* kind() const { return "EmulatorError"; }
};

// The PTX text does not parse.
class ParseError : public Error {
 public:
  ParseError(int line, const std::string& what)
      : Error("PTX line " + std::to_string(line) + ": " + what) {}
  const char* kind() const override { return "ParseError"; }
};

// The PTX is well formed, but uses something that the emulator does not model.
class Unsupported : public Error {
 public:
  Unsupported(int line, const std::string& what)
      : Error("PTX line " + std::to_string(line) + ": unsupported: " + what) {}
  const char* kind() const override { return "Unsupported"; }
};

// An argument of a call is wrong: an unknown kernel, a size, a buffer, a limit of the device.
class ArgumentError : public Error {
 public:
  using Error::Error;
  const char* kind() const override { return "ArgumentError"; }
};

}  // namespace emulator
