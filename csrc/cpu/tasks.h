// Tasks on threads: each computes in the same floating-point environment, in any order, with
// scratch of its own.
#pragma once

#include <atomic>
#include <cfenv>
#include <cstdint>
#include <memory>
#include <new>

#include "csrc/cpu/family.h"

namespace fa::cpu {

// The rounding mode and the treatment of subnormals belong to the thread and would reach the bits:
// every worker computes in the default environment and puts its own back.
class DefaultFloatEnvironment {
 public:
  DefaultFloatEnvironment() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatEnvironment() { std::fesetenv(&saved_); }
  DefaultFloatEnvironment(DefaultFloatEnvironment const&) = delete;
  DefaultFloatEnvironment& operator=(DefaultFloatEnvironment const&) = delete;

 private:
  std::fenv_t saved_;
};

// Scratch of one thread, kept between calls: at most a few MB.
inline float* workspace(int64_t floats) {
  struct Release {
    void operator()(float* p) const { ::operator delete[](p, std::align_val_t{64}); }
  };
  thread_local std::unique_ptr<float[], Release> buffer;
  thread_local int64_t capacity = 0;
  if (capacity < floats) {
    buffer.reset(
        static_cast<float*>(::operator new[](sizeof(float) * floats, std::align_val_t{64})));
    capacity = floats;
  }
  return buffer.get();
}

// Runs task(i, scratch) for all i < num_tasks; free threads take the next task, so order and owner
// vary from run to run.
template <class Task>
void run_tasks(Machine const& machine, int64_t num_tasks, int64_t workspace_floats,
               Task const& task) {
  struct Context {
    std::atomic<int64_t> next{0};
    int64_t num_tasks, workspace_floats;
    Task const* task;
  } context;
  context.num_tasks = num_tasks;
  context.workspace_floats = workspace_floats;
  context.task = &task;
  int64_t const workers = num_tasks < machine.num_threads ? num_tasks : machine.num_threads;
  if (workers == 0) return;
  machine.run(
      workers,
      [](void* opaque) {
        Context& c = *static_cast<Context*>(opaque);
        DefaultFloatEnvironment const environment;
        float* const scratch = workspace(c.workspace_floats);
        for (int64_t i = c.next.fetch_add(1); i < c.num_tasks; i = c.next.fetch_add(1))
          (*c.task)(i, scratch);
      },
      &context);
}

}  // namespace fa::cpu
