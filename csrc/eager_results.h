// Part of python_module.cpp: memory of the results, and the Combined whose small fields become tensors when asked.
#pragma once

#include <sys/mman.h>

#include <atomic>
#include <deque>
#include <iterator>
#include <mutex>
#include <new>

#include "eager_tensors.h"
#include "torch_runtime.h"

namespace {

// ---- Memory of the results: a block, owned together by the tensors that are views of it. ----

struct Block {
  std::atomic<int> references{1};
  DLTensor tensor{};                          // where it is, and its dtype
  DLManagedTensorVersioned* owner = nullptr;  // CUDA: torch's allocation. CPU: null, the memory follows this struct
  int64_t capacity = 0;                       // in bytes, if it is worth keeping
  // For the packed results:
  int64_t n = 0, solves = 0;
  bool per_row = false;  // many solves: weights [B, N] and value [B], or [G, N] and [G]

  inline void release();
  void* data() const { return static_cast<char*>(tensor.data) + tensor.byte_offset; }
};

// Blocks of the CPU that were released last, up to a quarter of a GiB. Fresh memory costs a page fault per page, which
// takes longer than all that this package computes; a training loop asks for the same sizes over and over. malloc gives
// pages back whenever enough is free above them, such as the temporaries of an eager trainer. Nobody waits here: what
// another thread held in this moment when the process forked stays held, and the child goes on without.
class Kept {
 public:
  static constexpr int64_t kFrom = 128 << 10;    // bytes; smaller ones take malloc's own lists and few pages
  static constexpr int64_t kHugePage = 2 << 20;  // bytes

  Block* take(int64_t bytes) {
    const std::unique_lock lock(mutex, std::try_to_lock);
    if (!lock) return nullptr;
    for (auto at = blocks.rbegin(); at != blocks.rend(); ++at) {
      Block* const block = *at;
      if (block->capacity < bytes || block->capacity > bytes + bytes / 4) continue;
      blocks.erase(std::next(at).base());
      total -= block->capacity;
      return block;
    }
    return nullptr;
  }

  // True if the block is kept now; the oldest make room.
  bool keep(Block* block) {
    const std::unique_lock lock(mutex, std::try_to_lock);
    if (!lock || block->capacity > kMost) return false;
    blocks.push_back(block);
    for (total += block->capacity; total > kMost || blocks.size() > kBlocks; blocks.pop_front()) {
      total -= blocks.front()->capacity;
      ::operator delete(blocks.front());
    }
    return true;
  }

 private:
  static constexpr int64_t kMost = 256 << 20;  // bytes
  static constexpr size_t kBlocks = 64;        // few enough to look through
  std::mutex mutex;
  std::deque<Block*> blocks;  // the oldest first
  int64_t total = 0;          // bytes
};

// Made at import, as a thread may have to wait for what is made when first asked for; never destroyed, as tensors may
// outlive the module.
Kept& kept = *new Kept;

void Block::release() {
  if (--references) return;
  if (owner && owner->deleter) owner->deleter(owner);
  if (!capacity || !kept.keep(this)) ::operator delete(this);
}

void set_error(void*, const char*, const char* message) { PyErr_SetString(PyExc_RuntimeError, message); }

// torch's CPU allocator behind its table takes a third of a microsecond a tensor; operator new takes a tenth of that.
Block* allocate(int64_t bytes, DLDataType dtype, pama::Device device) {
  const bool cuda = device.type == pama::DeviceType::kCUDA, keep = !cuda && bytes >= Kept::kFrom;
  const bool huge = keep && bytes >= Kept::kHugePage;
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
  if (keep) {
    if (Block* block = kept.take(bytes)) {
      tensor.data = block->tensor.data;
      const int64_t capacity = block->capacity;
      block = new (block) Block;
      block->tensor = tensor;
      block->capacity = capacity;
      return block;
    }
  }
  const uintptr_t alignment =
      huge ? Kept::kHugePage : 64;  // torch's; by hand, since glibc is slow at aligned allocation
  void* memory = ::operator new(sizeof(Block) + (cuda ? 0 : alignment + bytes));
  if (!cuda) {
    const uintptr_t behind = reinterpret_cast<uintptr_t>(memory) + sizeof(Block);
    tensor.data = reinterpret_cast<void*>((behind + alignment - 1) / alignment * alignment);
  }
#ifdef MADV_HUGEPAGE
  if (huge) madvise(tensor.data, bytes / Kept::kHugePage * Kept::kHugePage, MADV_HUGEPAGE);  // a wish: it may fail
#endif
  Block* block = new (memory) Block;
  block->tensor = tensor;
  block->owner = owner;
  block->capacity = keep ? bytes : 0;
  return block;
}

struct View {
  DLManagedTensorVersioned managed;
  int64_t sizes[3], strides[3];
  Block* block;
};

// A contiguous tensor of at most three dimensions, `offset` elements into the block.
py::object view(Block* block, int64_t offset, int ndim, const int64_t* sizes) {
  auto* v = new View{{}, {}, {}, block};
  int64_t stride = 1;
  for (int d = ndim; d-- > 0; stride *= sizes[d]) v->sizes[d] = sizes[d], v->strides[d] = stride;
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

// [cols] or [rows, cols], or of no dimension.
py::object view(Block* block, int64_t offset, int ndim, int64_t rows, int64_t cols) {
  const int64_t sizes[2] = {rows, cols};
  return view(block, offset, ndim, sizes + 2 - ndim);
}

// A contiguous tensor of its own, and where its memory is. On CUDA it comes from torch's new_empty, so that
// record_stream works on it; `like` is a tensor of that dtype and device.
py::object new_tensor(PyObject* like, DLDataType dtype, pama::Device device, int ndim, const int64_t* sizes,
                      void*& data) {
  if (device.type == pama::DeviceType::kCPU) {
    int64_t bytes = dtype.bits / 8;
    for (int d = 0; d < ndim; ++d) bytes *= sizes[d];
    Block* block = allocate(bytes, dtype, device);
    py::object out = view(block, 0, ndim, sizes);
    data = block->data();
    block->release();
    return out;
  }
  py::tuple shape(ndim);
  for (int d = 0; d < ndim; ++d) shape[d] = py::int_(sizes[d]);
  PyObject* arguments[] = {like, shape.ptr()};
  auto out = py::reinterpret_steal<py::object>(PyObject_Vectorcall(torch_.new_empty, arguments, 2, nullptr));
  DLTensor made;
  if (!out || torch_.exchange->dltensor_from_py_object_no_sync(out.ptr(), &made) != 0) throw py::error_already_set();
  data = static_cast<char*>(made.data) + made.byte_offset;
  return out;
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
