// Cuts PTX text into statements, and a statement into tokens, with the line that each began at.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace emulator::ptx {

struct Statement {
  enum class Kind {
    Open,    // {
    Close,   // }
    Label,   // text: the name
    Line,    // .version, .target, .loc, .file: ended by the line's end
    Header,  // .entry / .func ... up to its body's `{` (which follows as Open) or its `;`
    Plain,   // ended by `;`
    End,     // of the text
  };
  Kind kind = Kind::End;
  std::string text;
  int line = 0;
};

class Scanner {
 public:
  explicit Scanner(const std::string& text) : text_(text) {}
  // Throws ParseError where a statement does not end.
  Statement next();

 private:
  void skip_blank();
  void skip_section();
  bool starts_with(const char* word) const;

  const std::string& text_;
  size_t at_ = 0;
  int line_ = 1;
};

// The tokens of one statement: identifiers (with %, $, _ and dots inside), numbers, strings, and
// single characters.
class Tokens {
 public:
  Tokens(const std::string& text, int line);
  bool done() const { return at_ == tokens_.size(); }
  const std::string& peek(size_t ahead = 0) const;
  std::string take();
  bool accept(const std::string& token);
  void expect(const std::string& token);  // ParseError
  int line() const { return line_; }

 private:
  std::vector<std::string> tokens_;
  size_t at_ = 0;
  int line_;
};

bool is_number(const std::string& token);

}  // namespace emulator::ptx
