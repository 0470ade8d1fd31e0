#include "ptx/scanner.h"

#include <cctype>
#include <cstring>

#include "common/error.h"

namespace emulator::ptx {

namespace {

bool is_identifier_character(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_' || c == '$' || c == '%';
}

std::string shorten(const std::string& text) {
  return text.size() <= 80 ? text : text.substr(0, 77) + "...";
}

}  // namespace

void Scanner::skip_blank() {
  while (at_ < text_.size()) {
    if (text_[at_] == '\n') {
      ++line_;
      ++at_;
    } else if (std::isspace(static_cast<unsigned char>(text_[at_])) != 0) {
      ++at_;
    } else if (text_.compare(at_, 2, "//") == 0) {
      while (at_ < text_.size() && text_[at_] != '\n') ++at_;
    } else if (text_.compare(at_, 2, "/*") == 0) {
      const int line = line_;
      const size_t end = text_.find("*/", at_ + 2);
      if (end == std::string::npos) throw ParseError(line, "a comment does not end");
      for (; at_ < end + 2; ++at_) line_ += text_[at_] == '\n';
    } else {
      return;
    }
  }
}

bool Scanner::starts_with(const char* word) const {
  const size_t n = std::strlen(word);
  return text_.compare(at_, n, word) == 0 &&
         (at_ + n == text_.size() || !is_identifier_character(text_[at_ + n]));
}

// Debug sections hold no code: `.section .debug_str { ... }`.
void Scanner::skip_section() {
  const int line = line_;
  int depth = 0;
  for (; at_ < text_.size(); ++at_) {
    if (text_[at_] == '\n') ++line_;
    if (text_[at_] == '{') ++depth;
    if (text_[at_] == '}' && --depth == 0) {
      ++at_;
      return;
    }
  }
  throw ParseError(line, "a .section does not end");
}

Statement Scanner::next() {
  skip_blank();
  while (at_ < text_.size() && starts_with(".section")) {
    skip_section();
    skip_blank();
  }
  Statement statement;
  statement.line = line_;
  if (at_ >= text_.size()) return statement;
  if (text_[at_] == '{' || text_[at_] == '}') {
    statement.kind = text_[at_] == '{' ? Statement::Kind::Open : Statement::Kind::Close;
    ++at_;
    return statement;
  }
  for (const char* directive : {".loc", ".file", ".version", ".target", ".address_size"}) {
    if (starts_with(directive)) {
      const size_t end = std::min(text_.find('\n', at_), text_.size());
      statement.kind = Statement::Kind::Line;
      statement.text = text_.substr(at_, end - at_);
      const size_t comment = statement.text.find("//");
      if (comment != std::string::npos) statement.text.resize(comment);
      at_ = end;
      return statement;
    }
  }
  // A label: an identifier and a colon, which is not the `::` of a modifier.
  size_t end = at_;
  while (end < text_.size() && is_identifier_character(text_[end])) ++end;
  if (end > at_) {
    size_t colon = end;
    while (colon < text_.size() && (text_[colon] == ' ' || text_[colon] == '\t')) ++colon;
    if (colon < text_.size() && text_[colon] == ':' &&
        (colon + 1 == text_.size() || text_[colon + 1] != ':')) {
      statement.kind = Statement::Kind::Label;
      statement.text = text_.substr(at_, end - at_);
      at_ = colon + 1;
      return statement;
    }
  }
  // Everything else ends with `;`, or, a kernel's header, before its body.
  bool header = false, string = false;
  int depth = 0;
  while (true) {
    if (at_ >= text_.size()) {
      throw ParseError(statement.line,
                       "a statement does not end: `" + shorten(statement.text) + "`");
    }
    if (!string) {
      const int before = line_;
      if (text_.compare(at_, 2, "//") == 0 || text_.compare(at_, 2, "/*") == 0) {
        skip_blank();
        statement.text += ' ';
        continue;
      }
      line_ = before;
    }
    const char c = text_[at_];
    if (c == '"') string = !string;
    if (c == '\n') {
      ++line_;
      string = false;
    }
    if (!string) {
      if (c == '(') ++depth;
      if (c == ')') --depth;
      if (c == '.' && (starts_with(".entry") || starts_with(".func"))) header = true;
      if (c == '{' && header && depth == 0) {
        statement.kind = Statement::Kind::Header;
        return statement;
      }
      if (c == ';') {
        ++at_;
        statement.kind = header ? Statement::Kind::Header : Statement::Kind::Plain;
        return statement;
      }
    }
    statement.text += c == '\n' || c == '\t' ? ' ' : c;
    ++at_;
  }
}

Tokens::Tokens(const std::string& text, int line) : line_(line) {
  size_t i = 0;
  while (i < text.size()) {
    const char c = text[i];
    if (std::isspace(static_cast<unsigned char>(c)) != 0) {
      ++i;
      continue;
    }
    size_t end = i + 1;
    if (c == '"') {
      end = std::min(text.find('"', i + 1), text.size() - 1) + 1;
    } else if (std::isdigit(static_cast<unsigned char>(c)) != 0) {
      // 1.5e+3 is one token; so are 0f3F800000 and 0x10U.
      const bool plain = !(c == '0' && i + 1 < text.size() &&
                           std::isalpha(static_cast<unsigned char>(text[i + 1])));
      while (end < text.size() &&
             (std::isalnum(static_cast<unsigned char>(text[end])) != 0 || text[end] == '.' ||
              (plain && (text[end] == '+' || text[end] == '-') &&
               (text[end - 1] == 'e' || text[end - 1] == 'E')))) {
        ++end;
      }
    } else if (is_identifier_character(c) ||
               (c == '.' && end < text.size() && is_identifier_character(text[end]))) {
      // Opcodes and special registers have dots inside, and modifiers have `::`.
      while (
          end < text.size() &&
          (is_identifier_character(text[end]) ||
           (text[end] == '.' && end + 1 < text.size() && is_identifier_character(text[end + 1])) ||
           (text.compare(end, 2, "::") == 0) || (text[end] == ':' && text[end - 1] == ':'))) {
        ++end;
      }
    }
    tokens_.push_back(text.substr(i, end - i));
    i = end;
  }
}

const std::string& Tokens::peek(size_t ahead) const {
  static const std::string kNone;
  return at_ + ahead < tokens_.size() ? tokens_[at_ + ahead] : kNone;
}

std::string Tokens::take() {
  if (done()) throw ParseError(line_, "the statement ends too early");
  return tokens_[at_++];
}

bool Tokens::accept(const std::string& token) {
  if (peek() != token) return false;
  ++at_;
  return true;
}

void Tokens::expect(const std::string& token) {
  if (!accept(token))
    throw ParseError(line_, "expected `" + token + "` before `" + shorten(peek()) + "`");
}

bool is_number(const std::string& token) {
  return !token.empty() && std::isdigit(static_cast<unsigned char>(token[0])) != 0;
}

}  // namespace emulator::ptx
