#include "variant.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "kernels.h"

namespace qlora {
namespace {

// Slowest first.
const Variant* const kCompiled[] = {
    &scalar_variant,
#ifdef QLORA_X86
    &avx2_variant,    //
    &avx512_variant,  //
    &avx512_bf16_variant,
#endif
#ifdef QLORA_NEON
    &neon_variant,
#endif
};

const Variant* find(const std::string& name) {
  for (const Variant* candidate : kCompiled) {
    if (candidate->name == name && candidate->supported()) return candidate;
  }
  return nullptr;
}

const Variant* best() {
  const Variant* chosen = &scalar_variant;
  for (const Variant* candidate : kCompiled) {
    if (candidate->supported()) chosen = candidate;
  }
  return chosen;
}

std::atomic<const Variant*> in_use{nullptr};

}  // namespace

std::vector<std::string> cpu_variants() {
  std::vector<std::string> names;
  for (const Variant* candidate : kCompiled) {
    if (candidate->supported()) names.emplace_back(candidate->name);
  }
  return names;
}

void set_cpu_variant(const std::string& name) {
  const Variant* chosen = find(name);
  if (!chosen) {
    std::string known;
    for (const std::string& each : cpu_variants()) known += (known.empty() ? "" : ", ") + each;
    throw std::invalid_argument("no CPU variant '" + name + "' here: this build on this CPU has " + known +
                                "; unset QLORA_CPU_VARIANT to get the fastest");
  }
  in_use = chosen;
}

const Variant& variant() {
  const Variant* chosen = in_use;
  if (!chosen) in_use = chosen = best();
  return *chosen;
}

std::string cpu_variant() { return variant().name; }

}  // namespace qlora
