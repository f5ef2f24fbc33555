// Part of python_module.cpp: torch.Tensors read through torch's DLPack exchange table.
#pragma once

#include <ATen/dlpack.h>
#include <pybind11/pybind11.h>

#include <cmath>

#include "pama/combine.h"
#include "pama/tensor.h"

namespace py = pybind11;

namespace {

// torch's own objects, fetched once when the module is imported and never released.
struct Torch {
  const DLPackExchangeAPI* exchange = nullptr;  // null: this torch has none, door 2 stays closed
  PyTypeObject* tensor = nullptr;
  PyObject *new_empty, *requires_grad, *is_neg, *increment_version, *dispatch_modes, *function_modes, *tracing;
  PyObject* grad_mode;
} torch_;

// This package's own Python side, handed over by _combine.py.
PyTypeObject* combined_type = nullptr;   // PendingCombined
PyTypeObject* normalize_type = nullptr;  // Normalize
PyObject* stats_type = nullptr;          // ObjectiveStats
PyTypeObject *policy_metrics_type = nullptr, *value_metrics_type = nullptr;
PyObject* make_options = nullptr;  // _options: checked arguments -> CombineOptions
PyObject *names_attribute = nullptr, *spec_attribute = nullptr, *groups_attribute = nullptr;

// Leaves the door closed under a torch that lacks any of this, some of which is private to it.
void open_door() try {
  const py::object torch = py::module_::import("torch"), tensor = torch.attr("Tensor"), c = torch.attr("_C");
  if (!py::hasattr(tensor, "__dlpack_c_exchange_api__")) return;
  const py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
  const auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!api) throw py::error_already_set();
  if (api->header.version.major != 1 || !api->dltensor_from_py_object_no_sync) return;
  torch_.tensor = reinterpret_cast<PyTypeObject*>(py::object(tensor).release().ptr());
  torch_.new_empty = py::object(tensor.attr("new_empty")).release().ptr();
  torch_.requires_grad = py::object(c.attr("TensorBase").attr("requires_grad")).release().ptr();
  if (Py_TYPE(torch_.requires_grad) != &PyGetSetDescr_Type) return;
  torch_.is_neg = py::object(tensor.attr("is_neg")).release().ptr();
  if (Py_TYPE(torch_.is_neg) != &PyMethodDescr_Type) return;
  if (reinterpret_cast<PyMethodDescrObject*>(torch_.is_neg)->d_method->ml_flags != METH_NOARGS) return;
  torch_.increment_version = py::object(c.attr("_increment_version")).release().ptr();
  torch_.dispatch_modes = py::object(c.attr("_len_torch_dispatch_stack")).release().ptr();
  torch_.function_modes = py::object(c.attr("_is_torch_function_mode_enabled")).release().ptr();
  torch_.tracing = py::object(c.attr("_is_tracing")).release().ptr();
  torch_.grad_mode = py::object(torch.attr("is_grad_enabled")).release().ptr();
  torch_.exchange = api;
} catch (const py::error_already_set&) {  // door 1 serves all
}

bool is_tensor(PyObject* object) { return Py_TYPE(object) == torch_.tensor; }

bool is_true(PyObject* result) {  // steals
  const py::object owned = py::reinterpret_steal<py::object>(result);
  if (!owned) throw py::error_already_set();
  return PyObject_IsTrue(owned.ptr()) == 1;
}

// Calls a builtin of torch with one argument or (null) none; straight into C where it is a plain one.
PyObject* ask(PyObject* builtin, PyObject* argument = nullptr) {
  if (PyCFunction_GetFlags(builtin) == (argument ? METH_O : METH_NOARGS))
    return PyCFunction_GetFunction(builtin)(PyCFunction_GetSelf(builtin), argument);
  return PyObject_Vectorcall(builtin, &argument, argument ? 1 : 0, nullptr);
}

// As torch's own in-place operators do: autograd must see that a tensor changes.
void mark_written(PyObject* const* tensors, int count) {
  const auto written = py::reinterpret_steal<py::object>(PyTuple_New(count));
  if (!written) throw py::error_already_set();
  for (int i = 0; i < count; ++i) PyTuple_SET_ITEM(written.ptr(), i, Py_NewRef(tensors[i]));
  is_true(ask(torch_.increment_version, written.ptr()));
}

bool modes_active() { return is_true(ask(torch_.dispatch_modes)) || is_true(ask(torch_.function_modes)); }

// Forgets an error that only says "not through this door"; passes on what is none of ours, such as KeyboardInterrupt.
void decline() {
  if (!PyErr_ExceptionMatches(PyExc_Exception)) throw py::error_already_set();
  PyErr_Clear();
}

bool requires_grad(PyObject* tensor) {  // the getter itself, without the look-up by name
  auto* descriptor = reinterpret_cast<PyGetSetDescrObject*>(torch_.requires_grad);
  return is_true(descriptor->d_getset->get(tensor, descriptor->d_getset->closure));
}

pama::DType dtype_of(DLDataType t) {
  if (t.lanes != 1) return pama::DType::kOther;
  switch (t.code) {
    case kDLFloat:
      if (t.bits == 32) return pama::DType::kFloat32;
      if (t.bits == 64) return pama::DType::kFloat64;
      return t.bits == 16 ? pama::DType::kFloat16 : pama::DType::kOther;
    case kDLBfloat: return t.bits == 16 ? pama::DType::kBFloat16 : pama::DType::kOther;
    case kDLBool:
    case kDLInt:
    case kDLUInt:
      if (t.bits == 8) return pama::DType::kInt8;
      if (t.bits == 16) return pama::DType::kInt16;
      if (t.bits == 32) return pama::DType::kInt32;
      return t.bits == 64 ? pama::DType::kInt64 : pama::DType::kOther;
    default: return pama::DType::kOther;
  }
}

