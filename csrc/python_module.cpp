// Door 2, eager: plain torch.Tensors read through torch's DLPack exchange table, without the dispatcher.
//
// Its functions return None for whatever they do not serve (subclasses, modes, bad arguments): the caller then goes
// through Python's checks, which say what is wrong, and door 1.
#include <ATen/dlpack.h>
#include <pybind11/pybind11.h>

#include <atomic>
#include <cmath>
#include <iterator>
#include <new>

#include "torch_runtime.h"

namespace py = pybind11;

namespace {

// torch's own objects, fetched once when the module is imported and never released.
struct Torch {
  const DLPackExchangeAPI* exchange = nullptr;  // null: this torch has none, door 2 stays closed
  PyTypeObject* tensor = nullptr;
  PyObject *new_empty, *requires_grad, *is_neg, *increment_version, *dispatch_modes, *function_modes, *tracing;
} torch_;

// This package's own Python side, handed over by _combine.py.
PyTypeObject* combined_type = nullptr;  // PendingCombined
PyObject* stats_type = nullptr;         // ObjectiveStats
PyObject* make_options = nullptr;       // _options: checked arguments -> CombineOptions
PyObject* names_attribute = nullptr;

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
  torch_.exchange = api;
} catch (const py::error_already_set&) {  // door 1 serves all
}

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
  if (Py_TYPE(object) != torch_.tensor) return false;
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

// ---- Memory of the results: a block, owned together by the tensors that are views of it. ----

struct Block {
  std::atomic<int> references{1};
  DLTensor tensor{};                          // where it is, and its dtype
  DLManagedTensorVersioned* owner = nullptr;  // CUDA: torch's allocation. CPU: null, the memory follows this struct
  // For the packed results:
  int64_t n = 0, solves = 0;
  bool per_row = false;  // level sequence: weights [B, N] and value [B]

  void release() {
    if (--references) return;
    if (owner && owner->deleter) owner->deleter(owner);
    ::operator delete(this);
  }
  void* data() const { return static_cast<char*>(tensor.data) + tensor.byte_offset; }
};

void set_error(void*, const char*, const char* message) { PyErr_SetString(PyExc_RuntimeError, message); }

// torch's CPU allocator behind its table takes a third of a microsecond a tensor; operator new takes a tenth of that.
Block* allocate(int64_t bytes, DLDataType dtype, pama::Device device) {
  constexpr uintptr_t alignment = 64;  // torch's; by hand, since glibc is slow at aligned allocation
  const bool cuda = device.type == pama::DeviceType::kCUDA;
  DLTensor tensor{};
  tensor.dtype = dtype;
  tensor.device = {cuda ? kDLCUDA : kDLCPU, device.index};
  DLManagedTensorVersioned* owner = nullptr;
  if (cuda) {
    int64_t elements = bytes * 8 / dtype.bits;
    tensor.ndim = 1;
    tensor.shape = &elements;
    if (torch_.exchange->managed_tensor_allocator(&tensor, &owner, nullptr, set_error) != 0)
      throw py::error_already_set();
    tensor.data = owner->dl_tensor.data;
    tensor.byte_offset = owner->dl_tensor.byte_offset;
  }
  void* memory = ::operator new(sizeof(Block) + (cuda ? 0 : alignment + bytes));
  if (!cuda) {
    const uintptr_t behind = reinterpret_cast<uintptr_t>(memory) + sizeof(Block);
    tensor.data = reinterpret_cast<void*>((behind + alignment - 1) / alignment * alignment);
  }
  Block* block = new (memory) Block;
  block->tensor = tensor;
  block->owner = owner;
  return block;
}

struct View {
  DLManagedTensorVersioned managed;
  int64_t sizes[2], strides[2];
  Block* block;
};

// A contiguous tensor of `ndim` (0 to 2) dimensions, [cols] or [rows, cols], `offset` elements into the block.
py::object view(Block* block, int64_t offset, int ndim, int64_t rows, int64_t cols) {
  auto* v = new View{{}, {ndim == 2 ? rows : cols, cols}, {ndim == 2 ? cols : 1, 1}, block};
  ++block->references;
  DLTensor& t = v->managed.dl_tensor;
  t = block->tensor;
  t.byte_offset += static_cast<uint64_t>(offset) * t.dtype.bits / 8;
  t.ndim = ndim;
  t.shape = v->sizes;
  t.strides = v->strides;
  v->managed.version = {DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION};
  v->managed.manager_ctx = v;
  v->managed.deleter = [](DLManagedTensorVersioned* self) {
    auto* view = static_cast<View*>(self->manager_ctx);
    view->block->release();
    delete view;
  };
  void* object = nullptr;
  if (torch_.exchange->managed_tensor_to_py_object_no_sync(&v->managed, &object) != 0) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
}

