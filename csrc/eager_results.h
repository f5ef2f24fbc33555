// Part of python_module.cpp: memory of the results, and the Combined whose small fields become tensors when asked.
#pragma once

#include <atomic>
#include <new>

#include "eager_tensors.h"
#include "torch_runtime.h"

namespace {

// ---- Memory of the results: a block, owned together by the tensors that are views of it. ----

struct Block {
  std::atomic<int> references{1};
  DLTensor tensor{};                          // where it is, and its dtype
  DLManagedTensorVersioned* owner = nullptr;  // CUDA: torch's allocation. CPU: null, the memory follows this struct
  // For the packed results:
  int64_t n = 0, solves = 0;
  bool per_row = false;  // many solves: weights [B, N] and value [B], or [G, N] and [G]

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
  packed->per_row = p.level == pama::Level::kSequence || p.level == pama::Level::kGroup || p.per_token;
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

}  // namespace
