#include "midstream/score.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "families.h"
#include "pack.h"
#include "score_rows.h"
#include "thread_pool.h"

namespace midstream {
namespace {

constexpr std::size_t kAlignment = 64;  // a cache line, and the widest register

template <class T>
T* allocate_zeroed(std::int64_t count) {
  const std::size_t bytes =
      (static_cast<std::size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
  void* memory = std::aligned_alloc(kAlignment, bytes);
  if (memory == nullptr) throw std::bad_alloc();
  return static_cast<T*>(std::memset(memory, 0, bytes));
}

std::size_t element_size(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

}  // namespace

Probes::Probes(const ProbeTable& table) : table_(table), isa_(midstream::isa()) {
  const std::int64_t probes = table.probes, width = table.width;
  table_.weight = nullptr;
  wide_.reset(allocate_zeroed<float>(wide_size(probes, width)));
  switch (table.weight_dtype) {
    case DType::float32:
      pack_wide(static_cast<const float*>(table.weight), probes, width, wide_.get());
      return;
    case DType::float16:
      pack_wide(static_cast<const Half*>(table.weight), probes, width, wide_.get());
      return;
    case DType::bfloat16:
      pack_wide(static_cast<const BFloat16*>(table.weight), probes, width, wide_.get());
  }
  const auto* weight = static_cast<const BFloat16*>(table.weight);
  if (isa_ == Isa::avx512bf16) {
    narrow_.reset(allocate_zeroed<BFloat16>(narrow_size(probes, width)));
    pack_narrow(weight, probes, width, narrow_.get());
  } else if (isa_ == Isa::amx) {
    narrow_.reset(allocate_zeroed<BFloat16>(tiles_size(probes, width)));
    pack_tiles(weight, probes, width, narrow_.get());
  }
}

const Family& family(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::avx512) return kAvx512Family;
  if (isa == Isa::avx2) return kAvx2Family;
#endif
  static_cast<void>(isa);
  return kGenericFamily;
}

RowKernel row_kernel(const Probes& probes, DType rows) {
  const ProbeTable& t = probes.table();
  Packed packed{probes.wide(), t.bias, t.probes, t.width, t.rms_norm, t.eps};
  if (rows == DType::bfloat16 && probes.narrow() != nullptr) {
    packed.weight = probes.narrow();
#if MIDSTREAM_HAS_AMX
    if (probes.isa() == Isa::amx) return {score_rows_amx, packed};
#endif
#if MIDSTREAM_HAS_BF16
    return {score_rows_avx512bf16, packed};
#endif
  }
  return {family(probes.isa()).score[static_cast<int>(rows)], packed};
}

int threads_for(const Probes& probes, std::int64_t rows, int threads) {
  const ProbeTable& t = probes.table();
  return static_cast<int>(
      std::clamp<std::int64_t>(rows * t.probes * t.width / kWorkPerThread, 1, threads));
}

void score(const Probes& probes, const Hidden& hidden, const Logits& logits, int threads) {
  struct Call {
    RowKernel kernel;
    const Hidden& hidden;
    const Logits& logits;
  } const call{row_kernel(probes, hidden.dtype), hidden, logits};
  const auto body = [](const void* context, std::int64_t begin, std::int64_t end) {
    const Call& c = *static_cast<const Call*>(context);
    const auto offset = static_cast<std::size_t>(begin * c.hidden.stride);
    const auto* x =
        static_cast<const std::byte*>(c.hidden.data) + offset * element_size(c.hidden.dtype);
    c.kernel.run(c.kernel.packed, {x, c.hidden.stride, end - begin,
                                   c.logits.data + begin * c.logits.stride, c.logits.stride});
  };
  parallel_rows(hidden.rows, threads_for(probes, hidden.rows, threads), kRowGrain, body, &call);
}

}  // namespace midstream