// ---- The packed results: statistics, weights and value, which a Combined turns into tensors when asked. ----

constexpr char kPacked[] = "pama_ext.packed";

// Field `i` of a PendingCombined, made now if it has not been: 1 weights, 2 value, 3 stats (which makes all).
py::object field(int i, py::handle combined) {
  PyObject* tuple = combined.ptr();
  PyObject* last = PyTuple_GET_ITEM(tuple, 3);
  const auto item = [&] { return py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(tuple, i)); };
  if (!PyCapsule_IsValid(last, kPacked)) return item();
  auto* packed = static_cast<Block*>(PyCapsule_GetPointer(last, kPacked));
  auto put = [&](int k, py::object value) {
    PyObject* before = PyTuple_GET_ITEM(tuple, k);
    PyTuple_SET_ITEM(tuple, k, value.release().ptr());
    Py_DECREF(before);
  };
  const int64_t n = packed->n, weights = pama::kStatistics * n, value = weights + packed->solves * n;
  if ((i == 1 || i == 3) && PyTuple_GET_ITEM(tuple, 1) == Py_None)
    put(1, view(packed, weights, packed->per_row ? 2 : 1, packed->solves, n));
  if ((i == 2 || i == 3) && PyTuple_GET_ITEM(tuple, 2) == Py_None)
    put(2, view(packed, value, packed->per_row ? 1 : 0, 1, packed->solves));
  if (i == 3) {
    py::tuple columns(pama::kStatistics);
    for (int k = 0; k < pama::kStatistics; ++k) columns[k] = view(packed, k * n, 1, 1, n);
    put(3, py::reinterpret_steal<py::object>(PyObject_CallObject(stats_type, columns.ptr())));
  }
  return item();
}

int64_t workspace_offset(const pama::CombineParams& p) {  // in bytes, behind the packed results
  return (p.packed_size() * (p.dtype == pama::DType::kFloat64 ? 8 : 4) + 15) / 16 * 16;
}

Block* allocate_packed(pama::CombineParams& p) {
  const uint8_t bits = p.dtype == pama::DType::kFloat64 ? 64 : 32;
  Block* packed = allocate(workspace_offset(p) + pama::combine_workspace(p), {kDLFloat, bits, 1}, p.device);
  packed->n = p.n;
  packed->solves = p.solves();
  packed->per_row = p.level == pama::Level::kSequence || p.per_token;
  p.packed = packed->data();
  p.workspace = static_cast<char*>(p.packed) + workspace_offset(p);
  return packed;
}

// A PendingCombined; takes over the reference to `packed`.
py::object new_combined(PyObject* advantages, Block* packed) {
  auto capsule = py::reinterpret_steal<py::object>(PyCapsule_New(
      packed, kPacked, [](PyObject* self) { static_cast<Block*>(PyCapsule_GetPointer(self, kPacked))->release(); }));
  if (!capsule) packed->release();
  auto combined = py::reinterpret_steal<py::object>(capsule ? combined_type->tp_alloc(combined_type, 4) : nullptr);
  if (!combined) throw py::error_already_set();
  PyTuple_SET_ITEM(combined.ptr(), 0, Py_NewRef(advantages));
  PyTuple_SET_ITEM(combined.ptr(), 1, Py_NewRef(Py_None));
  PyTuple_SET_ITEM(combined.ptr(), 2, Py_NewRef(Py_None));
  PyTuple_SET_ITEM(combined.ptr(), 3, capsule.release().ptr());
  return combined;
}

// ---- combine ----

struct Inputs {
  PyObject* objects[pama::kMaxObjectives];  // owned: another thread may change the list or dict they come from
  DLTensor tensors[pama::kMaxObjectives];
  pama::TensorView views[pama::kMaxObjectives];
  int count = 0;
  bool listed = true;

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

