// The CPU kernel of `policy_loss`, compiled once per instruction set (csrc/cpu/isa_*.cpp).
//
// Tokens go by in tiles. What stands in memory as it is worked on is read there; the rest is copied to scratch first.
#include <cmath>

#include "exp.h"
#include "isa.h"
#include "lanes.h"
#include "loss_tile.h"
#include "pama/policy_term.h"

namespace pama {
namespace PAMA_ISA {

template <class C>
class PolicyKernel : LossTile<C> {
  using typename LossTile<C>::V;
  using typename LossTile<C>::M;
  using LossTile<C>::kLanes;
  using LossTile<C>::kTokens;
  using LossTile<C>::part_of;

 public:
  PolicyKernel(const PolicyParams& params, PolicySums& sums)
      : p(params),
        to(sums),
        tokens(smaller(kTokens, kElements / p.n / 16 * 16)),
        adjacent(pama::adjacent(p.advantages, p.n, p.advantage_dtype)) {
    for (int i = 0; i < p.n; ++i) weight[i] = static_cast<C>(p.weights[i]);
  }

  // The tokens [first, last), or where rows count the rows [first, last).
  void run(int64_t first, int64_t last) {
    this->segments(
        p, first, last, tokens, [&](int64_t t, int count) { return tile(t, count); },
        [&](double scale, int64_t counted) {
          to.loss += loss * scale;
          to.tokens += counted;
          to.sequences += counted > 0;
          for (int i = 0; p.per_objective && i < p.n; ++i) to.gradient[i] += moved[i] * scale, moved[i] = 0;
          loss = 0.0;
        });
  }

 private:
  int64_t tile(int64_t first, int count) {
    this->load_valid(p, first, count);
    const C* advantages = combined(first, count);
    const C *log_probs = this->view(p, p.log_probs, p.log_prob_dtype, first, count, log_prob_scratch),
            *old = this->view(p, p.old_log_probs, p.old_dtype, first, count, old_scratch), *ref = log_probs;
    if (p.ref_log_probs.data) ref = this->view(p, p.ref_log_probs, p.ref_dtype, first, count, ref_scratch);
    const bool direct = p.gradient && p.log_prob_dtype == LossTile<C>::kNative;
    C* gradient = direct ? reinterpret_cast<C*>(p.gradient) + first : gradient_scratch;
    int64_t counted;
    if (p.ref_log_probs.data)
      counted = p.truncated ? terms<true, true>(count, log_probs, old, advantages, ref, gradient)
                            : terms<true, false>(count, log_probs, old, advantages, ref, gradient);
    else
      counted = p.truncated ? terms<false, true>(count, log_probs, old, advantages, ref, gradient)
                            : terms<false, false>(count, log_probs, old, advantages, ref, gradient);
    if (p.gradient && !direct) this->store(p.log_prob_dtype, p.gradient, first, count, gradient);
    if (p.per_objective) objectives(count);
    return counted;
  }

  // The advantages of a tile, or their weighted sum.
  const C* combined(int64_t first, int count) {
    if (p.n == 1 && weight[0] == C{1} && !p.per_objective)
      return this->view(p, p.advantages[0], p.advantage_dtype, first, count, advantage_scratch);
    fill(combined_scratch, 0, count, C{0});
    if (adjacent)  // all of them in one walk over memory
      with_dtype(p.advantage_dtype, [&](auto s) {
        using S = decltype(s);
        if constexpr (sizeof(S) <= sizeof(C))
          load_objectives<S>(p, p.advantages, true, first, count, advantage_scratch, tokens);
      });
    for (int i = 0; i < p.n; ++i) {
      C* const own = advantage_scratch + i * tokens;
      advantage[i] = adjacent ? own : this->view(p, p.advantages[i], p.advantage_dtype, first, count, own);
      if (weight[i] == C{0}) continue;  // adds nothing, whatever stands there
      C* __restrict sum = combined_scratch;
      const C* __restrict each = advantage[i];
      const C by = weight[i];
      for (int k = 0; k < count; ++k) sum[k] += by * each[k];
    }
    return combined_scratch;
  }

  struct Sums {
    V loss{}, ratio{}, log_ratio{}, kl{}, ratio_max{};
    M tokens{}, high{}, low{}, dual{};
  };
  struct Step {
    V slope, factor, held;  // the gradient; that of an advantage of 1; log_ratio within its limit
  };

  static V within(V x) {  // its limit; NaN stays NaN
    const V limit = V{} + static_cast<C>(kLogRatioLimit);
    return larger(-limit, smaller(limit, x));
  }

