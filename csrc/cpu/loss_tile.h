// What the CPU kernels of the losses share: the walk over tokens and rows, and their planes. Included once per
// instruction set.
#pragma once

#include "pama/loss.h"
#include "tile.h"

namespace pama {
namespace PAMA_ISA {

template <class C>
class LossTile {
 protected:
  using V = typename Simd<C>::V;
  using M = typename Simd<C>::M;
  using I = typename Simd<C>::I;
  static constexpr int kLanes = Simd<C>::lanes, kTokens = 1024;
  static constexpr DType kNative = sizeof(C) == 8 ? DType::kFloat64 : DType::kFloat32;

  // tile(t, count), which says how many of the tokens [t, t + count) are valid, for all tokens from `first` to `last`,
  // in pieces of at most `tokens`; then finish(scale, valid). Where rows count, `first` and `last` are rows, no piece
  // has tokens of two, and finish comes after each.
  template <class Tile, class Finish>
  static void segments(const LossParams& p, int64_t first, int64_t last, int tokens, Tile tile, Finish finish) {
    const auto walk = [&](int64_t from, int64_t to) {
      int64_t counted = 0;
      for (int64_t t = from; t < to; t += tokens)
        counted += tile(t, static_cast<int>(smaller<int64_t>(tokens, to - t)));
      return counted;
    };
    if (!p.by_rows()) return finish(1.0, walk(first, last));
    for (int64_t row = first; row < last; ++row) {
      const int64_t counted = walk(row * p.cols, (row + 1) * p.cols);
      const double scale = p.row_scale(counted);
      if (p.row_scales()) static_cast<C*>(p.scale)[1 + row] = static_cast<C>(scale);
      finish(scale, counted);
    }
  }

  void load_valid(const LossParams& p, int64_t first, int count) {
    if (p.mask.data) {
      load_mask(p, first, count, valid);
    } else {
      fill(valid, 0, count, -1);
    }
    fill(valid, count, (count + kLanes - 1) / kLanes * kLanes, 0);
  }

  // The entries of a plane at the tokens [first, first + count): where they stand, or a copy.
  template <class Params>
  static const C* view(const Params& p, const Plane& q, DType dtype, int64_t first, int count, C* scratch) {
    const int64_t row = p.rows == 1 ? 0 : first / p.cols, col = first - row * p.cols;
    if (dtype == kNative && q.col == 1 && col + count <= p.cols) return at<const C>(q, row, col);
    with_dtype(dtype, [&](auto s) {
      using S = decltype(s);
      if constexpr (sizeof(S) <= sizeof(C)) load_plane<S>(p, q, first, count, scratch);
    });
    return scratch;
  }

  static void store(DType dtype, char* to, int64_t first, int count, const C* from) {
    with_dtype(dtype, [&](auto s) {
      using S = decltype(s);
      S* __restrict out = reinterpret_cast<S*>(to) + first;
      if constexpr (sizeof(S) <= sizeof(C))
        for (int k = 0; k < count; ++k) out[k] = store_finite<S>(from[k]);
    });
  }

  static V part_of(const C* x) {
    V part;
    memcpy(&part, x, sizeof part);
    return part;
  }
  static V part_of(const C* x, int count) {
    V part{};
    memcpy(&part, x, count * sizeof(C));
    return part;
  }
  M mask_at(int k) const { return *reinterpret_cast<const M*>(valid + k); }

  alignas(64) I valid[kTokens];  // those of the tile; 0 beyond it
};

}  // namespace PAMA_ISA
}  // namespace pama
