#include <cstring>
#include <functional>
#include <unordered_map>

#include "common/error.h"
#include "ptx/program.h"
#include "ptx/scanner.h"

namespace emulator::ptx {

namespace {

// Reads an integer or floating literal (PTX ISA, "Constants").
Operand parse_number(const std::string& token, bool negative, int line) {
  Operand operand;
  operand.kind = Operand::Kind::Immediate;
  try {
    size_t used = 0;
    std::string digits = token;
    if (token.size() > 1 && token[0] == '0' &&
        (token[1] == 'f' || token[1] == 'F' || token[1] == 'd' || token[1] == 'D')) {
      const bool single = token[1] == 'f' || token[1] == 'F';
      const uint64_t bits = std::stoull(token.substr(2), &used, 16);
      if (used + 2 != token.size() || token.size() != (single ? 10u : 18u))
        throw std::invalid_argument(token);
      double value;
      if (single) {
        const auto narrow = static_cast<uint32_t>(bits);
        float as_float;
        std::memcpy(&as_float, &narrow, sizeof as_float);
        value = static_cast<double>(as_float);
      } else {
        std::memcpy(&value, &bits, sizeof value);
      }
      if (negative) value = -value;
      operand.is_float = true;
      std::memcpy(&operand.value, &value, sizeof value);
      return operand;
    }
    if (token.find('.') != std::string::npos) {
      double value = std::stod(token, &used);
      if (used != token.size()) throw std::invalid_argument(token);
      if (negative) value = -value;
      operand.is_float = true;
      std::memcpy(&operand.value, &value, sizeof value);
      return operand;
    }
    while (!digits.empty() && (digits.back() == 'U' || digits.back() == 'u')) digits.pop_back();
    uint64_t value;
    if (digits.size() > 2 && digits[0] == '0' && (digits[1] == 'b' || digits[1] == 'B')) {
      value = std::stoull(digits.substr(2), &used, 2);
      used += 2;
    } else {
      value = std::stoull(digits, &used, 0);
    }
    if (used != digits.size()) throw std::invalid_argument(token);
    operand.value = negative ? ~value + 1 : value;
  } catch (const std::logic_error&) {
    throw ParseError(line, "not a number: `" + token + "`");
  }
  return operand;
}

class Parser {
 public:
  explicit Parser(const std::string& text) : scanner_(text) {}
  Module parse();

 private:
  // A `{ }` of a body: names declared in it hide those outside.
  struct Scope {
    int parent;
    std::unordered_map<std::string, std::string>
        names;  // of registers and variables, to unique ones
    std::unordered_map<std::string, std::string> labels;
  };

  void line_directive(const Statement& statement);
  void module_statement(const Statement& statement);
  Variable variable(Tokens& tokens, Space space);
  void initial_values(Tokens& tokens, const Type& type, Variable* variable);
  void header(const Statement& statement);
  void body(Kernel* kernel);
  void declare_registers(Tokens& tokens, Kernel* kernel);
  void instruction(const Statement& statement, Kernel* kernel);
  Operand operand(Tokens& tokens);
  Operand simple_operand(Tokens& tokens);
  Operand address(Tokens& tokens);
  std::string declare(const std::string& name);
  std::string resolve(const std::string& name, bool* is_register);
  void resolve_labels(Kernel* kernel);

