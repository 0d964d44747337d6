#include "variant.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "kernels.h"

namespace qlora {
namespace {

// Slowest first, each extending those before it. (The null is for builds without any.)
const InstructionSet* const kCompiled[] = {
#ifdef QLORA_X86
    &avx2,   &avx512, &avx512_vbmi, &avx512_bf16,
#endif
#ifdef QLORA_NEON
    &neon,
#endif
    nullptr,
};

std::vector<Variant> make_variants() {
  std::vector<Variant> variants{scalar_variant};
  for (const InstructionSet* set : kCompiled) {
    if (!set || !set->supported()) continue;
    Variant variant = variants.back();
    variant.name = set->name;
    set->extend(variant);
    variants.push_back(variant);
  }
  return variants;
}

// Those that this CPU can run.
const std::vector<Variant>& variants() {
  static const std::vector<Variant> made = make_variants();
  return made;
}

const Variant* find(const std::string& name) {
  for (const Variant& candidate : variants()) {
    if (candidate.name == name) return &candidate;
  }
  return nullptr;
}

std::atomic<const Variant*> in_use{nullptr};

}  // namespace

std::vector<std::string> cpu_variants() {
  std::vector<std::string> names;
  for (const Variant& candidate : variants()) names.emplace_back(candidate.name);
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
  if (!chosen) in_use = chosen = &variants().back();
  return *chosen;
}

std::string cpu_variant() { return variant().name; }

}  // namespace qlora
