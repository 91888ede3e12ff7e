// The results of a call, allocated beside its queries.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <array>
#include <cmath>

#include "csrc/descriptors.h"

namespace fa::torch_side {

// PyTorch's own allocation on the device of q, without a look at its table of operators.
template <size_t kDim>
Tensor empty_beside(Tensor const& q, std::array<int64_t, kDim> const& sizes, int32_t dtype) {
  std::array<int64_t, kDim> strides;
  int64_t stride = 1;
  for (size_t i = kDim; i-- > 0; stride *= sizes[i]) strides[i] = stride;
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(q.get(), &device_type));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(kDim, sizes.data(), strides.data(), dtype,
                                                  device_type, q.get_device_index(), &made));
  return Tensor(made);
}

inline Tensor empty_like_q(Tensor const& q) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(q.get(), &dtype));
  return q.dim() == 4 ? empty_beside<4>(q, {q.size(0), q.size(1), q.size(2), q.size(3)}, dtype)
                      : empty_beside<3>(q, {q.size(0), q.size(1), q.size(2)}, dtype);
}

// (b, h_q, s_q), or (h_q, t) of a packed batch.
inline Tensor empty_lse(Tensor const& q) {
  int32_t const dtype = aoti_torch_dtype_float32();
  return q.dim() == 4 ? empty_beside<3>(q, {q.size(0), q.size(2), q.size(1)}, dtype)
                      : empty_beside<2>(q, {q.size(1), q.size(0)}, dtype);
}

inline double scale_of(std::optional<double> softmax_scale, Tensor const& q) {
  return softmax_scale ? *softmax_scale : std::pow(static_cast<double>(q.size(q.dim() - 1)), -0.5);
}

}  // namespace fa::torch_side