  // A vector of tokens, of which those that `take` says are valid.
  template <bool kReference, bool kTruncated>
  inline __attribute__((always_inline)) Step step(const PolicyBounds<C, V>& bounds, V log_prob, V old, V a, V ref,
                                                  M take, Sums& sums) const {
    const V log_ratio = log_prob - old, held = within(log_ratio), u = exponential<C>(held).value;
    const auto term = policy_term<kTruncated, M>(bounds, log_prob, log_ratio, held, u, a);
    V each = term.loss, slope = term.slope;
    if constexpr (kReference) {
      const C kl_coef = static_cast<C>(p.kl_coef);
      const V apart = ref - log_prob, limited = within(apart), kl = exponential<C>(limited).beyond;
      sums.kl += take ? kl : V{};
      if (kl_coef != C{0}) {
        each += kl_coef * kl;
        slope -= limited == apart ? kl_coef * (kl + limited) : V{};
      }
    }
    const V ratio = take ? u : V{};
    sums.loss += take ? each : V{};
    sums.ratio += ratio;
    sums.ratio_max = ratio > sums.ratio_max ? ratio : sums.ratio_max;
    sums.log_ratio += take ? held : V{};
    sums.tokens -= take;
    sums.high -= take & term.high;
    sums.low -= take & term.low;
    sums.dual -= take & term.dual;
    return {take ? slope : V{}, take ? term.factor : V{}, held};
  }

  // Loss and gradient of the tokens, and what they add to the sums; returns how many are valid.
  template <bool kReference, bool kTruncated>
  int64_t terms(int count, const C* log_probs, const C* old, const C* advantages, const C* ref, C* gradient) {
    Sums sums;
    const bool keep = p.per_objective;
    const PolicyBounds<C, V> bounds(p);  // not a member: for all the compiler knows, stores may change those
    const auto put = [&](int k, const Step& done, size_t bytes) {
      memcpy(gradient + k, &done.slope, bytes);
      if (!keep) return;
      memcpy(factor_scratch + k, &done.factor, sizeof(V));
      memcpy(held_scratch + k, &done.held, sizeof(V));
    };
    int k = 0;
    for (; k + kLanes <= count; k += kLanes)
      put(k,
          step<kReference, kTruncated>(bounds, part_of(log_probs + k), part_of(old + k), part_of(advantages + k),
                                       part_of(ref + k), this->mask_at(k), sums),
          sizeof(V));
    if (const int rest = count - k)
      put(k,
          step<kReference, kTruncated>(bounds, part_of(log_probs + k, rest), part_of(old + k, rest),
                                       part_of(advantages + k, rest), part_of(ref + k, rest), this->mask_at(k), sums),
          rest * sizeof(C));
    lanes.spill(sums.loss, sums.ratio, sums.log_ratio, sums.kl, sums.ratio_max, sums.tokens, sums.high, sums.low,
                sums.dual);
    loss += lanes.sum(0);
    to.ratio += lanes.sum(1);
    to.log_ratio += lanes.sum(2);
    to.kl += lanes.sum(3);
    const double largest = lanes.template extreme<Larger>(4);
    to.ratio_max = largest > to.ratio_max ? largest : to.ratio_max;
    to.high += lanes.count(6);
    to.low += lanes.count(7);
    to.dual += lanes.count(8);
    return lanes.count(5);
  }

  // For each objective: where the loss of it alone would be clipped, and how much of the gradient is its own.
  void objectives(int count) {
    const V zero{};
    const PolicyBounds<C, V> bounds(p);
    for (int i = 0; i < p.n; ++i) {
      V share{};
      M clipped{};
      for (int k = 0; k < count; k += kLanes) {
        const V a = k + kLanes <= count ? part_of(advantage[i] + k) : part_of(advantage[i] + k, count - k);
        const V held = part_of(held_scratch + k), part = a * part_of(factor_scratch + k);
        const M beyond = p.truncated ? (a != zero) & (held > bounds.log_max)
                                     : ((a > zero) & (held > bounds.log_high)) | ((a < zero) & (held < bounds.log_low));
        clipped -= this->mask_at(k) & beyond;
        share += this->mask_at(k) ? (part < zero ? -part : part) : zero;
      }
      lanes.spill(share, clipped);
      if (weight[i] != C{0}) moved[i] += lanes.sum(0) * std::fabs(static_cast<double>(weight[i]));
      to.clipped[i] += static_cast<double>(lanes.count(1));
    }
  }

  const PolicyParams& p;
  PolicySums& to;
  const int tokens;     // of a tile
  const bool adjacent;  // the objectives of a token stand side by side
  C weight[kMaxObjectives];
  const C* advantage[kMaxObjectives];
  double loss = 0.0, moved[kMaxObjectives] = {};  // of the segment
  Lanes<C> lanes;

  static constexpr int kElements = 8192;
  alignas(64) C log_prob_scratch[kTokens], old_scratch[kTokens], ref_scratch[kTokens], gradient_scratch[kTokens];
  alignas(64) C combined_scratch[kTokens], factor_scratch[kTokens], held_scratch[kTokens];
  alignas(64) C advantage_scratch[kElements];
};

namespace {

void policy_loss(const PolicyParams& p, int64_t first, int64_t last, PolicySums& sums) {
  if (p.wide) {
    PolicyKernel<double>(p, sums).run(first, last);
  } else {
    PolicyKernel<float>(p, sums).run(first, last);
  }
}

}  // namespace

}  // namespace PAMA_ISA
}  // namespace pama
