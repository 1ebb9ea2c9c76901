#include "build_id.h"

#include <link.h>

#include <cstdint>
#include <cstring>

namespace fastconv {
namespace {

const char kHere = 0;  // an address inside this module

// The build ID among the notes of one segment, or "".
std::string find_note(const char* at, const char* end) {
  const auto aligned = [](size_t size) { return (size + 3) / 4 * 4; };
  while (at + sizeof(ElfW(Nhdr)) <= end) {
    const auto* note = reinterpret_cast<const ElfW(Nhdr)*>(at);
    const char* name = at + sizeof(*note);
    const char* data = name + aligned(note->n_namesz);
    if (note->n_type == NT_GNU_BUILD_ID && note->n_namesz == 4 && std::memcmp(name, "GNU", 4) == 0) {
      std::string text;
      for (size_t i = 0; i < note->n_descsz; ++i) {
        const auto byte = static_cast<uint8_t>(data[i]);
        text += {"0123456789abcdef"[byte >> 4], "0123456789abcdef"[byte & 15]};
      }
      return text;
    }
    at = data + aligned(note->n_descsz);
  }
  return "";
}

int visit(dl_phdr_info* module, size_t, void* result) {
  const auto here = reinterpret_cast<ElfW(Addr)>(&kHere);
  bool ours = false;
  for (int i = 0; i < module->dlpi_phnum; ++i) {
    const auto& segment = module->dlpi_phdr[i];
    const ElfW(Addr) begin = module->dlpi_addr + segment.p_vaddr;
    ours = ours || (segment.p_type == PT_LOAD && begin <= here && here < begin + segment.p_memsz);
  }
  if (!ours) return 0;
  auto& text = *static_cast<std::string*>(result);
  for (int i = 0; i < module->dlpi_phnum && text.empty(); ++i) {
    const auto& segment = module->dlpi_phdr[i];
    if (segment.p_type != PT_NOTE) continue;
    const auto* at = reinterpret_cast<const char*>(module->dlpi_addr + segment.p_vaddr);
    text = find_note(at, at + segment.p_memsz);
  }
  return 1;
}

}  // namespace

std::string build_id() {
  std::string text;
  dl_iterate_phdr(&visit, &text);
  return text;
}

}  // namespace fastconv
