// Door 2, eager: plain torch.Tensors read through torch's DLPack exchange table, without the dispatcher.
//
// Its functions return None for whatever they do not serve (subclasses, modes, bad arguments): the caller then goes
// through Python's checks, which say what is wrong, and door 1.
#include <pybind11/pybind11.h>

#include <cmath>
#include <iterator>

#include "eager_gae.h"
#include "eager_loss.h"
#include "eager_results.h"
#include "eager_tensors.h"
#include "torch_runtime.h"

namespace {

// The tensor for the combination.
py::object new_output(const Inputs& in, int64_t dim, pama::CombineParams& p) {
  const DLTensor& first = in.tensors[0];
  const int skip = in.listed ? -1 : static_cast<int>(dim < 0 ? dim + first.ndim : dim);
  int64_t sizes[2];
  int ndim = 0;
  for (int d = 0; d < first.ndim; ++d)
    if (d != skip) sizes[ndim++] = first.shape[d];
  void* data;
  py::object out = new_tensor(in.objects[0], first.dtype, p.device, ndim, sizes, data);
  p.out = {static_cast<char*>(data), p.cols, 1};
  return out;
}

// Positions of the arguments, those of pama_ext.combine in its order.
enum Argument {
  kAdvantages,
  kDim,
  kMask,
  kLogRatio,
  kClipLow,
  kClipHigh,
  kNoon,
  kLevel,
  kSolver,
  kNormalize,
  kRewardWeights,
  kNan,
  kSkipInactive,
  kOut,
  kProcessGroup,
  kArguments
};

// The checked options. A call site passes the same objects again and again, so the last ones are kept. `normalize` is
// None or what a Normalize spells out.
const pama::CombineOptions* options_of(PyObject* const* arguments, PyObject* normalize) {
  constexpr Argument keys[] = {kDim,    kClipLow,   kClipHigh, kNoon,         kLevel,
                               kSolver, kNormalize, kNan,      kSkipInactive, kProcessGroup};
  static PyObject* last[std::size(keys)] = {};
  static PyObject* owner = nullptr;
  static const pama::CombineOptions* options = nullptr;
  bool same = options != nullptr;
  const auto key = [&](size_t k) { return keys[k] == kNormalize ? normalize : arguments[keys[k]]; };
  for (size_t k = 0; same && k < std::size(keys); ++k) same = last[k] == key(k);
  if (!same) {
    PyObject* now[std::size(keys)];
    for (size_t k = 0; k < std::size(keys); ++k) now[k] = key(k);
    PyObject* made = PyObject_Vectorcall(make_options, now, std::size(keys), nullptr);
    if (!made) {
      decline();  // Python's checks, run next, raise it again
      return nullptr;
    }
    for (size_t k = 0; k < std::size(keys); ++k) Py_XSETREF(last[k], Py_NewRef(now[k]));
    Py_XSETREF(owner, made);
    options = &py::handle(owner).cast<const pama::CombineOptions&>();
  }
  return options;
}

template <bool kInPlace>
py::object run(PyObject* const* arguments) {
  if (!torch_.exchange || modes_active()) return py::none();
  // torch.jit.trace, which is deprecated, would bake a result in. Asking takes long, so where out= is given nobody
  // asks.
  if (arguments[kOut] == Py_None && is_true(ask(torch_.tracing))) return py::none();
  py::object spelled, described;  // of the Normalize, if there is one: its settings, and the tensor of its groups
  if (arguments[kNormalize] != Py_None) {
    if (Py_TYPE(arguments[kNormalize]) != normalize_type) return py::none();
    spelled = py::getattr(arguments[kNormalize], spec_attribute);
    described = py::getattr(arguments[kNormalize], groups_attribute);
  }
  const pama::CombineOptions* remembered = options_of(arguments, spelled ? spelled.ptr() : Py_None);
  if (!remembered) return py::none();
  const pama::CombineOptions options = *remembered;  // another thread may be next with other ones
  const py::handle advantages = arguments[kAdvantages], mask = arguments[kMask], log_ratio = arguments[kLogRatio],
                   reward_weights = arguments[kRewardWeights], out = arguments[kOut],
                   groups = described ? described.ptr() : Py_None;
  Inputs in;
  if (!in.add(advantages.ptr())) return py::none();

  enum { kMaskView, kRatioView, kRewardView, kGroupsView, kOutView, kViews };
  DLTensor tensors[kViews];
  pama::TensorView views[kViews];
  const pama::TensorView* optional[kViews] = {};
  const py::handle given[kViews] = {mask, log_ratio, reward_weights, groups, out};
  for (int k = 0; k < kViews; ++k) {
    if (given[k].is_none() || (k == kRewardView && !is_tensor(given[k].ptr()))) continue;
    if (!read(given[k].ptr(), tensors[k], views[k], k == kOutView)) return py::none();
    optional[k] = &views[k];
  }
  if (optional[kOutView] && requires_grad(out.ptr())) return py::none();
  for (int i = 0; kInPlace && i < in.count; ++i)
    if (requires_grad(in.objects[i])) return py::none();

  pama::CombineParams params;
  params.weighted = false;
  if (pama::plan_combine(options,
                         {in.views, in.count, in.listed, optional[kMaskView], optional[kRatioView],
                          optional[kRewardView], optional[kGroupsView], optional[kOutView], kInPlace},
                         params))
    return py::none();
  if (!reward_weights.is_none() && !optional[kRewardView]) {
    if (!read_weights(reward_weights.ptr(), params.n, params.reward_values)) return py::none();
    params.weighted = true;
  }

  if (kInPlace || !out.is_none()) mark_written(kInPlace ? in.objects : &arguments[kOut], kInPlace ? in.count : 1);
  py::object result = py::reinterpret_borrow<py::object>(kInPlace ? advantages : out);
  if (!kInPlace && out.is_none()) result = new_output(in, options.dim, params);
  py::object combined = new_combined(result.ptr(), allocate_packed(params));
  run_kernel(params, params.tokens() * params.n, pama::run_combine);

  if (PyDict_CheckExact(advantages.ptr()))
    combined.attr(names_attribute) = py::reinterpret_steal<py::object>(PySequence_Tuple(advantages.ptr()));
  return combined;
}

py::object run_min_norm(PyObject* gramian) {
  if (!torch_.exchange || modes_active() || is_true(ask(torch_.tracing))) return py::none();
  DLTensor tensor;
  pama::TensorView view_of;
  pama::MinNormParams params;
  if (!read(gramian, tensor, view_of) || pama::plan_min_norm(view_of, params)) return py::none();
  const uint8_t bits = params.dtype == pama::DType::kFloat64 ? 64 : 32;
  const int64_t bytes = (params.batch * params.n * bits / 8 + 15) / 16 * 16;
  Block* block = allocate(bytes + pama::min_norm_workspace(params), {kDLFloat, bits, 1}, params.device);
  params.weights = block->data();
  params.workspace = static_cast<char*>(params.weights) + bytes;
  py::object weights = view(block, 0, view_of.ndim - 1, params.batch, params.n);
  block->release();
  pama::run_min_norm(params, current_stream(params.device));
  return weights;
}

// Runs f, with what it throws as Python's error.
template <class F>
PyObject* guarded(F f) {
  try {
    return f().release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <int kCount, py::object (*kRun)(PyObject* const*)>
PyObject* call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != kCount) return PyErr_Format(PyExc_TypeError, "expected %d arguments, got %zd", kCount, count);
  return guarded([&] { return kRun(arguments); });
}

PyObject* call_min_norm(PyObject*, PyObject* gramian) {
  return guarded([&] { return run_min_norm(gramian); });
}

// Not through pybind11's own dispatch, whose argument conversion is a tenth of the whole call.
template <int kCount, py::object (*kRun)(PyObject* const*)>
PyMethodDef method(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call<kCount, kRun>)), METH_FASTCALL, nullptr};
}
PyMethodDef methods[] = {
    method<kArguments, run<false>>("combine"),
    method<kArguments, run<true>>("combine_"),
    method<kGaeArguments, run_gae>("gae"),
    method<kPolicyArguments, run_policy_loss>("policy_loss"),
    method<kValueArguments, run_value_loss>("value_loss"),
    method<5, run_scale>("scale"),
    {"min_norm", call_min_norm, METH_O, nullptr},
};

}  // namespace

