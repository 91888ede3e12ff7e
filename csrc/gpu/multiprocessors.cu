// What the driver says of a GPU, and what FLASH_ATTN_GPU_SHARED_KB takes away from it.
#include "csrc/gpu/multiprocessors.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <string>

#include "csrc/gpu/errors.cuh"

namespace fa::gpu {
namespace {

constexpr int64_t kLeastSharedKb = 99;  // what every GPU from Ampere on has for a thread block

// The shared memory that FLASH_ATTN_GPU_SHARED_KB leaves a thread block, in KiB; 0: all there is.
int64_t allowed_shared_kb() {
  char const* const asked = std::getenv("FLASH_ATTN_GPU_SHARED_KB");
  if (!asked || !*asked) return 0;
  char* end = nullptr;
  long long const kb = std::strtoll(asked, &end, 10);
  if (*end == '\0' && kb >= kLeastSharedKb) return kb;
  throw std::runtime_error(
      std::string("flash_attn: no kernels fit into this much shared memory; received "
                  "FLASH_ATTN_GPU_SHARED_KB=") +
      asked + "; rule: a whole number of KiB from " + std::to_string(kLeastSharedKb) + " on");
}

Multiprocessors ask_driver(int device) {
  auto const attribute = [device](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device));
    return value;
  };
  Multiprocessors found;
  found.capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
                     attribute(cudaDevAttrComputeCapabilityMinor);
  found.count = attribute(cudaDevAttrMultiProcessorCount);
  found.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  found.max_shared_bytes_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (int64_t const allowed = allowed_shared_kb() * 1024) {
    found.shared_bytes = std::min(found.shared_bytes, allowed + kReservedBytes);
    found.max_shared_bytes_per_block = std::min(found.max_shared_bytes_per_block, allowed);
  }
  return found;
}

}  // namespace

Multiprocessors const& multiprocessors_of(int device) {
  static std::array<Multiprocessors, kMaxDevices> known;
  static std::array<std::once_flag, kMaxDevices> asked;
  if (device < 0 || device >= kMaxDevices) {
    throw std::runtime_error("flash_attn: the number of a GPU is out of range; received " +
                             std::to_string(device) + "; rule: 0 <= device < " +
                             std::to_string(kMaxDevices));
  }
  auto const i = static_cast<size_t>(device);
  std::call_once(asked[i], [&] { known[i] = ask_driver(device); });
  return known[i];
}

}  // namespace fa::gpu
