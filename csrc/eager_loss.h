// Part of python_module.cpp: the losses through the eager door. None for whatever it does not serve.
//
// A loss comes as (loss, metrics, gradient, scale), the last two None where no gradient is wanted: Python makes the
// node of the autograd graph that keeps them.
#pragma once

#include "eager_results.h"
#include "eager_tensors.h"
#include "pama/loss.h"

namespace {

// Positions of the arguments, those of pama_ext.policy_loss in its order.
enum PolicyArgument {
  kPolicyLogProbs,
  kPolicyOldLogProbs,
  kPolicyAdvantages,
  kPolicyMask,
  kPolicyClipLow,
  kPolicyClipHigh,
  kPolicyDualClip,
  kPolicyMaxWeight,
  kPolicyKlCoef,
  kPolicyRefLogProbs,
  kPolicyAggregate,
  kPolicyNormalizer,
  kPolicyObjectiveAdvantages,
  kPolicyWeights,
  kPolicyArguments
};

// Those of pama_ext.value_loss.
enum ValueArgument {
  kValueValues,
  kValueOldValues,
  kValueReturns,
  kValueMask,
  kValueClip,
  kValueAggregate,
  kValueNormalizer,
  kValueArguments
};

bool read_aggregate(PyObject* object, pama::Aggregate& to) {
  const char* name = PyUnicode_CheckExact(object) ? PyUnicode_AsUTF8(object) : nullptr;
  if (!name) return PyErr_Clear(), false;
  to = pama::aggregate_named(name);
  return to != pama::Aggregate::kUnknown;
}

// A tensor that may be absent.
struct Optional {
  DLTensor tensor;
  pama::TensorView own;
  const pama::TensorView* view = nullptr;

  bool add(PyObject* object) {
    if (object == Py_None) return true;
    if (!read(object, tensor, own)) return false;
    view = &own;
    return true;
  }
};

// The normalizer as a tensor or a number >= 0.
bool read_normalizer(PyObject* object, Optional& tensor, pama::LossParams& p) {
  if (object == Py_None || tensor.view) return true;
  p.normalized = read_number(object, p.normalizer_value) && p.normalizer_value >= 0.0;
  return p.normalized && std::isfinite(p.normalizer_value);
}

// Loss, metrics and scale in one block of memory.
struct LossResults {
  Block* block;
  pama::LossParams& p;
  int64_t metrics_at = 1, scale_at;

  LossResults(pama::LossParams& params, int64_t metrics, int64_t workspace) : p(params), scale_at(1 + metrics) {
    const uint8_t bits = p.wide ? 64 : 32;
    const int64_t size = bits / 8, used = ((scale_at + p.scales()) * size + 15) / 16 * 16;
    block = allocate(used + workspace, {kDLFloat, bits, 1}, p.device);
    char* const data = static_cast<char*>(block->data());
    p.loss = data;
    p.metrics = data + metrics_at * size;
    p.scale = data + scale_at * size;
    p.workspace = data + used;
  }
  LossResults(const LossResults&) = delete;
  ~LossResults() { block->release(); }