pama::Device device_of(DLDevice d) {
  if (d.device_type == kDLCPU || d.device_type == kDLCUDAHost) return {pama::DeviceType::kCPU, 0};
#ifdef PAMA_WITH_CUDA
  if (d.device_type == kDLCUDA) return {pama::DeviceType::kCUDA, d.device_id};
#endif
  return {pama::DeviceType::kOther, 0};
}

// x.conj().imag and its like: the sign is a bit of the tensor that the table does not tell.
bool is_negative(PyObject* tensor, const pama::TensorView& view) {
  if (!pama::is_float(view.dtype)) return false;
  const PyMethodDef* is_neg = reinterpret_cast<PyMethodDescrObject*>(torch_.is_neg)->d_method;
  return is_true(is_neg->ml_meth(tensor, nullptr));
}

// The exchange table checks nothing, so exactly torch.Tensor and nothing lazy: false if this is not one.
bool read(PyObject* object, DLTensor& t, pama::TensorView& view, bool is_output = false) {
  if (!is_tensor(object)) return false;
  if (torch_.exchange->dltensor_from_py_object_no_sync(object, &t) != 0) {
    decline();  // no storage: meta, sparse, functorch
    return false;
  }
  int64_t elements = 1;
  for (int d = 0; d < t.ndim; ++d) elements *= t.shape[d];
  if (!t.data && elements > 0) return false;  // a ZeroTensor, or the wrapper of functionalize
  view = {
      static_cast<char*>(t.data) + t.byte_offset, dtype_of(t.dtype), device_of(t.device), t.ndim, t.shape, t.strides};
  // An output whose last stride is 1 cannot be such a view by any public way, and asking takes a tenth of the call.
  if (is_output && t.ndim > 0 && t.strides[t.ndim - 1] == 1) return true;
  return !is_negative(object, view);
}

// The objectives of one argument: a tensor, or a sequence or dict of tensors.
struct Inputs {
  PyObject* objects[pama::kMaxObjectives];  // owned: another thread may change the list or dict they come from
  DLTensor tensors[pama::kMaxObjectives];
  pama::TensorView views[pama::kMaxObjectives];
  int count = 0;
  bool listed = true;
  int64_t sizes[2], strides[2];  // of one objective, after split

  Inputs() = default;
  Inputs(const Inputs&) = delete;
  Inputs& operator=(const Inputs&) = delete;
  ~Inputs() {
    for (int i = 0; i < count; ++i) Py_DECREF(objects[i]);
  }

  bool hold(PyObject* object) {
    if (count == pama::kMaxObjectives) return false;
    objects[count++] = Py_NewRef(object);
    return true;
  }

  // All are held before the first is read: reading may let other threads run.
  bool read_all() {
    for (int i = 0; i < count; ++i)
      if (!read(objects[i], tensors[i], views[i])) return false;
    return count > 0;
  }

  // Makes the one tensor a view for each objective along its dimension `dim`; returns how many there are.
  int split(int dim) {
    const pama::TensorView whole = views[0];
    if (dim < 0 || dim >= whole.ndim || whole.ndim > 3) return 0;
    const int64_t n = whole.sizes[dim];
    if (n < 1 || n > pama::kMaxObjectives) return 0;
    for (int d = 0, k = 0; d < whole.ndim; ++d)
      if (d != dim) sizes[k] = whole.sizes[d], strides[k++] = whole.strides[d];
    const int64_t step = whole.strides[dim] * size_of(whole.dtype);
    for (int i = 0; i < n; ++i)
      views[i] = {static_cast<char*>(whole.data) + i * step, whole.dtype, whole.device, whole.ndim - 1, sizes, strides};
    return static_cast<int>(n);
  }

  bool add(PyObject* advantages) {
    listed = !is_tensor(advantages);
    if (!listed) {
      hold(advantages);
    } else if (PyDict_CheckExact(advantages)) {
      PyObject *key, *value;
      for (Py_ssize_t at = 0; PyDict_Next(advantages, &at, &key, &value);)
        if (!PyUnicode_Check(key) || !hold(value)) return false;
    } else if (PyList_CheckExact(advantages) || PyTuple_CheckExact(advantages)) {
      for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(advantages); ++i)
        if (!hold(PySequence_Fast_GET_ITEM(advantages, i))) return false;
    }
    return read_all();
  }
};

// A plain number; false for all else.
bool read_number(PyObject* object, double& to) {
  if (!PyFloat_CheckExact(object) && !PyLong_CheckExact(object)) return false;
  to = PyFloat_AsDouble(object);
  if (!PyErr_Occurred()) return true;
  PyErr_Clear();  // an int beyond any double
  return false;
}

// A finite number for each objective; false for all else.
bool read_weights(PyObject* weights, int n, double* to) {
  if (!PyList_CheckExact(weights) && !PyTuple_CheckExact(weights)) return false;
  if (PySequence_Fast_GET_SIZE(weights) != n) return false;
  for (int i = 0; i < n; ++i)
    if (!read_number(PySequence_Fast_GET_ITEM(weights, i), to[i]) || !std::isfinite(to[i])) return false;
  return true;
}

void* current_stream(const pama::Device& device) {
  void* stream = nullptr;
  if (device.type == pama::DeviceType::kCUDA &&
      torch_.exchange->current_work_stream(kDLCUDA, device.index, &stream) != 0)
    throw py::error_already_set();
  return stream;
}

// run(params, stream), without the interpreter's lock where it takes long.
template <class Params, class Run>
void run_kernel(Params& params, int64_t elements, Run run) {
  void* const stream = current_stream(params.device);
  if (elements < 64 * 1024) return run(params, stream);
  const py::gil_scoped_release release;
  run(params, stream);
}

}  // namespace
