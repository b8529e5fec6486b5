// A kernel that is wrong, for the test that tools/npu/check.py finds it: the identity in place of GELU.
#include "paddle/phi/capi/all.h"
namespace fk {
template <typename T>
void Gelu(const phi::Context& ctx, const phi::DenseTensor& x, bool, phi::DenseTensor* out) {
  T* p = ctx.template Alloc<T>(out);
  const T* q = x.data<T>();
  for (int64_t i = 0; i < x.numel(); ++i) p[i] = q[i];
}
}  // namespace fk
PD_BUILD_PHI_KERNEL(gelu, npu, ALL_LAYOUT, fk::Gelu, float) {}
