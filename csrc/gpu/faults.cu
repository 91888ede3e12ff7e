// The word in which kernels leave a fault: pinned memory, and what it says in words.
#include "csrc/gpu/faults.h"

#include <array>
#include <atomic>
#include <mutex>
#include <stdexcept>
#include <string>

#include "csrc/gpu/errors.cuh"
#include "csrc/gpu/multiprocessors.h"

namespace fa::gpu {
namespace {

std::array<std::atomic<uint64_t*>, kMaxDevices> words{};

// Pinned, so that kernels of every device reach it; also while a graph is captured, which an
// allocation does not enter.
uint64_t* allocate() {
  void* memory = nullptr;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  check(cudaThreadExchangeStreamCaptureMode(&mode));
  cudaError_t const status =
      cudaHostAlloc(&memory, sizeof(uint64_t), cudaHostAllocMapped | cudaHostAllocPortable);
  check(cudaThreadExchangeStreamCaptureMode(&mode));
  check(status);
  auto* const word = static_cast<uint64_t*>(memory);
  *word = 0;
  return word;
}

struct Words {
  char const *what, *tensor, *rule;
};

Words words_of(Fault const& fault) {
  bool const cache = fault.caller == Caller::kCache;
  switch (fault.what) {
    case Faulty::kCuSeqlensQ:
      return {"cu_seqlens_q is no list of offsets into its pack", "cu_seqlens_q",
              "offsets start at 0, do not decrease, and are at most total_q"};
    case Faulty::kCuSeqlensK:
      return {"cu_seqlens_k is no list of offsets into its pack", "cu_seqlens_k",
              "offsets start at 0, do not decrease, and are at most total_k"};
    case Faulty::kMaxSeqlenQ:
      return {"a sequence of cu_seqlens_q exceeds max_seqlen_q", "length of sequence ",
              "length <= max_seqlen_q"};
    case Faulty::kMaxSeqlenK:
      return {"a sequence of cu_seqlens_k exceeds max_seqlen_k, or the capacity of block_table",
              "length of sequence ", "0 <= length <= max_seqlen_k, and the pages hold it"};
    case Faulty::kKeyLengths:
      if (!cache)
        return {"seqused_k is out of range", "seqused_k", "0 <= seqused_k <= keys of the sequence"};
      return {"cache_seqlens is negative or exceeds the capacity of the cache",
              "with new keys, cache_seqlens",
              "0 <= cache_seqlens and cache_seqlens + s_new <= capacity"};
    case Faulty::kLeftPadding:
      if (!cache)
        return {"leftpad_k is out of range", "leftpad_k", "0 <= leftpad_k <= keys of the sequence"};
      return {"cache_leftpad is out of range", "cache_leftpad",
              "0 <= cache_leftpad <= keys of the sequence, new ones included"};
    case Faulty::kCacheBatchIdx:
      return {"cache_batch_idx names a row outside the cache", "cache_batch_idx",
              "0 <= row < b_cache"};
    case Faulty::kBlockTable:
      return {"block_table names a page outside the cache", "row-major, block_table",
              "0 <= page < num_blocks in every entry that a sequence uses"};
    case Faulty::kAppend:
      return {"an append at cache_seqlens leaves the cache, and was not made",
              "position of a new key of sequence ",
              "0 <= cache_seqlens and cache_seqlens + s_new <= capacity"};
    default:
      return {"cos/sin seqlen must reach the last query", "position of a query of sequence ",
              "one row of the tables for each position"};
  }
}

char const* name_of(Caller caller) {
  switch (caller) {
    case Caller::kVarlen:
      return "flash_attn_varlen_func";
    case Caller::kVarlenBackward:
      return "the backward pass of flash_attn_varlen_func";
    default:
      return "flash_attn_with_kvcache";
  }
}

}  // namespace

uint64_t* fault_word(int device) {
  if (device < 0 || device >= kMaxDevices) return nullptr;
  uint64_t* word = words[device].load(std::memory_order_acquire);
  if (word) return word;
  static std::mutex mutex;
  std::lock_guard const lock(mutex);
  word = words[device].load(std::memory_order_acquire);
  if (!word) {
    word = allocate();
    words[device].store(word, std::memory_order_release);
  }
  return word;
}

void raise_fault(int device) {
  uint64_t* const word = fault_word(device);
  if (!word) return;
  std::atomic_ref<uint64_t> const shared(*word);
  if (shared.load(std::memory_order_relaxed) == 0) return;
  Fault const fault = Fault::of(shared.exchange(0));
  if (fault.what == Faulty::kNothing) return;
  Words const text = words_of(fault);
  std::string entry = std::to_string(fault.entry), tensor = text.tensor;
  if (tensor.back() != ' ') entry = "[" + entry + "]";
  throw std::runtime_error(std::string("flash_attn: ") + text.what + ", in an earlier call of " +
                           name_of(fault.caller) +
                           " on this GPU, whose results mean nothing; received " + tensor + entry +
                           " = " + std::to_string(fault.value) + "; rule: " + text.rule +
                           " (with FLASH_ATTN_CHECK=1 the call itself is refused)");
}

}  // namespace fa::gpu
