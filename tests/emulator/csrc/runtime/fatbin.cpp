#include "runtime/fatbin.h"

#include <elf.h>
#include <fatbinary_section.h>

#include <algorithm>
#include <cctype>
#include <cstring>

#include "runtime/errors.h"

namespace emulator {

namespace {

constexpr uint32_t kContainerMagic = 0xBA55ED50;

// Neither structure is documented; nvcc 12 and 13 write them so.
struct ContainerHeader {
  uint32_t magic;
  uint16_t version;
  uint16_t header_bytes;
  uint64_t bytes;  // of the entries, which follow
};

struct EntryHeader {
  static constexpr uint16_t kPtx = 1;
  static constexpr uint16_t kElf = 2;
  static constexpr uint64_t kLz4 = 0x2000;
  static constexpr uint64_t kZstd = 0x8000;

  uint16_t kind;
  uint16_t version;
  uint32_t header_bytes;
  uint64_t payload_bytes;
  uint32_t compressed_bytes;
  uint32_t options_offset;
  uint16_t minor_version;
  uint16_t major_version;
  uint32_t architecture;
  uint32_t name_offset;
  uint32_t name_bytes;
  uint64_t flags;
  uint64_t reserved;
  uint64_t uncompressed_bytes;
};
static_assert(sizeof(EntryHeader) == 64);

[[noreturn]] void refuse(const std::string& what) {
  throw CudaError(cudaErrorInvalidKernelImage, what);
}

// A T at `offset` of the `size` bytes, which need not be aligned.
template <class T>
T read_at(const uint8_t* bytes, size_t size, size_t offset) {
  if (offset > size || sizeof(T) > size - offset) refuse("the device code ends within a header");
  T value;
  std::memcpy(&value, bytes + offset, sizeof(T));
  return value;
}

// "sm_90a" after .target: the entry's header has the number, but the suffix only among its flags.
Architecture target_of(const std::string& ptx) {
  const std::string directive = ".target sm_";
  size_t at = ptx.find(directive);
  if (at == std::string::npos) refuse("PTX without a .target directive");
  at += directive.size();
  Architecture architecture;
  for (; at < ptx.size() && std::isdigit(static_cast<unsigned char>(ptx[at])); ++at) {
    architecture.number = architecture.number * 10 + (ptx[at] - '0');
  }
  if (at < ptx.size() && (ptx[at] == 'a' || ptx[at] == 'f')) architecture.specific = ptx[at];
  return architecture;
}

struct Section {
  std::string name;
  Elf64_Shdr header;
};

std::string string_at(const uint8_t* elf, size_t size, const Elf64_Shdr& strings, uint32_t offset) {
  const uint64_t begin = strings.sh_offset + offset;
  if (begin >= size) refuse("a name lies outside of the machine code");
  const auto* text = reinterpret_cast<const char*>(elf + begin);
  return std::string(text, strnlen(text, size - begin));
}

std::vector<Section> sections_of(const uint8_t* elf, size_t size) {
  const auto header = read_at<Elf64_Ehdr>(elf, size, 0);
  if (std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0) refuse("machine code that is no ELF file");
  std::vector<Section> sections(header.e_shnum);
  for (size_t i = 0; i < sections.size(); ++i) {
    sections[i].header = read_at<Elf64_Shdr>(elf, size, header.e_shoff + i * sizeof(Elf64_Shdr));
  }
  if (header.e_shstrndx >= sections.size()) refuse("machine code without section names");
  const Elf64_Shdr names = sections[header.e_shstrndx].header;
  for (Section& section : sections) {
    section.name = string_at(elf, size, names, section.header.sh_name);
  }
  return sections;
}

// Section .nv.info is a list of attributes {u8 format, u8 attribute, u16 value or size, bytes of
// that size if the format is 4}. EIATTR_REGCOUNT has {u32 symbol, u32 registers}. (The names are
// those that `cuobjdump -elf` prints.)
std::map<std::string, int> register_counts(const uint8_t* elf, size_t size) {
  constexpr uint8_t kSizedValue = 4;
  constexpr uint8_t kRegisterCount = 0x2f;
  std::map<std::string, int> counts;
  const std::vector<Section> sections = sections_of(elf, size);
  for (const Section& info : sections) {
    if (info.name != ".nv.info") continue;
    const Elf64_Shdr& symbols = sections.at(info.header.sh_link).header;
    const Elf64_Shdr& strings = sections.at(symbols.sh_link).header;
    const uint64_t end = info.header.sh_offset + info.header.sh_size;
    for (uint64_t at = info.header.sh_offset; at < end;) {
      const auto format = read_at<uint8_t>(elf, size, at);
      const auto attribute = read_at<uint8_t>(elf, size, at + 1);
      const auto bytes = read_at<uint16_t>(elf, size, at + 2);
      at += 4;
      if (format != kSizedValue) continue;
      if (attribute == kRegisterCount) {
        const auto index = read_at<uint32_t>(elf, size, at);
        const auto symbol =
            read_at<Elf64_Sym>(elf, size, symbols.sh_offset + index * sizeof(Elf64_Sym));
        counts[string_at(elf, size, strings, symbol.st_name)] = read_at<int32_t>(elf, size, at + 4);
      }
      at += bytes;
    }
  }
  return counts;
}

}  // namespace

bool Architecture::runs_on(int major, int minor) const {
  const int device = 10 * major + minor;
  if (specific == 'a') return number == device;
  if (specific == 'f') return number / 10 == major && number <= device;
  return number <= device;
}

std::string Architecture::name() const {
  return "sm_" + std::to_string(number) + (specific == 0 ? "" : std::string(1, specific));
}

Fatbin::Fatbin(const void* wrapper) {
  __fatBinC_Wrapper_t outer;
  std::memcpy(&outer, wrapper, sizeof outer);
  if (outer.magic != FATBINC_MAGIC) refuse("this is no fat binary");
  if (outer.version != FATBINC_VERSION) {
    refuse("relocatable device code (nvcc -rdc=true, -dc) is not supported");
  }
  const auto* data = reinterpret_cast<const uint8_t*>(outer.data);
  ContainerHeader container;
  std::memcpy(&container, data, sizeof container);
  if (container.magic != kContainerMagic) refuse("the fat binary has no container of device code");
  const uint8_t* const end = data + container.header_bytes + container.bytes;
  for (const uint8_t* entry = data + container.header_bytes; entry < end;) add(entry, end, &entry);
}

void Fatbin::add(const uint8_t* entry, const uint8_t* end, const uint8_t** next) {
  const auto left = static_cast<size_t>(end - entry);
  const auto header = read_at<EntryHeader>(entry, left, 0);
  if (header.header_bytes < sizeof header || header.header_bytes > left ||
      header.payload_bytes > left - header.header_bytes) {
    refuse("an entry reaches beyond the end of the fat binary");
  }
  const uint8_t* payload = entry + header.header_bytes;
  *next = payload + header.payload_bytes;
  const bool compressed = (header.flags & (EntryHeader::kLz4 | EntryHeader::kZstd)) != 0;
  if (header.kind == EntryHeader::kPtx) {
    if (compressed) {
      refuse("the PTX for compute_" + std::to_string(header.architecture) +
             " is compressed: compile with nvcc --no-compress");
    }
    const auto* text = reinterpret_cast<const char*>(payload);
    std::string ptx(text, strnlen(text, header.payload_bytes));
    const Architecture target = target_of(ptx);
    ptx_.push_back({target, std::move(ptx)});
  } else if (header.kind == EntryHeader::kElf && !compressed) {
    cubins_.push_back({{static_cast<int>(header.architecture), 0},
                       register_counts(payload, header.payload_bytes)});
  }
}

const Fatbin::Ptx& Fatbin::ptx_for(int major, int minor) const {
  const Ptx* best = nullptr;
  for (const Ptx& ptx : ptx_) {
    if (!ptx.architecture.runs_on(major, minor)) continue;
    const bool newer =
        best == nullptr || ptx.architecture.number > best->architecture.number ||
        (ptx.architecture.number == best->architecture.number && ptx.architecture.specific != 0);
    if (newer) best = &ptx;
  }
  if (best != nullptr) return *best;
  std::string held;
  for (const Ptx& ptx : ptx_) held += (held.empty() ? "" : ", ") + ptx.architecture.name();
  throw CudaError(cudaErrorNoKernelImageForDevice,
                  "the device is sm_" + std::to_string(10 * major + minor) +
                      ", the fat binary has " +
                      (held.empty() ? "no PTX (compile with code=compute_..)" : "PTX for " + held));
}

int Fatbin::registers(const std::string& kernel, int major, int minor) const {
  const int device = 10 * major + minor;
  // Older devices come before newer ones, and among either the nearest first.
  const auto rank = [device](const Cubin& cubin) {
    const int distance = cubin.architecture.number - device;
    return std::make_pair(distance > 0, std::abs(distance));
  };
  const auto nearest =
      std::min_element(cubins_.begin(), cubins_.end(),
                       [&](const Cubin& a, const Cubin& b) { return rank(a) < rank(b); });
  if (nearest == cubins_.end()) return 0;
  const auto found = nearest->registers.find(kernel);
  return found == nearest->registers.end() ? 0 : found->second;
}

}  // namespace emulator
