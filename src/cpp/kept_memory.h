// Memory of a thread that is kept between calls: fresh memory would cost page faults at every call.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace qlora {

struct alignas(64) CacheLine {  // a register that lies across two lines takes two loads
  char bytes[64];
};

// Only grows, and what it held is lost then.
class KeptMemory {
 public:
  char* reserve(int64_t bytes) {
    const auto lines = static_cast<std::size_t>((bytes + 63) / 64);
    if (lines_.size() < lines) {
      std::vector<CacheLine>().swap(lines_);  // the old one first, and nothing is copied
      lines_.resize(lines);
    }
    return reinterpret_cast<char*>(lines_.data());
  }

 private:
  std::vector<CacheLine> lines_;
};

}  // namespace qlora
