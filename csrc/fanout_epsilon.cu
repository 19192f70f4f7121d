#include "elementwise.cuh"
#include "fanout_epsilon_cuda.h"

namespace relprop {
namespace {

template <typename V, typename S>
struct Fanout {
  S* out;
  const S* relevances[kMaxFanout];
  const V* x;
  int count;
  int64_t targets, size;
  Divisor stab;

  __device__ void operator()(Place place) const {
    const Four x_here = load_four(x, place);
    for (int64_t t = 0; t < targets; ++t) {
      Four sum = load_four(relevances[0] + t * size, place);
      for (int reader = 1; reader < count; ++reader) {
        const Four r = load_four(relevances[reader] + t * size, place);
        for (int i = 0; i < kFour; ++i) sum.v[i] += r.v[i];
      }
      for (int i = 0; i < kFour; ++i) sum.v[i] = x_here.v[i] * (sum.v[i] / stab(x_here.v[i]));
      store_four(out + t * size, place, sum);
    }
  }
};

}  // namespace

void fanout_epsilon_cuda(DType values, DType streams, void* out, const void* const* relevances, const void* x,
                         int count, int64_t targets, int64_t size, Stabiliser stabiliser, Stream stream) {
  if (count < 1 || count > kMaxFanout) {
    throw std::invalid_argument("relevances: expected 1 to " + std::to_string(kMaxFanout) + " pointers, got " +
                                std::to_string(count));
  }
  with_dtypes(values, streams, [&](auto value, auto streamed) {
    using V = typename decltype(value)::Type;
    using S = typename decltype(streamed)::Type;
    Fanout<V, S> rule{static_cast<S*>(out), {}, static_cast<const V*>(x), count, targets, size, stabiliser};
    bool all_aligned = aligned({out, x});
    for (int i = 0; i < count; ++i) {
      rule.relevances[i] = static_cast<const S*>(relevances[i]);
      all_aligned = all_aligned && aligned({relevances[i]});
    }
    run_elementwise("fanout_epsilon", rule, size, all_aligned, stream);
  });
}

}  // namespace relprop