  bool add(PyObject* advantages) {
    listed = Py_TYPE(advantages) != torch_.tensor;
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

bool read_rewards(PyObject* rewards, pama::CombineParams& p) {
  if (!PyList_CheckExact(rewards) && !PyTuple_CheckExact(rewards)) return false;
  if (PySequence_Fast_GET_SIZE(rewards) != p.n) return false;
  for (int i = 0; i < p.n; ++i) {
    PyObject* weight = PySequence_Fast_GET_ITEM(rewards, i);
    if (!PyFloat_CheckExact(weight) && !PyLong_CheckExact(weight)) return false;
    p.reward_values[i] = PyFloat_AsDouble(weight);
    if (PyErr_Occurred()) PyErr_Clear(), p.reward_values[i] = NAN;  // an int beyond any double
    if (!std::isfinite(p.reward_values[i])) return false;
  }
  return true;
}

// The tensor for the combination. On CUDA it comes from torch's new_empty, so that record_stream works on it.
py::object new_output(const Inputs& in, int64_t dim, pama::CombineParams& p) {
  const DLTensor& first = in.tensors[0];
  const int skip = in.listed ? -1 : static_cast<int>(dim < 0 ? dim + first.ndim : dim);
  int64_t sizes[2] = {1, 1};
  int ndim = 0;
  for (int d = 0; d < first.ndim; ++d)
    if (d != skip) sizes[ndim++] = first.shape[d];
  py::object out;
  void* data;
  if (p.device.type == pama::DeviceType::kCPU) {
    Block* block = allocate(p.tokens() * pama::size_of(p.dtype), first.dtype, p.device);
    out = view(block, 0, ndim, sizes[0], sizes[ndim - 1]);
    data = block->data();
    block->release();
  } else {
    py::tuple shape(ndim);
    for (int d = 0; d < ndim; ++d) shape[d] = py::int_(sizes[d]);
    PyObject* arguments[] = {in.objects[0], shape.ptr()};
    out = py::reinterpret_steal<py::object>(PyObject_Vectorcall(torch_.new_empty, arguments, 2, nullptr));
    DLTensor made;
    if (!out || torch_.exchange->dltensor_from_py_object_no_sync(out.ptr(), &made) != 0) throw py::error_already_set();
    data = static_cast<char*>(made.data) + made.byte_offset;
  }
  p.out = {static_cast<char*>(data), p.cols, 1};
  return out;
}

// As torch's own in-place operators do: autograd must see that a tensor changes.
void mark_written(PyObject* const* tensors, int count) {
  const auto written = py::reinterpret_steal<py::object>(PyTuple_New(count));
  if (!written) throw py::error_already_set();
  for (int i = 0; i < count; ++i) PyTuple_SET_ITEM(written.ptr(), i, Py_NewRef(tensors[i]));
  is_true(ask(torch_.increment_version, written.ptr()));
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

// The checked options. A call site passes the same objects again and again, so the last ones are kept.
const pama::CombineOptions* options_of(PyObject* const* arguments) {
  constexpr Argument keys[] = {kDim,    kClipLow,   kClipHigh, kNoon,         kLevel,
                               kSolver, kNormalize, kNan,      kSkipInactive, kProcessGroup};
  static PyObject* last[std::size(keys)] = {};
  static PyObject* owner = nullptr;
  static const pama::CombineOptions* options = nullptr;
  bool same = options != nullptr;
  for (size_t k = 0; same && k < std::size(keys); ++k) same = last[k] == arguments[keys[k]];
  if (!same) {
    PyObject* now[std::size(keys)];
    for (size_t k = 0; k < std::size(keys); ++k) now[k] = arguments[keys[k]];
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

py::object run(PyObject* const* arguments, bool in_place) {
  if (!torch_.exchange || modes_active()) return py::none();
  // torch.jit.trace, which is deprecated, would bake a result in. Asking takes long, so where out= is given nobody
  // asks.
  if (arguments[kOut] == Py_None && is_true(ask(torch_.tracing))) return py::none();
  const pama::CombineOptions* remembered = options_of(arguments);
  if (!remembered) return py::none();
  const pama::CombineOptions options = *remembered;  // another thread may be next with other ones
  const py::handle advantages = arguments[kAdvantages], mask = arguments[kMask], log_ratio = arguments[kLogRatio],
                   reward_weights = arguments[kRewardWeights], out = arguments[kOut];
  Inputs in;
  if (!in.add(advantages.ptr())) return py::none();

  DLTensor tensors[4];
  pama::TensorView views[4];
  const pama::TensorView* optional[4] = {};
  const py::handle given[4] = {mask, log_ratio, reward_weights, out};
  for (int k = 0; k < 4; ++k) {
    if (given[k].is_none() || (k == 2 && Py_TYPE(given[k].ptr()) != torch_.tensor)) continue;
    if (!read(given[k].ptr(), tensors[k], views[k], k == 3)) return py::none();
    optional[k] = &views[k];
  }
  if (optional[3] && requires_grad(out.ptr())) return py::none();
  for (int i = 0; in_place && i < in.count; ++i)
    if (requires_grad(in.objects[i])) return py::none();

  pama::CombineParams params;
  params.weighted = false;
  if (pama::plan_combine(options,
                         {in.views, in.count, in.listed, optional[0], optional[1], optional[2], optional[3], in_place},
                         params))
    return py::none();
  if (!reward_weights.is_none() && !optional[2]) {
    if (!read_rewards(reward_weights.ptr(), params)) return py::none();
    params.weighted = true;
  }

  if (in_place || !out.is_none()) mark_written(in_place ? in.objects : &arguments[kOut], in_place ? in.count : 1);
  py::object result = py::reinterpret_borrow<py::object>(in_place ? advantages : out);
  if (!in_place && out.is_none()) result = new_output(in, options.dim, params);
  py::object combined = new_combined(result.ptr(), allocate_packed(params));
  void* stream = nullptr;
  if (params.device.type == pama::DeviceType::kCUDA &&
      torch_.exchange->current_work_stream(kDLCUDA, params.device.index, &stream) != 0)
    throw py::error_already_set();
  if (params.tokens() * params.n < 64 * 1024) {
    pama::run_combine(params, stream);
  } else {
    const py::gil_scoped_release release;
    pama::run_combine(params, stream);
  }

  if (PyDict_CheckExact(advantages.ptr()))
    combined.attr(names_attribute) = py::reinterpret_steal<py::object>(PySequence_Tuple(advantages.ptr()));
  return combined;
}

template <bool kInPlace>
PyObject* call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != kArguments) return PyErr_Format(PyExc_TypeError, "expected %d arguments, got %zd", kArguments, count);
  try {
    return run(arguments, kInPlace).release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// Not through pybind11's own dispatch, whose argument conversion is a tenth of the whole call.
PyMethodDef methods[] = {
    {"combine", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call<false>)), METH_FASTCALL, nullptr},
    {"combine_", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call<true>)), METH_FASTCALL, nullptr},
};

}  // namespace