PYBIND11_MODULE(_C, m) {
  open_door();
  names_attribute = py::str("names").release().ptr();
  spec_attribute = py::str("_spec").release().ptr();
  groups_attribute = py::str("_groups").release().ptr();

  py::class_<pama::CombineOptions>(m, "CombineOptions")
      .def(py::init([](int64_t dim, double clip_low, double clip_high, bool noon, const std::string& level,
                       const std::string& solver, const std::string& normalize, const std::string& nan,
                       bool skip_inactive) {
        return pama::CombineOptions(dim, clip_low, clip_high, noon, level, solver, normalize, nan, skip_inactive);
      }));
  for (PyMethodDef& method : methods)
    m.add_object(method.ml_name, py::reinterpret_steal<py::object>(PyCFunction_New(&method, nullptr)));
  m.def("field", field);
  m.def("set_python_side", [](py::object combined, py::object stats, py::object normalize, py::object options) {
    combined_type = reinterpret_cast<PyTypeObject*>(combined.release().ptr());
    normalize_type = reinterpret_cast<PyTypeObject*>(normalize.release().ptr());
    stats_type = stats.release().ptr();
    make_options = options.release().ptr();
  });
  m.def("set_loss_metrics", [](py::object policy, py::object value) {
    policy_metrics_type = reinterpret_cast<PyTypeObject*>(policy.release().ptr());
    value_metrics_type = reinterpret_cast<PyTypeObject*>(value.release().ptr());
  });
  m.def("has_door", [] { return torch_.exchange != nullptr; });
  m.def("cuda_architectures", [] { return py::str(PAMA_CUDA_ARCHITECTURES).attr("split")(); });
  m.def("cpu_instructions", &pama::cpu_instructions);
  m.def("use_cpu_instructions", &pama::use_cpu_instructions);
#ifdef PAMA_WITH_CUDA
  m.attr("cuda_toolkit") = pama::cuda_toolkit();
#else
  m.attr("cuda_toolkit") = 0;
#endif
  m.attr("built_with_torch") = PAMA_BUILT_WITH_TORCH;
}