  py::object scalar(int64_t at) const { return view(block, at, 0, 1, 1); }
  py::object vector(int64_t at, int64_t size) const { return view(block, at, 1, 1, size); }
  py::object scale() const { return vector(scale_at, p.scales()); }
};

py::object named_tuple(PyTypeObject* type, std::initializer_list<py::object> fields) {
  auto made = py::reinterpret_steal<py::object>(type->tp_alloc(type, static_cast<Py_ssize_t>(fields.size())));
  if (!made) throw py::error_already_set();
  Py_ssize_t i = 0;
  for (const py::object& field : fields) PyTuple_SET_ITEM(made.ptr(), i++, field.inc_ref().ptr());
  return made;
}

py::object run_policy_loss(PyObject* const* arguments) {
  if (!torch_.exchange || modes_active() || is_true(ask(torch_.tracing))) return py::none();
  pama::PolicyOptions options;
  const auto given = [&](PolicyArgument k) { return arguments[k] != Py_None; };
  if (!read_number(arguments[kPolicyClipLow], options.clip_low) || !(options.clip_low >= 0.0)) return py::none();
  if (!read_number(arguments[kPolicyClipHigh], options.clip_high) || !(options.clip_high >= 0.0)) return py::none();
  if (!read_number(arguments[kPolicyKlCoef], options.kl_coef)) return py::none();
  if (!(options.kl_coef >= 0.0) || !std::isfinite(options.kl_coef)) return py::none();
  if (given(kPolicyDualClip) && (!read_number(arguments[kPolicyDualClip], options.dual_clip) ||
                                 !(options.dual_clip > 1.0) || given(kPolicyMaxWeight)))
    return py::none();
  if (given(kPolicyMaxWeight) && (!read_number(arguments[kPolicyMaxWeight], options.max_weight) ||
                                  !(options.max_weight > 0.0) || !std::isfinite(options.max_weight)))
    return py::none();
  if (!read_aggregate(arguments[kPolicyAggregate], options.aggregate)) return py::none();

  const bool per_objective = given(kPolicyObjectiveAdvantages);
  if (per_objective == given(kPolicyAdvantages) || (given(kPolicyWeights) && !per_objective)) return py::none();
  DLTensor first_tensor;
  pama::TensorView first;
  Optional old, mask, ref, normalizer, weights;
  PyObject* const log_probs = arguments[kPolicyLogProbs];
  if (!read(log_probs, first_tensor, first) || !given(kPolicyOldLogProbs)) return py::none();
  if (!old.add(arguments[kPolicyOldLogProbs]) || !mask.add(arguments[kPolicyMask])) return py::none();
  if (!ref.add(arguments[kPolicyRefLogProbs])) return py::none();
  if (is_tensor(arguments[kPolicyNormalizer]) && !normalizer.add(arguments[kPolicyNormalizer])) return py::none();
  if (is_tensor(arguments[kPolicyWeights]) && !weights.add(arguments[kPolicyWeights])) return py::none();
  Inputs advantages;
  int n = 1;
  if (per_objective) {
    if (!advantages.add(arguments[kPolicyObjectiveAdvantages])) return py::none();
    n = advantages.listed ? advantages.count : advantages.split(advantages.views[0].ndim - 1);
  } else if (!is_tensor(arguments[kPolicyAdvantages]) || !advantages.add(arguments[kPolicyAdvantages])) {
    return py::none();
  }
  if (n == 0) return py::none();

  pama::PolicyParams p;
  if (pama::plan_policy_loss(
          options,
          {&first, old.view, advantages.views, n, per_objective, weights.view, mask.view, ref.view, normalizer.view},
          p))
    return py::none();
  if (!read_normalizer(arguments[kPolicyNormalizer], normalizer, p)) return py::none();
  if (!weights.view) {
    std::fill(p.weights.values, p.weights.values + n, 1.0);
    if (given(kPolicyWeights) && !read_weights(arguments[kPolicyWeights], n, p.weights.values)) return py::none();
  }

  const int64_t metrics = p.metrics_size();
  const LossResults results(p, metrics, pama::policy_loss_workspace(p));
  py::object gradient = py::none();
  if (requires_grad(log_probs) && is_true(ask(torch_.grad_mode))) {
    void* data;
    gradient = new_tensor(log_probs, first_tensor.dtype, p.device, 2, first.sizes, data);
    p.gradient = static_cast<char*>(data);
  }
  run_kernel(p, p.tokens() * n, pama::run_policy_loss);

  const auto scalar = [&](int k) { return results.scalar(results.metrics_at + k); };
  const auto vector = [&](int k) { return per_objective ? results.vector(results.metrics_at + k, n) : py::none(); };
  const py::object fields =
      named_tuple(policy_metrics_type,
                  {scalar(0), scalar(1), scalar(2), scalar(3), scalar(4), scalar(5), ref.view ? scalar(6) : py::none(),
                   vector(pama::kPolicyScalars), vector(pama::kPolicyScalars + n)});
  return py::make_tuple(results.scalar(0), fields, gradient, gradient.is_none() ? py::none() : results.scale());
}

py::object run_value_loss(PyObject* const* arguments) {
  if (!torch_.exchange || modes_active() || is_true(ask(torch_.tracing))) return py::none();
  double clip = 0.0;
  const bool clipped = arguments[kValueClip] != Py_None;
  if (clipped && (!read_number(arguments[kValueClip], clip) || !(clip >= 0.0))) return py::none();
  pama::Aggregate aggregate;
  if (!read_aggregate(arguments[kValueAggregate], aggregate)) return py::none();

  Inputs values, olds, returns;
  int n = 0;
  bool whole = false;  // one tensor with the objectives last
  const auto split = [&](Inputs& in, PyObject* argument) {
    if (!in.add(argument)) return false;
    if (&in == &values) whole = !in.listed && in.views[0].ndim == 3;
    const int count = in.listed ? in.count : in.views[0].ndim == 3 ? in.split(2) : 1;
    if (&in == &values) n = count;
    return count > 0 && count == n;
  };
  if (!split(values, arguments[kValueValues]) || !split(returns, arguments[kValueReturns])) return py::none();
  if (clipped && !split(olds, arguments[kValueOldValues])) return py::none();
  if (!same_keys(arguments[kValueReturns], arguments[kValueValues])) return py::none();
  if (clipped && !same_keys(arguments[kValueOldValues], arguments[kValueValues])) return py::none();
  Optional mask, normalizer;
  if (!mask.add(arguments[kValueMask])) return py::none();
  if (is_tensor(arguments[kValueNormalizer]) && !normalizer.add(arguments[kValueNormalizer])) return py::none();

  pama::ValueParams p;
  if (pama::plan_value_loss(
          aggregate, clip,
          {values.views, clipped ? olds.views : nullptr, returns.views, n, whole, mask.view, normalizer.view}, p))
    return py::none();
  if (!read_normalizer(arguments[kValueNormalizer], normalizer, p)) return py::none();

  const LossResults results(p, p.metrics_size(), pama::value_loss_workspace(p));
  py::object gradient = py::none();
  bool wanted = false;
  for (int i = 0; i < values.count; ++i) wanted = wanted || requires_grad(values.objects[i]);
  if (wanted && is_true(ask(torch_.grad_mode))) {
    const int64_t *rows = values.views[0].sizes,
                  sizes[3] = {whole ? rows[0] : n, whole ? rows[1] : rows[0], whole ? n : rows[1]};
    const int ndim = values.listed || whole ? 3 : 2;
    void* data;
    gradient = new_tensor(values.objects[0], values.tensors[0].dtype, p.device, ndim, ndim == 3 ? sizes : rows, data);
    p.gradient = static_cast<char*>(data);
  }
  run_kernel(p, p.tokens() * n, pama::run_value_loss);

  const auto vector = [&](int k) { return results.vector(results.metrics_at + k * n, n); };
  const py::object fields = named_tuple(value_metrics_type, {vector(0), vector(1), vector(2)});
  return py::make_tuple(results.scalar(0), fields, gradient, gradient.is_none() ? py::none() : results.scale());
}

// The kept gradient times the incoming one, in place or (what autograd may ask for again) not. Arguments: gradient,
// incoming, scale, the dimension of its rows, whether in place.
py::object run_scale(PyObject* const* arguments) {
  if (!torch_.exchange || modes_active() || is_true(ask(torch_.tracing))) return py::none();
  DLTensor tensors[3];
  pama::TensorView views[3];
  for (int k = 0; k < 3; ++k)
    if (!read(arguments[k], tensors[k], views[k])) return py::none();
  pama::ScaleParams p;
  if (pama::plan_scale(views[0], views[1], views[2], static_cast<int>(PyLong_AsLong(arguments[3])), p))
    return py::none();
  py::object out = py::reinterpret_borrow<py::object>(arguments[0]);
  if (arguments[4] == Py_True) {
    mark_written(arguments, 1);  // whoever holds it still must not take it for what was kept
  } else {
    out = new_tensor(arguments[0], tensors[0].dtype, p.device, views[0].ndim, views[0].sizes, p.out);
  }
  run_kernel(p, p.elements(), pama::run_scale);
  return out;
}

}  // namespace
