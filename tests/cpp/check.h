// What the C++ tests need of a framework: named tests, and checks that tell their values.
#pragma once

#include <cstdio>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace fused_lora::testing {

struct Test {
  const char* name;
  void (*body)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> registered;
  return registered;
}

struct Registration {
  Registration(const char* name, void (*body)()) { tests().push_back({name, body}); }
};

class Failure : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// What a check within this scope was about; the innermost last.
class Context {
 public:
  explicit Context(std::string text) { stack().push_back(std::move(text)); }
  ~Context() { stack().pop_back(); }
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  static std::vector<std::string>& stack() {
    static std::vector<std::string> texts;
    return texts;
  }
};

[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
  std::ostringstream text;
  text << file << ":" << line << ": " << what;
  for (const std::string& context : Context::stack()) text << "\n    " << context;
  throw Failure(text.str());
}

template <typename A, typename B>
void check_pair(bool holds, const char* expression, const A& a, const B& b, const char* file,
                int line) {
  if (holds) return;
  std::ostringstream text;
  text << expression << ", with " << a << " and " << b;
  fail(file, line, text.str());
}

inline int run_all() {
  int failures = 0;
  for (const Test& test : tests()) {
    try {
      test.body();
      std::printf("passed  %s\n", test.name);
    } catch (const std::exception& error) {
      ++failures;
      std::printf("FAILED  %s\n  %s\n", test.name, error.what());
    }
    Context::stack().clear();
  }
  std::printf("%zu tests, %d failures\n", tests().size(), failures);
  return failures == 0 && !tests().empty() ? 0 : 1;
}

}  // namespace fused_lora::testing

#define TEST(name)                                                                 \
  static void name();                                                              \
  static const ::fused_lora::testing::Registration registered_##name(#name, name); \
  static void name()
#define CHECK(condition)                                                           \
  do {                                                                             \
    if (!(condition)) ::fused_lora::testing::fail(__FILE__, __LINE__, #condition); \
  } while (false)
#define CHECK_EQ(a, b) \
  ::fused_lora::testing::check_pair((a) == (b), #a " == " #b, a, b, __FILE__, __LINE__)
#define CHECK_LE(a, b) \
  ::fused_lora::testing::check_pair((a) <= (b), #a " <= " #b, a, b, __FILE__, __LINE__)
