// Part of python_module.cpp: `gae` through the eager door. None for whatever it does not serve, as all of this door.
#pragma once

#include <algorithm>

#include "eager_results.h"
#include "eager_tensors.h"
#include "pama/gae.h"

namespace {

// Positions of the arguments, those of pama_ext.gae in its order.
enum GaeArgument {
  kGaeRewards,
  kGaeValues,
  kGaeDim,
  kGaeMask,
  kGaeGamma,
  kGaeLam,
  kGaeKlPenalty,
  kGaeBootstrap,
  kGaeOffsets,
  kGaeArguments
};

// A number in [0, 1]; false for all else.
bool read_discount(PyObject* object, double& to) { return read_number(object, to) && to >= 0.0 && to <= 1.0; }

// gamma or lam as numbers: one for all objectives, or one for each.
bool read_discounts(PyObject* object, int n, double* to) {
  if (PyList_CheckExact(object) || PyTuple_CheckExact(object)) {
    if (PySequence_Fast_GET_SIZE(object) != n) return false;
    for (int i = 0; i < n; ++i)
      if (!read_discount(PySequence_Fast_GET_ITEM(object, i), to[i])) return false;
    return true;
  }
  if (!read_discount(object, to[0])) return false;
  std::fill(to + 1, to + n, to[0]);
  return true;
}

bool same_keys(PyObject* a, PyObject* b) {
  if (!PyDict_CheckExact(a) || !PyDict_CheckExact(b)) return true;
  const auto keys = py::reinterpret_steal<py::object>(PyDict_Keys(a)),
             others = py::reinterpret_steal<py::object>(PyDict_Keys(b));
  return keys && others && keys.equal(others);
}

// An output [.., N, ..] as `like`, the argument, holds its objectives: a tensor, or a list or dict of [B, T] ([total]).
py::object gae_output(const Inputs& in, PyObject* like, DLDataType dtype, PyObject* typed, int dim,
                      const pama::GaeParams& p, pama::Planes& planes) {
  const int ndim = in.views[0].ndim;
  int64_t sizes[3];
  for (int d = 0, k = 0; d <= ndim; ++d) sizes[d] = d == dim ? p.n : in.views[0].sizes[k++];
  void* data;
  py::object whole = new_tensor(typed, dtype, p.device, ndim + 1, sizes, data);
  planes.data = static_cast<char*>(data);
  if (!in.listed) return whole;
  const py::tuple each = whole.attr("unbind")(0);
  if (!PyDict_CheckExact(like)) return py::list(each);
  py::dict named;
  PyObject *key, *value;
  Py_ssize_t i = 0;
  for (Py_ssize_t at = 0; PyDict_Next(like, &at, &key, &value); ++i) {
    if (i == p.n) return py::none();  // it has changed meanwhile
    named[key] = each[i];
  }
  return named;
}

py::object run_gae(PyObject* const* arguments) {
  if (!torch_.exchange || modes_active() || is_true(ask(torch_.tracing))) return py::none();
  Inputs rewards, values, bootstrap;
  PyObject *const reward_argument = arguments[kGaeRewards], *const value_argument = arguments[kGaeValues],
                  *const bootstrap_argument = arguments[kGaeBootstrap];
  const bool bootstrapped = bootstrap_argument != Py_None;
  if (!rewards.add(reward_argument) || !values.add(value_argument)) return py::none();
  if (bootstrapped && !bootstrap.add(bootstrap_argument)) return py::none();
  if (!same_keys(reward_argument, value_argument) || !same_keys(bootstrap_argument, value_argument)) return py::none();

  // Where the objectives are: `dim` of tensors with a dimension of time, and of those without one.
  if (!PyLong_CheckExact(arguments[kGaeDim])) return py::none();
  const int64_t given_dim = PyLong_AsLongLong(arguments[kGaeDim]);
  if (given_dim == -1 && PyErr_Occurred()) return decline(), py::none();
  const int ndim = arguments[kGaeOffsets] == Py_None ? 3 : 2;
  if (given_dim < -ndim || given_dim >= ndim) return py::none();
  const int dim = static_cast<int>(given_dim < 0 ? given_dim + ndim : given_dim), flat_dim = std::min(dim, 1);
  const auto split = [&](Inputs& in) {
    if (in.listed) return in.count;
    const int own = in.views[0].ndim;
    return own == ndim ? in.split(dim) : own == 2 ? in.split(flat_dim) : 0;
  };
  const int n = split(values);
  if (n == 0 || split(rewards) != n || (bootstrapped && split(bootstrap) != n)) return py::none();

  constexpr GaeArgument others[] = {kGaeMask, kGaeGamma, kGaeLam, kGaeKlPenalty, kGaeOffsets};
  DLTensor tensors[std::size(others)];
  pama::TensorView views[std::size(others)];
  const pama::TensorView* optional[std::size(others)] = {};
  for (size_t k = 0; k < std::size(others); ++k) {
    PyObject* const object = arguments[others[k]];
    const bool number = others[k] == kGaeGamma || others[k] == kGaeLam;
    if (object == Py_None ? !number : number && !is_tensor(object)) continue;
    if (!read(object, tensors[k], views[k])) return py::none();
    optional[k] = &views[k];
  }
  pama::GaeParams params;
  const pama::GaeTensors given{rewards.views,
                               values.views,
                               bootstrapped ? bootstrap.views : nullptr,
                               n,
                               optional[0],
                               optional[1],
                               optional[2],
                               optional[3],
                               optional[4],
                               values.listed ? 0 : dim};
  if (pama::plan_gae(given, params)) return py::none();
  if (!params.gamma.data && !read_discounts(arguments[kGaeGamma], n, params.gamma.values)) return py::none();
  if (!params.lam.data && !read_discounts(arguments[kGaeLam], n, params.lam.values)) return py::none();

  const bool as_values = params.dtype == params.values_dtype;
  if (!as_values && params.dtype != params.rewards_dtype) return py::none();  // of two halves, a float32
  const Inputs& typed = as_values ? values : rewards;
  const auto output = [&](pama::Planes& planes) {
    return gae_output(values, value_argument, typed.tensors[0].dtype, typed.objects[0], given.dim, params, planes);
  };
  const py::object advantages = output(params.advantages), returns = output(params.returns);
  if (advantages.is_none() || returns.is_none()) return py::none();
  run_kernel(params, params.tokens() * params.n, pama::run_gae);
  return py::make_tuple(advantages, returns);
}

}  // namespace