PYBIND11_MODULE(_C, m) {
  open_door();
  names_attribute = py::str("names").release().ptr();

  py::class_<pama::CombineOptions>(m, "CombineOptions")
      .def(py::init([](int64_t dim, double clip_low, double clip_high, bool noon, const std::string& level,
                       const std::string& solver, const std::string& nan, bool skip_inactive) {
        return pama::CombineOptions(dim, clip_low, clip_high, noon, level, solver, nan, skip_inactive);
      }));
  for (PyMethodDef& method : methods)
    m.add_object(method.ml_name, py::reinterpret_steal<py::object>(PyCFunction_New(&method, nullptr)));
  m.def("field", field);
  m.def("set_python_side", [](py::object combined, py::object stats, py::object options) {
    combined_type = reinterpret_cast<PyTypeObject*>(combined.release().ptr());
    stats_type = stats.release().ptr();
    make_options = options.release().ptr();
  });
  m.def("has_door", [] { return torch_.exchange != nullptr; });
  m.def("cuda_architectures", [] { return py::str(PAMA_CUDA_ARCHITECTURES).attr("split")(); });
  m.def("cpu_instructions", &pama::cpu_instructions);
#ifdef PAMA_WITH_CUDA
  m.attr("cuda_toolkit") = pama::cuda_toolkit();
#else
  m.attr("cuda_toolkit") = 0;
#endif
  m.attr("built_with_torch") = PAMA_BUILT_WITH_TORCH;
}