  Scanner scanner_;
  Module module_;
  std::vector<Scope> scopes_;
  int scope_ = -1;
  int unique_ = 0;
  std::unordered_map<std::string, int> register_ranges_;  // %r<100>: prefix to count
  std::unordered_map<std::string, bool> registers_;       // unique names
  std::vector<int> instruction_scopes_;
  Position position_;
};

Module Parser::parse() {
  bool versioned = false;
  while (true) {
    const Statement statement = scanner_.next();
    if (statement.kind == Statement::Kind::End) break;
    if (statement.kind == Statement::Kind::Line) {
      line_directive(statement);
      versioned = versioned || !module_.version.empty();
    } else if (statement.kind == Statement::Kind::Header) {
      header(statement);
    } else if (statement.kind == Statement::Kind::Plain) {
      module_statement(statement);
    } else {
      throw ParseError(statement.line, "a brace or a label outside of a kernel");
    }
  }
  if (!versioned) throw ParseError(1, "no .version: this is not PTX");
  return std::move(module_);
}

void Parser::line_directive(const Statement& statement) {
  Tokens tokens(statement.text, statement.line);
  const std::string directive = tokens.take();
  const auto number = [&] {
    return static_cast<int>(parse_number(tokens.take(), false, statement.line).value);
  };
  if (directive == ".version") {
    module_.version = tokens.take();
  } else if (directive == ".target") {
    module_.target = tokens.take();
  } else if (directive == ".address_size") {
    if (number() != 64) throw ParseError(statement.line, "only 64-bit addresses");
  } else if (directive == ".file") {
    const int index = number();
    std::string name = tokens.take();
    if (name.size() >= 2 && name.front() == '"') name = name.substr(1, name.size() - 2);
    module_.files[index] = name;
  } else {
    position_.file = number();
    position_.cuda_line = number();
  }
}

// A variable after its state space: alignment, vector and type, name, dimensions, initial values.
Variable Parser::variable(Tokens& tokens, Space space) {
  Variable variable;
  variable.space = space;
  variable.line = tokens.line();
  Type type;
  bool typed = false;
  int vector = 1;
  while (true) {
    if (tokens.peek().empty() || tokens.peek()[0] != '.') break;
    const std::string directive = tokens.take();
    if (directive == ".align") {
      variable.alignment = parse_number(tokens.take(), false, tokens.line()).value;
    } else if (directive == ".attribute") {
      tokens.expect("(");
      while (!tokens.accept(")")) tokens.take();
    } else if (directive == ".v2" || directive == ".v4") {
      vector = directive[2] - '0';
    } else if (directive == ".ptr" || directive == ".global" || directive == ".shared" ||
               directive == ".const" || directive == ".local") {
      // of a pointer parameter: says where it points, which the address itself tells
    } else if (parse_type(directive.substr(1), &type)) {
      typed = true;
    } else {
      throw ParseError(tokens.line(), "unknown in a variable's declaration: `" + directive + "`");
    }
  }
  if (!typed) throw ParseError(tokens.line(), "a variable without a type");
  const auto element = static_cast<uint64_t>(type.bytes() * vector);
  if (variable.alignment < element && variable.alignment == 1) variable.alignment = element;
  variable.name = tokens.take();
  variable.bytes = element;
  while (tokens.accept("[")) {
    if (tokens.accept("]")) {
      variable.bytes = 0;
    } else {
      variable.bytes *= parse_number(tokens.take(), false, tokens.line()).value;
      tokens.expect("]");
    }
  }
  if (tokens.accept("=")) initial_values(tokens, type, &variable);
  return variable;
}

void Parser::initial_values(Tokens& tokens, const Type& type, Variable* variable) {
  const auto element = static_cast<size_t>(type.bytes());
  variable->initial.reserve(variable->bytes);
  const auto append = [&](Operand value) {
    if (value.is_float && type.bits == 32) {
      double wide;
      std::memcpy(&wide, &value.value, sizeof wide);
      const auto narrow = static_cast<float>(wide);
      uint32_t bits;
      std::memcpy(&bits, &narrow, sizeof bits);
      value.value = bits;
    }
    for (size_t i = 0; i < element; ++i)
      variable->initial.push_back(static_cast<uint8_t>(value.value >> (8 * i)));
  };
  const std::function<void()> one = [&] {
    if (tokens.accept("{")) {
      while (!tokens.accept("}")) {
        one();
        tokens.accept(",");
      }
      return;
    }
    const bool negative = tokens.accept("-");
    if (!is_number(tokens.peek())) {
      throw Unsupported(tokens.line(), "an address as an initial value: `" + tokens.peek() + "`");
    }
    append(parse_number(tokens.take(), negative, tokens.line()));
  };
  one();
  if (variable->bytes == 0) variable->bytes = variable->initial.size();
  if (variable->initial.size() > variable->bytes) {
    throw ParseError(tokens.line(), "more initial values than `" + variable->name + "` holds");
  }
  variable->initial.resize(variable->bytes, 0);
}

void Parser::module_statement(const Statement& statement) {
  Tokens tokens(statement.text, statement.line);
  bool is_extern = false;
  while (true) {
    const std::string directive = tokens.take();
    if (directive == ".extern" || directive == ".visible" || directive == ".weak" ||
        directive == ".common") {
      is_extern = is_extern || directive == ".extern";
      continue;
    }
    if (directive == ".pragma") return;
    Space space;
    if (directive == ".global") {
      space = Space::Global;
    } else if (directive == ".const") {
      space = Space::Constant;
    } else if (directive == ".shared") {
      space = Space::Shared;
    } else {
      throw ParseError(statement.line, "unknown outside of a kernel: `" + directive + "`");
    }
    do {
      Variable v = variable(tokens, space);
      v.is_extern = is_extern;
      module_.variables.push_back(std::move(v));
    } while (tokens.accept(","));
    return;
  }
}

void Parser::header(const Statement& statement) {
  Tokens tokens(statement.text, statement.line);
  Kernel kernel;
  kernel.line = statement.line;
  bool is_extern = false;
  while (true) {
    const std::string directive = tokens.take();
    if (directive == ".extern") is_extern = true;
    if (directive == ".entry") break;
    if (directive == ".func") {
      kernel.is_entry = false;
      break;
    }
  }
  if (!kernel.is_entry && tokens.accept("(")) {
    while (!tokens.accept(")")) tokens.take();
  }
  kernel.name = tokens.take();
  if (tokens.accept("(")) {
    while (!tokens.accept(")")) {
      if (tokens.accept(",")) continue;
      tokens.expect(".param");
      kernel.parameters.push_back(variable(tokens, Space::Parameter));
    }
  }
  const auto three = [&](std::array<int, 3>* into) {
    *into = {1, 1, 1};
    for (int i = 0; i < 3; ++i) {
      (*into)[static_cast<size_t>(i)] =
          static_cast<int>(parse_number(tokens.take(), false, tokens.line()).value);
      if (!tokens.accept(",")) break;
    }
  };
  while (!tokens.done()) {
    const std::string directive = tokens.take();
    if (directive == ".maxntid") {
      three(&kernel.max_threads);
    } else if (directive == ".reqntid") {
      three(&kernel.required_threads);
    } else if (directive == ".reqnctapercluster") {
      std::array<int, 3> cluster;
      three(&cluster);
      if (cluster[0] * cluster[1] * cluster[2] != 1)
        throw Unsupported(statement.line, "clusters of more than one block");
    } else if (!directive.empty() && directive[0] == '.') {
      while (!tokens.done() && tokens.peek()[0] != '.')
        tokens.take();  // .minnctapersm 2, .noreturn ...
    } else {
      throw ParseError(statement.line, "unknown in a kernel's header: `" + directive + "`");
    }
  }
  if (is_extern) return;
  const Statement open = scanner_.next();
  if (open.kind != Statement::Kind::Open) {
    if (!kernel.is_entry) return;  // a declaration
    throw ParseError(open.line, "kernel `" + kernel.name + "` has no body");
  }
  body(&kernel);
  module_.kernels.push_back(std::move(kernel));
}

void Parser::body(Kernel* kernel) {
  scopes_.assign(1, Scope{-1, {}, {}});
  scope_ = 0;
  register_ranges_.clear();
  registers_.clear();
  instruction_scopes_.clear();
  position_ = Position{};
  while (true) {
    const Statement statement = scanner_.next();
    switch (statement.kind) {
      case Statement::Kind::Open:
        scopes_.push_back(Scope{scope_, {}, {}});
        scope_ = static_cast<int>(scopes_.size()) - 1;
        break;
      case Statement::Kind::Close:
        scope_ = scopes_[static_cast<size_t>(scope_)].parent;
        if (scope_ < 0) {
          resolve_labels(kernel);
          return;
        }
        break;
      case Statement::Kind::Label: {
        const std::string key =
            scope_ == 0 ? statement.text : statement.text + "@" + std::to_string(++unique_);
        auto& labels = scopes_[static_cast<size_t>(scope_)].labels;
        if (!labels.emplace(statement.text, key).second) {
          throw ParseError(statement.line, "label `" + statement.text + "` is there already");
        }
        kernel->labels[key] = static_cast<int>(kernel->instructions.size());
        break;
      }
      case Statement::Kind::Line:
        line_directive(statement);
        break;
      case Statement::Kind::Plain:
        instruction(statement, kernel);
        break;
      case Statement::Kind::Header:
        throw ParseError(statement.line, "a kernel inside of a kernel");
      case Statement::Kind::End:
        throw ParseError(statement.line, "kernel `" + kernel->name + "` does not end");
    }
  }
}

std::string Parser::declare(const std::string& name) {
  auto& names = scopes_[static_cast<size_t>(scope_)].names;
  const std::string unique = scope_ == 0 ? name : name + "@" + std::to_string(++unique_);
  names[name] = unique;
  return unique;
}

std::string Parser::resolve(const std::string& name, bool* is_register) {
  for (int s = scope_; s >= 0; s = scopes_[static_cast<size_t>(s)].parent) {
    const auto& names = scopes_[static_cast<size_t>(s)].names;
    const auto found = names.find(name);
    if (found != names.end()) {
      *is_register = registers_.count(found->second) != 0;
      return found->second;
    }
  }
  // A special register, or a symbol of the module.
  *is_register = name[0] == '%' || name == "WARP_SZ";
  return name;
}

void Parser::declare_registers(Tokens& tokens, Kernel* kernel) {
  Type type;
  const std::string text = tokens.take();
  if (text.empty() || !parse_type(text.substr(1), &type)) {
    throw ParseError(tokens.line(), "not a register's type: `" + text + "`");
  }
  do {
    const std::string name = tokens.take();
    uint64_t count = 0;
    const bool range = tokens.accept("<");
    if (range) {
      count = parse_number(tokens.take(), false, tokens.line()).value;
      tokens.expect(">");
      if (count > 1u << 20) throw ParseError(tokens.line(), "too many registers: `" + name + "`");
    }
    for (uint64_t i = 0; i < (range ? count : 1); ++i) {
      const std::string unique = declare(range ? name + std::to_string(i) : name);
      registers_[unique] = true;
      kernel->registers.push_back({unique, type});
    }
  } while (tokens.accept(","));
}

Operand Parser::simple_operand(Tokens& tokens) {
  Operand operand;
  if (tokens.accept("!")) {
    operand = simple_operand(tokens);
    operand.negated = true;
    return operand;
  }
  const bool negative = tokens.accept("-");
  const std::string token = tokens.take();
  if (is_number(token)) return parse_number(token, negative, tokens.line());
  if (negative) throw ParseError(tokens.line(), "a minus before `" + token + "`");
  if (token == "_") return operand;
  bool is_register = false;
  operand.name = resolve(token, &is_register);
  operand.kind = is_register ? Operand::Kind::Register : Operand::Kind::Symbol;
  if (!is_register && tokens.peek() == "+" && is_number(tokens.peek(1))) {
    tokens.take();
    operand.offset = static_cast<int64_t>(parse_number(tokens.take(), false, tokens.line()).value);
  }
  return operand;
}

Operand Parser::address(Tokens& tokens) {
  Operand operand;
  operand.kind = Operand::Kind::Address;
  const Operand base = simple_operand(tokens);
  if (base.kind == Operand::Kind::Immediate) {
    operand.offset = static_cast<int64_t>(base.value);
  } else {
    operand.name = base.name;
    operand.offset = base.offset;
    // `negated` of an address: its base is a register.
    operand.negated = base.kind == Operand::Kind::Register;
  }
  while (tokens.peek() == "+" || tokens.peek() == "-") {
    bool negative = tokens.take() == "-";
    if (tokens.accept("-")) negative = !negative;
    operand.offset +=
        static_cast<int64_t>(parse_number(tokens.take(), negative, tokens.line()).value);
  }
  while (tokens.accept(",")) operand.elements.push_back(this->operand(tokens));
  tokens.expect("]");
  return operand;
}

Operand Parser::operand(Tokens& tokens) {
  Operand result;
  if (tokens.accept("[")) {
    result = address(tokens);
  } else if (tokens.accept("{")) {
    result.kind = Operand::Kind::Vector;
    while (!tokens.accept("}")) {
      result.elements.push_back(operand(tokens));
      tokens.accept(",");
    }
  } else if (tokens.accept("(")) {  // the arguments of a call
    result.kind = Operand::Kind::Vector;
    while (!tokens.accept(")")) {
      result.elements.push_back(operand(tokens));
      tokens.accept(",");
    }
  } else {
    result = simple_operand(tokens);
  }
  if (tokens.accept("|")) result.second.push_back(simple_operand(tokens));
  return result;
}

void Parser::instruction(const Statement& statement, Kernel* kernel) {
  Tokens tokens(statement.text, statement.line);
  if (tokens.done()) return;
  const std::string& first = tokens.peek();
  if (first[0] == '.') {
    const std::string directive = tokens.take();
    if (directive == ".reg") {
      declare_registers(tokens, kernel);
    } else if (directive == ".shared" || directive == ".local" || directive == ".param") {
      const Space space = directive == ".shared"  ? Space::Shared
                          : directive == ".local" ? Space::Local
                                                  : Space::Parameter;
      do {
        Variable v = variable(tokens, space);
        v.name = declare(v.name);
        kernel->variables.push_back(std::move(v));
      } while (tokens.accept(","));
    } else if (directive == ".pragma") {
      return;
    } else {
      throw Unsupported(statement.line, directive);
    }
    return;
  }
  Instruction result;
  result.text = statement.text;
  while (!result.text.empty() && result.text.back() == ' ') result.text.pop_back();
  result.at = position_;
  result.at.ptx_line = statement.line;
  if (tokens.accept("@")) {
    result.guard_negated = tokens.accept("!");
    bool is_register = false;
    const std::string name = tokens.take();
    result.guard = resolve(name, &is_register);
    if (!is_register)
      throw ParseError(statement.line, "the guard `" + name + "` is not a register");
  }
  const std::string opcode = tokens.take();
  size_t dot = opcode.find('.');
  result.root = opcode.substr(0, dot);
  while (dot != std::string::npos) {
    const size_t end = opcode.find('.', dot + 1);
    result.modifiers.push_back(
        opcode.substr(dot + 1, end == std::string::npos ? end : end - dot - 1));
    dot = end;
  }
  while (!tokens.done()) {
    result.operands.push_back(operand(tokens));
    if (!tokens.done()) tokens.expect(",");
  }
  kernel->instructions.push_back(std::move(result));
  instruction_scopes_.push_back(scope_);
}

// A label may follow the branch to it: only now all of a scope are known.
void Parser::resolve_labels(Kernel* kernel) {
  for (size_t i = 0; i < kernel->instructions.size(); ++i) {
    for (Operand& operand : kernel->instructions[i].operands) {
      if (operand.kind != Operand::Kind::Symbol) continue;
      for (int s = instruction_scopes_[i]; s >= 0; s = scopes_[static_cast<size_t>(s)].parent) {
        const auto& labels = scopes_[static_cast<size_t>(s)].labels;
        const auto found = labels.find(operand.name);
        if (found != labels.end()) {
          operand.name = found->second;
          break;
        }
      }
    }
  }
}

}  // namespace

Module parse(const std::string& text) {
  return Parser(text).parse();
}

}  // namespace emulator::ptx
